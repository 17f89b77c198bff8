//! The guest's driver is unbound and bound again, or the guest reboots, while
//! processes use a region.

use std::time::Duration;

use mshare_protocol::agent::{Map, MemOp, Op, Probe, RegionOp, Spin, SpinKind, Value};
use mshare_protocol::klog::complains;
use mshare_tests::guests::{Guest, Options};

use crate::common::*;
use crate::errnos::{RW, mshare};

const LEN: u64 = 16 * MIB;
const DRIVER: &str = "/sys/bus/virtio/drivers/virtio_mshare";

/// The guest's device, as the driver's directory in sysfs names it.
pub fn device(guest: &mut Guest) -> String {
    let names = guest.agent.list_dir(DRIVER).unwrap();
    let device = names.into_iter().find(|name| {
        name.strip_prefix("virtio")
            .is_some_and(|number| number.parse::<u32>().is_ok())
    });
    device.expect("the driver has a device")
}

/// Writes the name of a device to `bind` or `unbind`.
pub fn tell_driver(guest: &mut Guest, what: &str, device: &str) {
    let path = format!("{DRIVER}/{what}");
    guest.agent.write_file(&path, device.as_bytes()).unwrap();
}

fn region_ops() -> [RegionOp; 5] {
    let name = || "pool/r".to_owned();
    let (offset, len) = (0, PAGE);
    [
        RegionOp::Info { name: name() },
        RegionOp::Protect {
            name: name(),
            offset,
            len,
            prot: 3,
        },
        RegionOp::Discard {
            name: name(),
            offset,
            len,
        },
        RegionOp::Punch {
            name: name(),
            offset,
            len,
        },
        RegionOp::Mmap { name: name() },
    ]
}

fn spin_of(guest: &mut Guest, process: u32, op: Op) -> Spin {
    match guest.agent.run_one("w", process, op).unwrap() {
        Value::Spin(spin) => spin,
        other => panic!("{other:?}"),
    }
}

fn check_errno(guest: &mut Guest, what: &str, op: Op, expected: i32) {
    let errno = match guest.agent.run_one("files", 0, op) {
        Ok(_) => 0,
        Err(error) => error.errno().unwrap_or_else(|| panic!("{what}: {error}")),
    };
    assert_eq!(errno, expected, "{what}");
}

