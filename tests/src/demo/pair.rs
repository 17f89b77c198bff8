//! Two guests and their pool, started as a user would: by one command.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use mshare_pool::client::Client;
use mshare_protocol::agent::{Map, MemOp, Op, Value};
use vmm::agent_client::AgentClient;

use super::{Failed, PROCESSES, REGION, REGION_LEN, REGION_START, ensure};
use crate::guests::{BOOT_LIMIT, Images, Process, SHORT_CONSOLE};

/// Two guests under a supervisor.
#[derive(Debug)]
pub struct Pair {
    /// The supervisor, which is also the broker.
    pub supervisor: Process,
    /// Agents of guest A and guest B.
    pub agents: [AgentClient; 2],
    /// The broker's side: what `vmm pool` talks to.
    pub pool: Client,
    _dir: tempfile::TempDir,
}

/// The name under which a guest's processes see the region.
pub fn pool_name() -> String {
    format!("pool/{REGION}")
}

impl Pair {
    /// Starts `vmm --guests 2 --pool size=1G` and waits for both agents.
    pub fn start(images: &Images, policy: &str) -> Result<(Self, Duration), Failed> {
        let dir = tempfile::Builder::new().prefix("mshare-demo-").tempdir()?;
        let at = |name: &str| -> PathBuf { dir.path().join(name) };
        let mut command = Command::new(&images.vmm);
        command
            .arg("--kernel")
            .arg(&images.kernel)
            .arg("--initrd")
            .arg(&images.initrd)
            .args(["--guests", "2", "--cpus", "2", "--memory", "256M"])
            .args(["--cmdline", SHORT_CONSOLE])
            .arg("--pool")
            .arg(format!(
                "size=1G,socket={},policy={policy}",
                at("pool").display()
            ))
            .arg("--vsock")
            .arg(format!("cid=3,path={}", at("guest{n}.vsock").display()));
        let begun = Instant::now();
        let mut supervisor = Process::start("supervisor", dir.path(), command)?;
        let agents = [
            supervisor.agent(&at("guest0.vsock"), BOOT_LIMIT)?,
            supervisor.agent(&at("guest1.vsock"), BOOT_LIMIT)?,
        ];
        let took = begun.elapsed();
        let pool = mshare_pool::admin::connect(&at("pool"))?;
        Ok((
            Self {
                supervisor,
                agents,
                pool,
                _dir: dir,
            },
            took,
        ))
    }

    /// Guest A creates the region; processes of both attach it.
    pub fn attach(&mut self) -> Result<(), Failed> {
        let [a, b] = &mut self.agents;
        let name = pool_name();
        a.start_group(
            "workers",
            PROCESSES,
            Some(Map::create(&name, REGION_START, REGION_LEN)),
        )?;
        b.start_group("workers", PROCESSES, Some(Map::attach(&name)))?;
        Ok(())
    }

    /// One process of guest `writer` writes a pattern of `len` bytes; each
    /// process of guest `reader` compares its part.
    pub fn pass_pattern(
        &mut self,
        writer: usize,
        reader: usize,
        len: u64,
        seed: u64,
    ) -> Result<u64, Failed> {
        let fill = MemOp::Fill { len, seed };
        self.agents[writer].run_one("workers", 0, whole(fill))?;
        let len = len / u64::from(PROCESSES);
        let mut words = 0;
        for process in 0..PROCESSES {
            let verify = at(u64::from(process) * len, MemOp::Verify { len, seed });
            let value = self.agents[reader].run_one("workers", process, verify)?;
            let Value::Verified(verified) = value else {
                return Err(format!("a worker answered {value:?}").into());
            };
            ensure(verified.bad == 0, || {
                format!(
                    "{} of {} words are wrong, the first at offset {:#x}",
                    verified.bad,
                    verified.words,
                    verified.first_bad.unwrap_or(0)
                )
            })?;
            words += verified.words;
        }
        Ok(words)
    }

    /// Switches A off and waits for the supervisor, whose status is that of the
    /// first guest that did not end well: of B, which was killed.
    pub fn end(&mut self) -> Result<(), Failed> {
        self.agents[0].power_off()?;
        let status = self.supervisor.wait(Duration::from_secs(30))?;
        ensure(status.code() == Some(128 + libc::SIGKILL), || {
            format!(
                "the supervisor ended with {status}:\n{}",
                self.supervisor.output()
            )
        })
    }
}

/// An access to the mapping in slot 0, from its start.
pub fn whole(mem: MemOp) -> Op {
    at(0, mem)
}

/// An access to the mapping in slot 0 at `offset`.
pub fn at(offset: u64, mem: MemOp) -> Op {
    Op::Mem {
        slot: 0,
        offset,
        mem,
    }
}
