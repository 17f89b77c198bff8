//! The steps of the demo, with shared and with private tables.

use std::thread;
use std::time::Duration;

use mshare_pool::admin;
use mshare_protocol::agent::{Fault, INFO_TABLES, Map, MemOp, Op, RegionOp, Spin, SpinKind, Value};
use mshare_protocol::entry::Prot;

use super::cost::{self, Cost};
use super::pair::{Pair, at, pool_name};
use super::{Failed, PROCESSES, REGION, REGION_LEN, Verdicts, ensure};
use crate::guests::{Images, shootdowns};

const PAGE: u64 = 4096;
/// Offset of the page that the host fills.
const HOST_PAGE: u64 = 100 << 20;
/// Offset of the page that B writes when it is protected.
const SPIN_PAGE: u64 = 20 << 20;

/// Whose page tables the guests use for the region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tables {
    /// The host's, one set for all.
    Shared,
    /// Their own.
    Private,
}

impl Tables {
    /// The policy of the guests in the pool.
    fn policy(self) -> &'static str {
        match self {
            Self::Shared => "rw",
            Self::Private => "private",
        }
    }
}

/// Runs the steps; the figures of the tables if they were measured.
pub fn run(images: &Images, tables: Tables, verdicts: &mut Verdicts) -> Option<Cost> {
    let mut booted = verdicts.step("two guests boot", || {
        let (pair, took) = Pair::start(images, tables.policy())?;
        Ok((
            pair,
            format!("both agents answer after {:.1} s", took.as_secs_f64()),
        ))
    });
    let attached = verdicts.step_with(
        booted.as_mut(),
        "A creates, 8 processes in each guest attach",
        |pair| attach(pair, tables),
    );
    // Without the region there is nothing to show.
    let mut pair = booted.filter(|_| attached.is_some());
    for (title, [writer, reader], seed) in [
        ("A writes a pattern, B reads it", [0, 1], 1),
        ("B writes a pattern, A reads it", [1, 0], 2),
    ] {
        verdicts.step_with(pair.as_mut(), title, |pair| {
            let words = pair.pass_pattern(writer, reader, REGION_LEN, seed)?;
            Ok((
                (),
                format!("{words} words, a part by each of {PROCESSES} processes, none wrong"),
            ))
        });
    }
    let cost = verdicts.step_with(pair.as_mut(), "page tables are measured", |pair| {
        measure(pair, tables)
    });
    let steps: [(&str, Step); 8] = [
        ("a page that the host fills appears in both", |pair, _| {
            host_page(pair)
        }),
        (
            "protect stops a process of B that spins on writes",
            protect_stops_writer,
        ),
        ("discard reads as zero", |pair, _| discard(pair)),
        ("an O_RDONLY attach is refused its write", read_only),
        ("B is killed with SIGKILL, A goes on", |pair, _| {
            kill_b(pair)
        }),
        ("unlink gives the memory back", |pair, _| unlink(pair)),
        ("A's kernel has nothing to complain about", |pair, _| {
            quiet(pair)
        }),
        ("A powers off, and the command ends", |pair, _| {
            pair.end()?;
            Ok(((), "with the status of B, which was killed".to_owned()))
        }),
    ];
    for (title, step) in steps {
        verdicts.step_with(pair.as_mut(), title, |pair| step(pair, tables));
    }
    cost
}

/// A step with both guests and the region.
type Step = fn(&mut Pair, Tables) -> Result<((), String), Failed>;

fn attach(pair: &mut Pair, tables: Tables) -> Result<((), String), Failed> {
    pair.attach()?;
    let region = pair.pool.lookup(REGION.as_bytes())?;
    ensure(
        region.len == REGION_LEN && region.attached.len() == 2,
        || format!("the broker has {region:?}"),
    )?;
    for agent in &mut pair.agents {
        let name = pool_name();
        let info = agent.region(RegionOp::Info { name })?;
        let shared = matches!(info, Value::RegionInfo(info) if info.flags & INFO_TABLES != 0);
        ensure(shared == (tables == Tables::Shared), || format!("{info}"))?;
    }
    let kib = pair.pool.stat(region.id)?.table_bytes >> 10;
    let saw = match tables {
        Tables::Shared => format!("one set of tables, {kib} KiB, in two guests"),
        Tables::Private => "each guest makes tables of its own".to_owned(),
    };
    Ok(((), saw))
}