/// Guest A unbinds its device and binds it again, with a policy; B goes on.
fn unbind_and_bind(policy: &str) {
    let pool = Pool::new();
    let mut a = pool.guest("a", policy);
    let mut b = pool.guest("b", "rw");
    let create = Map::create("pool/r", START, LEN);
    a.agent.start_group("w", 3, Some(create)).unwrap();
    let attach = || Some(Map::attach("pool/r"));
    b.agent.start_group("w", 1, attach()).unwrap();
    // This one has the file open and nothing mapped.
    a.agent.start_group("files", 1, None).unwrap();
    let keep = Op::Keep {
        name: "pool/r".to_owned(),
        oflag: RW,
    };
    a.agent.run_one("files", 0, keep).unwrap();
    for op in region_ops() {
        let what = format!("{op:?} before");
        check_errno(&mut a, &what, Op::Kept(op), 0);
    }
    store(&mut b, "w", 8, 4711);
    for (process, kind) in [(0, SpinKind::Read), (1, SpinKind::Write)] {
        let spin = at(2 * MIB, MemOp::Spin(kind));
        a.agent.run_one("w", process, spin).unwrap();
    }
    let spin = at(4 * MIB, MemOp::Spin(SpinKind::Write));
    b.agent.run_one("w", 0, spin).unwrap();
    eventually("A and B write", || {
        pool.word("r", 2 * MIB) > 100 && pool.word("r", 4 * MIB) > 100
    });

    let device = device(&mut a);
    tell_driver(&mut a, "unbind", &device);
    let at_return = pool.word("r", 2 * MIB);

    // Those who use the memory: the spinners, and one that did not just then.
    for process in [0, 1] {
        let spin = spin_of(&mut a, process, Op::SpinStop);
        let signal = spin.fault.map(|fault| fault.signal);
        assert_eq!(signal, Some(libc::SIGBUS), "process {process}: {spin:?}");
    }
    assert_eq!(
        pool.word("r", 2 * MIB),
        at_return,
        "no write after the return"
    );
    for write in [false, true] {
        let access = at(PAGE, MemOp::Try { write });
        let value = a.agent.run_one("w", 2, access).unwrap();
        assert!(
            matches!(value, Value::Access(Some(fault)) if fault.signal == libc::SIGBUS),
            "{value:?}"
        );
    }
    let path = "/tmp/f".to_owned();
    let probe = at(0, MemOp::Probe(Probe::Pwrite { path, len: 8 }));
    let value = a.agent.run_one("w", 2, probe).unwrap();
    assert!(
        matches!(value, Value::Probe(p) if (p.ret, p.errno) == (-1, libc::EFAULT)),
        "{value:?}"
    );
    // The open file, and names.
    for op in region_ops() {
        let what = format!("{op:?}");
        check_errno(&mut a, &what, Op::Kept(op), libc::EIO);
    }
    let unlink = Op::Region(RegionOp::Unlink {
        name: "pool/r".to_owned(),
    });
    let create = libc::O_CREAT | RW;
    for (what, op) in [
        ("attach", mshare("pool/r", 0, 0, RW)),
        ("create", mshare("pool/s", START + GIB, LEN, create)),
        ("unlink", unlink.clone()),
    ] {
        check_errno(&mut a, what, op, libc::ENOENT);
    }
    let error = a.agent.run_one("w", 2, unlink).unwrap_err();
    assert_eq!(
        error.errno(),
        Some(libc::ENOENT),
        "by one that was attached"
    );

    // Nobody else notices, and the broker has A detached.
    let id = pool.admin.lookup(b"r").unwrap().id;
    eventually("the broker has detached A", || {
        pool.admin.stat(id).unwrap().attached == ["b"]
    });
    let spin = spin_of(&mut b, 0, Op::SpinStop);
    assert_eq!(spin.fault, None, "{spin:?}");

    tell_driver(&mut a, "bind", &device);
    a.agent.start_group("again", 1, attach()).unwrap();
    assert_eq!(load(&mut a, "again", 8), 4711);
    store(&mut a, "again", 16, 4712);
    assert_eq!(load(&mut b, "w", 16), 4712);
    let mut attached = pool.admin.stat(id).unwrap().attached;
    attached.sort();
    assert_eq!(attached, ["a", "b"]);
    protect(&mut b, "pool/r", 0, PAGE, 1);
    assert_eq!(try_access(&mut a, "again", 0, true), Some(libc::SIGSEGV));
    // What was taken away does not come back by itself.
    let access = at(PAGE, MemOp::Try { write: false });
    let value = a.agent.run_one("w", 2, access).unwrap();
    assert!(
        matches!(value, Value::Access(Some(fault)) if fault.signal == libc::SIGBUS),
        "{value:?}"
    );
    a.agent.stop_group("w").unwrap();
    a.agent.stop_group("files").unwrap();
    assert_eq!(load(&mut a, "again", 8), 4711);
    assert_quiet(&mut a);
    assert_quiet(&mut b);
}

/// The virtio core resets the device before the machine ends, while processes
/// still walk the host's tables.
#[test]
fn guest_that_reboots_while_processes_spin_ends_as_any_other() {
    for policy in ["rw", "private"] {
        let pool = Pool::new();
        let options = Options::new("a").pool(&pool.socket(), policy).cpus(2);
        let mut a = pool.start(&options);
        let create = Map::create("pool/r", START, LEN);
        a.agent.start_group("w", 4, Some(create)).unwrap();
        let spin = at(0, MemOp::Spin(SpinKind::Write));
        a.agent.run_all("w", spin).unwrap();
        eventually("the guest writes", || pool.word("r", 0) > 1000);

        a.agent.reboot().unwrap();

        let status = a.process.wait(Duration::from_secs(60)).unwrap();
        let output = a.process.output();
        assert_eq!(status.code(), Some(16), "{policy}: {output}");
        let bad = output.lines().find(|line| complains(line));
        assert_eq!(bad, None, "{policy}");
        eventually("the region is detached", || {
            pool.admin.lookup(b"r").unwrap().attached.is_empty()
        });
    }
}

#[test]
fn unbound_device_takes_linked_regions_away_and_bound_again_gives_them() {
    unbind_and_bind("rw");
}

#[test]
fn unbound_device_takes_private_attachments_away_and_bound_again_gives_them() {
    unbind_and_bind("private");
}
