//! Kernel interfaces that look at memory from the side, on a region whose
//! pages have no `struct page` and whose tables belong to nobody in the guest.

use mshare_protocol::agent::{Map, MemOp, Probe, Value};
use mshare_tests::guests::{Guest, Images};

use crate::common::*;

const LEN: u64 = 64 * MIB;

/// Pools with entries of 4 KiB and of 2 MiB.
fn pools() -> impl Iterator<Item = Pool> {
    let huge = || Pool::huge(Images::from_env().unwrap());
    [Pool::new as fn() -> Pool, huge]
        .into_iter()
        .map(|new| new())
}

fn attached(pool: &Pool) -> Guest {
    let mut a = pool.guest("a", "rw");
    a.agent
        .start_group("w", 1, Some(Map::create("pool/r", START, LEN)))
        .unwrap();
    a.agent
        .start_group("ro", 1, Some(Map::attach_ro("pool/r")))
        .unwrap();
    store(&mut a, "w", 0, 0x5a5a);
    a
}

fn probe(guest: &mut Guest, group: &str, probe: Probe) -> mshare_protocol::agent::Probed {
    let op = at(0, MemOp::Probe(probe));
    match guest.agent.run_one(group, 0, op).unwrap() {
        Value::Probe(probed) => probed,
        other => panic!("{other:?}"),
    }
}

#[test]
fn page_pinning_is_refused_and_copying_works() {
    for pool in pools() {
        let mut a = attached(&pool);
        a.agent.write_file("/tmp/f", &[0x11; 4096]).unwrap();
        let path = || "/tmp/f".to_owned();
        let disk = || "/dev/ram0".to_owned();
        for (what, refused) in [
            (
                "O_DIRECT",
                Probe::ODirectRead {
                    path: disk(),
                    len: 4096,
                },
            ),
            ("process_vm_readv", Probe::VmRead { len: 8 }),
            ("process_vm_writev", Probe::VmWrite { len: 8 }),
            ("vmsplice", Probe::Vmsplice { len: 4096 }),
            ("shared futex", Probe::FutexWake { private: false }),
        ] {
            let probed = probe(&mut a, "w", refused);
            assert_eq!((probed.ret, probed.errno), (-1, libc::EFAULT), "{what}");
        }
        assert_eq!(load(&mut a, "w", 0), 0x5a5a);
        for (what, works) in [
            ("private futex", Probe::FutexWake { private: true }),
            (
                "write(2) from the region",
                Probe::Pwrite {
                    path: path(),
                    len: 4096,
                },
            ),
            (
                "read(2) into the region",
                Probe::Pread {
                    path: path(),
                    len: 4096,
                },
            ),
        ] {
            let probed = probe(&mut a, "w", works);
            assert!(probed.ret >= 0, "{what}: {probed:?}");
        }
        let moved = probe(&mut a, "w", Probe::MovePages);
        // The status of the page is a negative errno, or the call itself fails.
        let status = moved.extra.to_le_bytes();
        let status = i32::from_le_bytes([status[0], status[1], status[2], status[3]]);
        assert!(status < 0 || moved.ret < 0, "{moved:?}");
        assert_quiet(&mut a);
    }
}

#[test]
fn kernel_does_not_write_through_a_read_only_attachment() {
    for pool in pools() {
        let mut a = attached(&pool);
        a.agent.write_file("/tmp/f", &[0x11; 4096]).unwrap();
        for (what, write) in [
            (
                "read(2)",
                Probe::Pread {
                    path: "/tmp/f".to_owned(),
                    len: 4096,
                },
            ),
            (
                "O_DIRECT",
                Probe::ODirectRead {
                    path: "/dev/ram0".to_owned(),
                    len: 4096,
                },
            ),
            ("process_vm_writev", Probe::VmWrite { len: 8 }),
        ] {
            let probed = probe(&mut a, "ro", write);
            assert_eq!((probed.ret, probed.errno), (-1, libc::EFAULT), "{what}");
            assert_eq!(load(&mut a, "w", 0), 0x5a5a, "{what}");
        }
        assert_quiet(&mut a);
    }
}

#[test]
fn page_table_walkers_see_a_hole_and_change_nothing() {
    for pool in pools() {
        let mut a = attached(&pool);
        for advice in [
            libc::MADV_COLD,
            libc::MADV_PAGEOUT,
            libc::MADV_FREE,
            libc::MADV_DONTNEED,
            libc::MADV_WILLNEED,
            libc::MADV_HUGEPAGE,
            libc::MADV_COLLAPSE,
            libc::MADV_MERGEABLE,
            libc::MADV_POPULATE_READ,
        ] {
            // Some are refused and some do nothing; none may harm.
            probe(&mut a, "w", Probe::Madvise { len: MIB, advice });
            assert_eq!(load(&mut a, "w", 0), 0x5a5a, "madvise {advice}");
        }
        probe(&mut a, "w", Probe::Mincore);
        probe(&mut a, "w", Probe::Mbind { len: PAGE });
        probe(&mut a, "w", Probe::Mlock { len: PAGE });
        let pid = a.agent.groups().unwrap()[0].pids[0];
        for file in ["smaps", "maps", "pagemap"] {
            // The pagemap is huge; the first bytes are as good as any.
            let path = format!("/proc/{pid}/{file}");
            let _ = a.agent.read_piece(&path, 0, u32::MAX);
        }
        for value in ["1", "2", "3", "4"] {
            a.agent
                .write_file(&format!("/proc/{pid}/clear_refs"), value.as_bytes())
                .unwrap();
        }
        a.agent
            .write_file("/proc/sys/vm/compact_memory", b"1")
            .unwrap();
        assert_eq!(load(&mut a, "w", 0), 0x5a5a);
        assert_quiet(&mut a);
    }
}

#[test]
fn processes_that_come_and_go_leave_no_trace() {
    let pool = Pool::new();
    let mut a = attached(&pool);
    for round in 0..5 {
        let name = format!("g{round}");
        a.agent
            .start_group(&name, 4, Some(Map::attach("pool/r")))
            .unwrap();
        let touch = MemOp::Touch {
            len: LEN,
            stride: PAGE,
            write: true,
        };
        a.agent.run_all(&name, at(0, touch)).unwrap();
        if round % 2 == 0 {
            a.agent.kill_group(&name, None).unwrap();
        } else {
            a.agent.stop_group(&name).unwrap();
        }
    }
    a.agent.stop_group("w").unwrap();
    a.agent.stop_group("ro").unwrap();
    let id = pool.admin.lookup(b"r").unwrap().id;
    eventually("the guest has detached", || {
        pool.admin.stat(id).unwrap().attached.is_empty()
    });
    assert_quiet(&mut a);
}