fn measure(pair: &mut Pair, tables: Tables) -> Result<(Cost, String), Failed> {
    let cost = cost::measure(pair)?;
    ensure(
        tables == Tables::Shared || cost.guest_kib.iter().all(|&kib| kib > 0),
        || "the workers have no tables of their own".to_owned(),
    )?;
    let saw = format!(
        "{} KiB of tables in the guests, {} minor faults in {} processes",
        cost.guest_kib.iter().sum::<u64>(),
        cost.faults,
        2 * PROCESSES
    );
    Ok((cost, saw))
}

fn quiet(pair: &mut Pair) -> Result<((), String), Failed> {
    let complaints = pair.agents[0].complaints()?;
    ensure(complaints.is_empty(), || complaints.join("\n"))?;
    Ok(((), "no warning in its log".to_owned()))
}

fn host_page(pair: &mut Pair) -> Result<((), String), Failed> {
    let page: Vec<u8> = (0..PAGE).map(|i| (i % 251).to_le_bytes()[0]).collect();
    let word = u64::from_le_bytes(page[..8].try_into()?);
    admin::fill(
        &pair.pool,
        REGION.as_bytes(),
        HOST_PAGE,
        &mut page.as_slice(),
    )?;
    for agent in &mut pair.agents {
        for value in agent.run_all("workers", at(HOST_PAGE, MemOp::Load))? {
            ensure(value == Value::Word(word), || {
                format!("a worker read {value:?}")
            })?;
        }
    }
    Ok((
        (),
        format!("all {} processes read {word:#018x}", 2 * PROCESSES),
    ))
}

/// The word that B's spinner writes, read by the host.
fn host_word(pair: &Pair, offset: u64) -> Result<u64, Failed> {
    let mut bytes = Vec::new();
    admin::read(&pair.pool, REGION.as_bytes(), offset, 8, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes.as_slice().try_into()?))
}

fn protect_stops_writer(pair: &mut Pair, tables: Tables) -> Result<((), String), Failed> {
    let spin = at(SPIN_PAGE, MemOp::Spin(SpinKind::Write));
    pair.agents[1].run_one("workers", 0, spin)?;
    let first = host_word(pair, SPIN_PAGE)?;
    thread::sleep(Duration::from_millis(200));
    let second = host_word(pair, SPIN_PAGE)?;
    ensure(first != second, || "B does not write".to_owned())?;

    let before = shootdowns(&mut pair.agents[1])?;
    let protect = RegionOp::Protect {
        name: pool_name(),
        offset: SPIN_PAGE,
        len: PAGE,
        prot: Prot::Read.bits(),
    };
    pair.agents[0].region(protect)?;
    let at_return = host_word(pair, SPIN_PAGE)?;
    thread::sleep(Duration::from_millis(300));
    let later = host_word(pair, SPIN_PAGE)?;
    let after = shootdowns(&mut pair.agents[1])?;

    ensure(at_return == later, || {
        format!(
            "B wrote {} times after protect had returned",
            later - at_return
        )
    })?;
    let status = pair.agents[1].run_one("workers", 0, Op::SpinStop)?;
    let Value::Spin(Spin {
        fault: Some(fault),
        iterations,
        ..
    }) = status
    else {
        return Err(format!("the spinner did not fault: {status:?}").into());
    };
    ensure(fault.signal == libc::SIGSEGV, || {
        format!("the spinner got {fault}")
    })?;
    // Private tables are B's own to change, so B has to be told.
    ensure((before == after) == (tables == Tables::Shared), || {
        format!("interrupts of B for shootdowns: {before:?} before, {after:?} after")
    })?;
    let told = match tables {
        Tables::Shared => "B handled no shootdown and no device interrupt for it",
        Tables::Private => "B was told by its device",
    };
    let upgrade = RegionOp::Protect {
        name: pool_name(),
        offset: SPIN_PAGE,
        len: PAGE,
        prot: Prot::ReadWrite.bits(),
    };
    pair.agents[0].region(upgrade)?;
    pair.agents[1].run_one("workers", 0, at(SPIN_PAGE, MemOp::Store { value: 7 }))?;
    Ok((
        (),
        format!(
            "SIGSEGV after {iterations} writes, none after protect returned; {told}; writable \
             again on request"
        ),
    ))
}

