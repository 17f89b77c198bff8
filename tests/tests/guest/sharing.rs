//! Regions between guests that share tables.

use mshare_protocol::agent::{Map, MemOp, Op, Probe, RegionOp, SpinKind, Value};

use mshare_tests::guests::shootdowns;

use crate::common::*;

const LEN: u64 = 64 * MIB;

/// Two guests; A has created `pool/r`, a process of each is attached.
fn pair(pool: &Pool) -> [mshare_tests::guests::Guest; 2] {
    let mut a = pool.guest("a", "rw");
    let mut b = pool.guest("b", "rw");
    a.agent
        .start_group("w", 1, Some(Map::create("pool/r", START, LEN)))
        .unwrap();
    b.agent
        .start_group("w", 1, Some(Map::attach("pool/r")))
        .unwrap();
    [a, b]
}

#[test]
fn both_guests_see_one_memory_and_pay_for_no_tables() {
    let pool = Pool::new();
    let [mut a, mut b] = pair(&pool);
    a.agent
        .run_all("w", at(0, MemOp::Fill { len: 0, seed: 1 }))
        .unwrap();
    let verify = at(0, MemOp::Verify { len: 0, seed: 1 });
    let value = b.agent.run_one("w", 0, verify).unwrap();
    assert!(
        matches!(value, Value::Verified(v) if v.bad == 0 && v.words == LEN / 8),
        "{value:?}"
    );

    // One fault links the GiB; every page after it is there already.
    b.agent
        .start_group("fresh", 4, Some(Map::attach("pool/r")))
        .unwrap();
    let touch = MemOp::Touch {
        len: 0,
        stride: PAGE,
        write: true,
    };
    for value in b.agent.run_all("fresh", at(0, touch)).unwrap() {
        let Value::Touched(touched) = value else {
            panic!("{value:?}")
        };
        assert_eq!(touched.accesses, LEN / PAGE);
        assert!(touched.minflt <= 4, "{} faults", touched.minflt);
    }
    let figures = b.agent.figures().unwrap();
    for process in figures.processes.iter().filter(|p| p.group == "fresh") {
        // 64 MiB would take 32 PTE pages: 128 KiB.
        assert!(process.vm_pte_kib < 100, "{process:?}");
    }
    let region = pool.admin.lookup(b"r").unwrap();
    let stat = pool.admin.stat(region.id).unwrap();
    assert_eq!(stat.table_bytes, (1 + LEN / (2 * MIB)) * PAGE);
    assert_eq!(stat.attached, ["a", "b"]);
    assert_quiet(&mut a);
    assert_quiet(&mut b);
}

#[test]
fn attach_with_zero_address_and_length_takes_the_regions_own() {
    let pool = Pool::new();
    let [_a, mut b] = pair(&pool);
    let name = "pool/r".to_owned();
    let extent = b.agent.region(RegionOp::Extent { name }).unwrap();
    assert_eq!(
        extent,
        Value::Mapped {
            start: START,
            len: LEN
        }
    );
    let mapped = b
        .agent
        .start_group("m", 1, Some(Map::attach("pool/r")))
        .unwrap();
    assert!(
        matches!(mapped[0], Value::Mapped { start: START, .. }),
        "{mapped:?}"
    );
}

#[test]
fn beyond_the_length_is_sigbus_up_to_the_next_gib() {
    let pool = Pool::new();
    let [_a, mut b] = pair(&pool);
    assert_eq!(try_access(&mut b, "w", LEN - 8, true), None);
    assert_eq!(try_access(&mut b, "w", LEN, false), Some(libc::SIGBUS));
    assert_eq!(try_access(&mut b, "w", GIB - 8, false), Some(libc::SIGBUS));
}

