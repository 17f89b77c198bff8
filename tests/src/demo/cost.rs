//! What page tables cost, shared and private.

use std::time::Duration;

use mshare_protocol::agent::{Map, MemOp, Value};

use super::pair::{Pair, pool_name, whole};
use super::{Failed, PROCESSES, REGION};

/// Page size of the accesses, in bytes.
const PAGE: u64 = 4096;

/// Figures of one way to attach. Tables in KiB.
#[derive(Clone, Debug)]
pub struct Cost {
    /// Page tables of the workers, for each guest.
    pub guest_kib: [u64; 2],
    /// Page tables of the region, held by the host once.
    pub host_kib: u64,
    /// Minor faults of all workers while they touched everything.
    pub faults: u64,
    /// Median of the workers' times to touch everything.
    pub touch: Duration,
}

impl Cost {
    fn total_kib(&self) -> u64 {
        self.guest_kib.iter().sum::<u64>() + self.host_kib
    }
}

/// Measures the workers of both guests. The region's data must be in memory
/// and known to both second stages (the patterns before have done so), so
/// that what differs is the page tables.
pub fn measure(pair: &mut Pair) -> Result<Cost, Failed> {
    let bare = pair.agents.each_mut().map(|agent| -> Result<u64, Failed> {
        // Tables that a worker has anyway: its own image and stack.
        agent.start_group("bare", PROCESSES, None)?;
        let kib = tables_of(agent, "bare")?;
        agent.stop_group("bare")?;
        Ok(kib)
    });
    let mut guest_kib = [0; 2];
    let mut faults = 0;
    let mut times = Vec::new();
    for (i, bare) in bare.into_iter().enumerate() {
        let agent = &mut pair.agents[i];
        agent.start_group("fresh", PROCESSES, Some(Map::attach(&pool_name())))?;
        let touch = MemOp::Touch {
            len: 0,
            stride: PAGE,
            write: false,
        };
        for value in agent.run_all("fresh", whole(touch))? {
            let Value::Touched(touched) = value else {
                return Err(format!("a worker answered {value:?}").into());
            };
            faults += touched.minflt;
            times.push(Duration::from_nanos(touched.elapsed_ns));
        }
        guest_kib[i] = tables_of(agent, "fresh")?.saturating_sub(bare?);
        agent.stop_group("fresh")?;
    }
    times.sort();
    let touch = times
        .get(times.len() / 2)
        .copied()
        .ok_or("no worker reported a time")?;
    let region = pair.pool.lookup(REGION.as_bytes())?;
    let host = pair.pool.stat(region.id)?;
    Ok(Cost {
        guest_kib,
        host_kib: host.table_bytes >> 10,
        faults,
        touch,
    })
}

fn tables_of(agent: &mut vmm::agent_client::AgentClient, group: &str) -> Result<u64, Failed> {
    let figures = agent.figures()?;
    Ok(figures
        .processes
        .iter()
        .filter(|process| process.group == group)
        .map(|process| process.vm_pte_kib)
        .sum())
}

/// The table of the README.
pub fn table(private: &Cost, shared: &Cost) -> String {
    let row = |what: &str, p: u64, s: u64| {
        #[allow(clippy::cast_precision_loss)] // a ratio for people
        let ratio = if s == 0 {
            "-".to_owned()
        } else {
            format!("{:.1}", p as f64 / s as f64)
        };
        format!("| {what:<44} | {p:>9} | {s:>9} | {ratio:>7} |\n")
    };
    let micros = |t: Duration| u64::try_from(t.as_micros()).unwrap_or(u64::MAX);
    let mut text = format!(
        "| {:<44} | {:>9} | {:>9} | {:>7} |\n|{:-<46}|{:->11}|{:->11}|{:->9}|\n",
        "16 processes, 256 MiB region", "private", "shared", "ratio", "", ":", ":", ":"
    );
    text += &row(
        "page tables in guest A, KiB",
        private.guest_kib[0],
        shared.guest_kib[0],
    );
    text += &row(
        "page tables in guest B, KiB",
        private.guest_kib[1],
        shared.guest_kib[1],
    );
    text += &row(
        "page tables on the host, once, KiB",
        private.host_kib,
        shared.host_kib,
    );
    text += &row(
        "page tables in all, KiB",
        private.total_kib(),
        shared.total_kib(),
    );
    text += &row(
        "minor faults to touch everything",
        private.faults,
        shared.faults,
    );
    text += &row(
        "time to touch everything, median, us",
        micros(private.touch),
        micros(shared.touch),
    );
    text
}