fn discard(pair: &mut Pair) -> Result<((), String), Failed> {
    let name = pool_name();
    let (offset, len) = (HOST_PAGE, 2 << 20);
    pair.agents[1].region(RegionOp::Discard { name, offset, len })?;
    let zero = at(offset, MemOp::VerifyZero { len });
    for agent in &mut pair.agents {
        for value in agent.run_all("workers", zero.clone())? {
            let Value::Verified(verified) = value else {
                return Err(format!("a worker answered {value:?}").into());
            };
            ensure(verified.bad == 0, || {
                format!("{} words are not zero", verified.bad)
            })?;
        }
    }
    Ok(((), format!("2 MiB, in all {} processes", 2 * PROCESSES)))
}

fn read_only(pair: &mut Pair, tables: Tables) -> Result<((), String), Failed> {
    let b = &mut pair.agents[1];
    b.start_group("readers", 1, Some(Map::attach_ro(&pool_name())))?;
    let read = b.run_one("readers", 0, at(0, MemOp::Try { write: false }))?;
    ensure(read == Value::Access(None), || {
        format!("the read: {read:?}")
    })?;
    let write = b.run_one("readers", 0, at(0, MemOp::Try { write: true }))?;
    let Value::Access(Some(Fault { signal, .. })) = write else {
        return Err(format!("the write was not refused: {write:?}").into());
    };
    ensure(signal == libc::SIGSEGV, || {
        format!("the write got signal {signal}")
    })?;
    // The shared entry itself allows the write: a peer's succeeds.
    b.run_one("workers", 0, at(0, MemOp::Try { write: true }))?;
    b.stop_group("readers")?;
    let saw = match tables {
        Tables::Shared => {
            "SIGSEGV from its link; a writer's access through the same entry succeeds"
        }
        Tables::Private => "SIGSEGV; a writer's access to the same page succeeds",
    };
    Ok(((), saw.to_owned()))
}

fn kill_b(pair: &mut Pair) -> Result<((), String), Failed> {
    let pid = child_named(pair.supervisor.pid(), "guest1")?;
    rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
    let id = pair.pool.lookup(REGION.as_bytes())?.id;
    let mut attached = Vec::new();
    for _ in 0..100 {
        attached = pair.pool.stat(id)?.attached;
        if attached.len() == 1 {
            break;
        }
        thread::sleep(Duration::from_millis(20));
    }
    ensure(attached == ["guest0"], || {
        format!("still attached: {attached:?}")
    })?;
    let words = pair.pass_pattern(0, 0, REGION_LEN / 16, 5)?;
    Ok((
        (),
        format!("the broker has detached it; A wrote and compared {words} words"),
    ))
}

/// The child of `parent` that has `name` on its command line.
fn child_named(parent: u32, name: &str) -> Result<rustix::process::Pid, Failed> {
    let children = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"))?;
    for child in children.split_whitespace() {
        let line = std::fs::read(format!("/proc/{child}/cmdline"))?;
        if line.split(|&b| b == 0).any(|word| word == name.as_bytes()) {
            return rustix::process::Pid::from_raw(child.parse()?)
                .ok_or_else(|| "a child without a process id".into());
        }
    }
    Err(format!("the supervisor has no child called {name}").into())
}

fn unlink(pair: &mut Pair) -> Result<((), String), Failed> {
    let before = pair.pool.pool_stat()?;
    let a = &mut pair.agents[0];
    a.run_all(
        "workers",
        Op::Region(RegionOp::Unlink { name: pool_name() }),
    )?;
    let gone = pair.pool.lookup(REGION.as_bytes());
    ensure(
        matches!(&gone, Err(failure) if failure.errno == libc::ENOENT),
        || format!("the name is still there: {gone:?}"),
    )?;
    let mut after = pair.pool.pool_stat()?;
    for _ in 0..100 {
        if after.resident == 0 && after.table_bytes == 0 {
            break;
        }
        thread::sleep(Duration::from_millis(20));
        after = pair.pool.pool_stat()?;
    }
    ensure(after.resident == 0 && after.table_bytes == 0, || {
        format!(
            "{} bytes of data, {} of tables are left",
            after.resident, after.table_bytes
        )
    })?;
    Ok((
        (),
        format!(
            "{} MiB of data and {} KiB of tables before, nothing after",
            before.resident >> 20,
            before.table_bytes >> 10
        ),
    ))
}