#[test]
fn protect_stops_a_writer_in_the_other_guest_before_it_returns_and_without_an_interrupt() {
    let pool = Pool::new();
    let [mut a, mut b] = pair(&pool);
    for round in 0..5 {
        let offset = round * 2 * MIB + 3 * PAGE;
        b.agent
            .run_one("w", 0, at(offset, MemOp::Spin(SpinKind::Write)))
            .unwrap();
        eventually("B writes", || pool.word("r", offset) > 1000);
        let before = shootdowns(&mut b.agent).unwrap();

        protect(&mut a, "pool/r", offset, PAGE, 1);
        let at_return = pool.word("r", offset);
        std::thread::sleep(std::time::Duration::from_millis(50));

        assert_eq!(pool.word("r", offset), at_return, "round {round}");
        assert_eq!(shootdowns(&mut b.agent).unwrap(), before, "round {round}");
        let spin = b.agent.run_one("w", 0, Op::SpinStop).unwrap();
        let Value::Spin(spin) = spin else {
            panic!("{spin:?}")
        };
        assert_eq!(
            spin.fault.map(|f| f.signal),
            Some(libc::SIGSEGV),
            "{spin:?}"
        );
        assert_eq!(try_access(&mut b, "w", offset, false), None);
        assert_eq!(try_access(&mut b, "w", offset + PAGE, true), None);
    }
    assert_quiet(&mut b);
}

#[test]
fn protect_up_takes_effect_without_a_new_attach() {
    let pool = Pool::new();
    let [mut a, mut b] = pair(&pool);
    store(&mut a, "w", 0, 42);
    for (prot, read, write) in [
        (0, Some(libc::SIGSEGV), Some(libc::SIGSEGV)),
        (1, None, Some(libc::SIGSEGV)),
        (3, None, None),
    ] {
        protect(&mut a, "pool/r", 0, 4 * MIB, prot);
        for guest in [&mut a, &mut b] {
            assert_eq!(try_access(guest, "w", 2 * MIB, false), read, "prot {prot}");
            assert_eq!(try_access(guest, "w", 2 * MIB, true), write, "prot {prot}");
        }
    }
    assert_eq!(load(&mut b, "w", 0), 42, "contents outlive PROT_NONE");
}

#[test]
fn discard_reads_as_zero_everywhere_and_frees_memory() {
    let pool = Pool::new();
    let [mut a, mut b] = pair(&pool);
    a.agent
        .run_all("w", at(0, MemOp::Fill { len: 0, seed: 9 }))
        .unwrap();
    let id = pool.admin.lookup(b"r").unwrap().id;
    assert_eq!(pool.admin.stat(id).unwrap().resident, LEN);
    b.agent
        .run_one("w", 0, at(8 * MIB, MemOp::Spin(SpinKind::Read)))
        .unwrap();

    discard(&mut a, "pool/r", 8 * MIB, 8 * MIB);

    // The reader has a page again: of 2 MiB, where the host has such.
    assert!(pool.admin.stat(id).unwrap().resident <= LEN - 6 * MIB);
    eventually("the reader sees zero", || {
        let status = b.agent.run_one("w", 0, Op::SpinStatus).unwrap();
        matches!(status, Value::Spin(spin) if spin.last_value == 0)
    });
    b.agent.run_one("w", 0, Op::SpinStop).unwrap();
    for guest in [&mut a, &mut b] {
        let zero = at(8 * MIB, MemOp::VerifyZero { len: 8 * MIB });
        let value = guest.agent.run_one("w", 0, zero).unwrap();
        assert!(
            matches!(value, Value::Verified(v) if v.bad == 0),
            "{value:?}"
        );
    }
    // What was not discarded is as it was.
    let rest = at(
        16 * MIB,
        MemOp::Verify {
            len: 8 * MIB,
            seed: 9,
        },
    );
    let value = b.agent.run_one("w", 0, rest).unwrap();
    assert!(
        matches!(value, Value::Verified(v) if v.bad == 0),
        "{value:?}"
    );
}

