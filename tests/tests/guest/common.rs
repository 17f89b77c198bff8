//! What the tests start from: a pool with its broker in this process, and
//! guests that join it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use mshare_pool::admin;
use mshare_pool::broker::Broker;
use mshare_pool::client::Client;
use mshare_pool::layout::PoolConfig;
use mshare_pool::server::{Listener, Options as ServerOptions, Server};
use mshare_protocol::agent::{Fault, MemOp, Op, RegionOp, Value};
use mshare_tests::guests::{Guest, Images, Options};

pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;
pub const PAGE: u64 = 4096;
/// Where the tests put their regions.
pub const START: u64 = 0x1000_0000_0000;

pub struct Pool {
    pub dir: tempfile::TempDir,
    pub images: Images,
    _server: Server,
    pub admin: Client,
}

impl Pool {
    /// A pool of 1 GiB, and no guests yet.
    pub fn new() -> Self {
        Self::with(&PoolConfig::new(GIB), Images::from_env().unwrap())
    }

    /// The same with entries of 2 MiB.
    pub fn huge(images: Images) -> Self {
        let config = PoolConfig {
            huge_pages: true,
            ..PoolConfig::new(GIB)
        };
        Self::with(&config, images)
    }

    pub fn with(config: &PoolConfig, images: Images) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("pool");
        let listener = Listener::bind(&socket).unwrap();
        let broker = Broker::new(config).unwrap();
        let server = Server::start(listener, broker, ServerOptions::default()).unwrap();
        let admin = admin::connect(&socket).unwrap();
        Self {
            dir,
            images,
            _server: server,
            admin,
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("pool")
    }

    pub fn guest(&self, name: &str, policy: &str) -> Guest {
        self.start(&Options::new(name).pool(&self.socket(), policy))
    }

    pub fn start(&self, options: &Options) -> Guest {
        Guest::start(&self.images, self.dir.path(), options).unwrap()
    }

    /// The word at byte `offset` of region `name`, as the host sees it.
    pub fn word(&self, name: &str, offset: u64) -> u64 {
        let mut bytes = Vec::new();
        admin::read(&self.admin, name.as_bytes(), offset, 8, &mut bytes).unwrap();
        u64::from_le_bytes(bytes.try_into().unwrap())
    }
}

/// An access to slot 0.
pub fn at(offset: u64, mem: MemOp) -> Op {
    Op::Mem {
        slot: 0,
        offset,
        mem,
    }
}

pub fn load(guest: &mut Guest, group: &str, offset: u64) -> u64 {
    match guest
        .agent
        .run_one(group, 0, at(offset, MemOp::Load))
        .unwrap()
    {
        Value::Word(word) => word,
        other => panic!("a load yields {other:?}"),
    }
}

pub fn store(guest: &mut Guest, group: &str, offset: u64, value: u64) {
    guest
        .agent
        .run_one(group, 0, at(offset, MemOp::Store { value }))
        .unwrap();
}

/// The signal that an access gets, if any.
pub fn try_access(guest: &mut Guest, group: &str, offset: u64, write: bool) -> Option<i32> {
    match guest
        .agent
        .run_one(group, 0, at(offset, MemOp::Try { write }))
        .unwrap()
    {
        Value::Access(fault) => fault.map(|Fault { signal, .. }| signal),
        other => panic!("an access yields {other:?}"),
    }
}

pub fn protect(guest: &mut Guest, name: &str, offset: u64, len: u64, prot: u32) {
    let name = name.to_owned();
    guest
        .agent
        .region(RegionOp::Protect {
            name,
            offset,
            len,
            prot,
        })
        .unwrap();
}

pub fn discard(guest: &mut Guest, name: &str, offset: u64, len: u64) {
    let name = name.to_owned();
    guest
        .agent
        .region(RegionOp::Discard { name, offset, len })
        .unwrap();
}

/// The errno an operation in a process of its own ends with; 0 if it succeeds.
pub fn errno_of(guest: &mut Guest, op: Op) -> i32 {
    match guest.agent.once(op) {
        Ok(_) => 0,
        Err(error) => error
            .errno()
            .unwrap_or_else(|| panic!("not a system call's error: {error}")),
    }
}

/// Waits until `condition` holds, at most 10 s.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(
            begun.elapsed() < Duration::from_secs(10),
            "not in 10 s: {what}"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The guest's kernel has found nothing to complain about.
pub fn assert_quiet(guest: &mut Guest) {
    let complaints = guest.agent.complaints().unwrap();
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}