#[test]
fn punch_hole_and_madv_remove_discard() {
    let pool = Pool::new();
    let [mut a, mut b] = pair(&pool);
    store(&mut a, "w", 0, 1);
    store(&mut a, "w", 4 * MIB, 2);
    let name = "pool/r".to_owned();
    b.agent
        .region(RegionOp::Punch {
            name,
            offset: 0,
            len: PAGE,
        })
        .unwrap();
    let remove = Probe::Madvise {
        len: PAGE,
        advice: libc::MADV_REMOVE,
    };
    let probed = b
        .agent
        .run_one("w", 0, at(4 * MIB, MemOp::Probe(remove)))
        .unwrap();
    assert!(
        matches!(probed, Value::Probe(p) if p.ret == 0),
        "{probed:?}"
    );
    assert_eq!(load(&mut a, "w", 0), 0);
    assert_eq!(load(&mut a, "w", 4 * MIB), 0);
}

#[test]
fn read_only_attach_is_held_by_hardware() {
    let pool = Pool::new();
    let [mut a, mut b] = pair(&pool);
    b.agent
        .start_group("ro", 1, Some(Map::attach_ro("pool/r")))
        .unwrap();
    store(&mut a, "w", 0, 5);
    assert_eq!(load(&mut b, "ro", 0), 5);
    assert_eq!(try_access(&mut b, "ro", 0, true), Some(libc::SIGSEGV));
    assert_eq!(try_access(&mut b, "w", 0, true), None);
    assert_eq!(load(&mut b, "ro", 0), 5);
}

#[test]
fn forked_child_inherits_the_attachment_and_exec_or_dontfork_drops_it() {
    let pool = Pool::new();
    let [mut a, mut b] = pair(&pool);
    store(&mut a, "w", 0, 77);
    let probe = |probe| at(0, MemOp::Probe(probe));
    let read = b.agent.run_one("w", 0, probe(Probe::ForkRead)).unwrap();
    assert!(
        matches!(read, Value::Probe(p) if p.ret == 0 && p.extra == 77),
        "{read:?}"
    );
    let write = probe(Probe::ForkWrite { value: 78 });
    b.agent.run_one("w", 0, write).unwrap();
    assert_eq!(load(&mut a, "w", 0), 78);
    // The child that execs has nothing mapped there any more.
    let segv = i64::from(128 + libc::SIGSEGV);
    let mut ret = |op| match b.agent.run_one("w", 0, probe(op)).unwrap() {
        Value::Probe(probed) => probed.ret,
        other => panic!("{other:?}"),
    };
    assert_eq!(ret(Probe::ForkExec), segv);
    // So has one whose parent did not want it to have it.
    let dont_fork = Probe::Madvise {
        len: GIB,
        advice: libc::MADV_DONTFORK,
    };
    assert_eq!(ret(dont_fork), 0);
    assert_eq!(ret(Probe::ForkRead), segv);
    assert_eq!(load(&mut b, "w", 0), 78, "the parent keeps it");
    assert_quiet(&mut b);
}

#[test]
fn munmap_stops_another_thread_before_it_returns() {
    let pool = Pool::new();
    let [_a, mut b] = pair(&pool);
    for round in 0..5 {
        let group = format!("m{round}");
        b.agent
            .start_group(&group, 1, Some(Map::attach("pool/r")))
            .unwrap();
        // A page that a flush of the region's first page would not cover.
        let spin = at(5 * PAGE, MemOp::Spin(SpinKind::Read));
        b.agent.run_one(&group, 0, spin).unwrap();
        let unmap = at(0, MemOp::Probe(Probe::Munmap { len: GIB }));
        let value = b.agent.run_one(&group, 0, unmap).unwrap();
        // One access may be in flight when the call returns.
        assert!(
            matches!(value, Value::Probe(p) if p.ret == 0 && p.extra <= 1),
            "{value:?}"
        );
        b.agent.stop_group(&group).unwrap();
    }
    assert_quiet(&mut b);
}

#[test]
fn creator_may_leave_first() {
    let pool = Pool::new();
    let [mut a, mut b] = pair(&pool);
    store(&mut a, "w", 0, 6);
    a.agent.kill_group("w", None).unwrap();
    eventually("A's guest has detached", || {
        let id = pool.admin.lookup(b"r").unwrap().id;
        pool.admin.stat(id).unwrap().attached == ["b"]
    });
    assert_eq!(load(&mut b, "w", 0), 6);
    // The name is still there for who comes later.
    a.agent
        .start_group("again", 1, Some(Map::attach("pool/r")))
        .unwrap();
    assert_eq!(load(&mut a, "again", 0), 6);
    assert_quiet(&mut a);
}

#[test]
fn killed_vmm_is_detached_and_its_peer_goes_on() {
    let pool = Pool::new();
    let [mut a, b] = pair(&pool);
    let mut b = b;
    b.agent
        .run_one("w", 0, at(0, MemOp::Spin(SpinKind::Write)))
        .unwrap();
    b.process.kill().unwrap();
    let id = pool.admin.lookup(b"r").unwrap().id;
    eventually("the broker has detached B", || {
        pool.admin.stat(id).unwrap().attached == ["a"]
    });
    store(&mut a, "w", PAGE, 3);
    assert_eq!(load(&mut a, "w", PAGE), 3);
    assert_quiet(&mut a);
}

#[test]
fn last_unlink_takes_name_and_memory_along() {
    let pool = Pool::new();
    let [mut a, mut b] = pair(&pool);
    store(&mut a, "w", 0, 1);
    let unlink = || {
        Op::Region(RegionOp::Unlink {
            name: "pool/r".to_owned(),
        })
    };
    a.agent.run_all("w", unlink()).unwrap();
    assert!(pool.admin.lookup(b"r").is_ok(), "B is still attached");
    assert_eq!(load(&mut b, "w", 0), 1);
    b.agent.run_all("w", unlink()).unwrap();
    assert!(pool.admin.lookup(b"r").is_err());
    eventually("the memory is free", || {
        let stat = pool.admin.pool_stat().unwrap();
        stat.resident == 0 && stat.table_bytes == 0 && stat.regions == 0
    });
}

#[test]
fn unlink_from_outside_leaves_attachments_until_the_last_detach() {
    let pool = Pool::new();
    let [mut a, mut b] = pair(&pool);
    store(&mut a, "w", 0, 1);
    let name = "pool/r".to_owned();
    a.agent.region(RegionOp::Unlink { name }).unwrap();
    assert!(pool.admin.lookup(b"r").is_err());
    assert_eq!(load(&mut b, "w", 0), 1, "attachments stay");
    // The name is free: another region may have it.
    b.agent.create("pool/r", START + 16 * GIB, 2 * MIB).unwrap();
    a.agent.stop_group("w").unwrap();
    b.agent.stop_group("w").unwrap();
    eventually("only the new region is left", || {
        pool.admin.pool_stat().unwrap().regions == 1
    });
}

#[test]
fn region_of_more_than_a_gib_has_a_link_for_each() {
    let config = mshare_pool::layout::PoolConfig::new(2 * GIB);
    let images = mshare_tests::guests::Images::from_env().unwrap();
    let pool = Pool::with(&config, images);
    let mut a = pool.guest("a", "rw");
    let mut b = pool.guest("b", "rw");
    let len = GIB + 4 * MIB;
    a.agent
        .start_group("w", 1, Some(Map::create("pool/big", START, len)))
        .unwrap();
    b.agent
        .start_group("w", 1, Some(Map::attach("pool/big")))
        .unwrap();
    store(&mut a, "w", GIB + 8, 21);
    assert_eq!(load(&mut b, "w", GIB + 8), 21);
    store(&mut b, "w", GIB - 8, 22);
    assert_eq!(load(&mut a, "w", GIB - 8), 22);
    assert_eq!(try_access(&mut b, "w", len, true), Some(libc::SIGBUS));
    // An edit across the border of two PMD pages.
    protect(&mut a, "pool/big", GIB - PAGE, 2 * PAGE, 1);
    for offset in [GIB - PAGE, GIB] {
        assert_eq!(try_access(&mut b, "w", offset, true), Some(libc::SIGSEGV));
    }
    assert_eq!(try_access(&mut b, "w", GIB + PAGE, true), None);
}
