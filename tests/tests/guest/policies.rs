//! What each policy lets a guest do.

use std::os::unix::net::UnixStream;

use mshare_pool::{Policy, Request, Role};
use mshare_protocol::agent::{Map, MemOp, Op, RegionOp, SpinKind, Value};
use mshare_protocol::broker::{FromBroker, Hello, ToBroker, VERSION};
use mshare_protocol::frame;

use crate::common::*;

const LEN: u64 = 16 * MIB;

fn region_op(op: impl Fn(String) -> RegionOp) -> Op {
    Op::Region(op("pool/r".to_owned()))
}

fn protect_op(prot: u32) -> Op {
    region_op(|name| RegionOp::Protect {
        name,
        offset: 0,
        len: PAGE,
        prot,
    })
}

#[test]
fn private_guest_shares_data_and_follows_protection() {
    let pool = Pool::new();
    let mut a = pool.guest("a", "rw");
    let mut p = pool.guest("p", "private");
    a.agent
        .start_group("w", 1, Some(Map::create("pool/r", START, LEN)))
        .unwrap();
    p.agent
        .start_group("w", 2, Some(Map::attach("pool/r")))
        .unwrap();
    store(&mut a, "w", 0, 1);
    assert_eq!(load(&mut p, "w", 0), 1);
    store(&mut p, "w", 8, 2);
    assert_eq!(load(&mut a, "w", 8), 2);

    for (prot, read, write) in [
        (1, None, Some(libc::SIGSEGV)),
        (0, Some(libc::SIGSEGV), Some(libc::SIGSEGV)),
        (3, None, None),
    ] {
        protect(&mut a, "pool/r", 0, PAGE, prot);
        assert_eq!(try_access(&mut p, "w", 0, false), read, "prot {prot}");
        assert_eq!(try_access(&mut p, "w", 0, true), write, "prot {prot}");
    }
    discard(&mut a, "pool/r", 0, PAGE);
    assert_eq!(load(&mut p, "w", 0), 0);
    assert_eq!(try_access(&mut p, "w", LEN, false), Some(libc::SIGBUS));
    assert_quiet(&mut p);
}

#[test]
fn protect_stops_a_writer_in_a_private_guest_before_it_returns() {
    let pool = Pool::new();
    let mut a = pool.guest("a", "rw");
    let mut p = pool.guest("p", "private");
    a.agent
        .start_group("w", 1, Some(Map::create("pool/r", START, LEN)))
        .unwrap();
    p.agent
        .start_group("w", 1, Some(Map::attach("pool/r")))
        .unwrap();
    for round in 0..5 {
        let offset = round * 2 * MIB;
        let spin = at(offset, MemOp::Spin(SpinKind::Write));
        p.agent.run_one("w", 0, spin).unwrap();
        eventually("the guest writes", || pool.word("r", offset) > 1000);

        protect(&mut a, "pool/r", offset, PAGE, 1);
        let at_return = pool.word("r", offset);
        std::thread::sleep(std::time::Duration::from_millis(50));

        assert_eq!(pool.word("r", offset), at_return, "round {round}");
        let value = p.agent.run_one("w", 0, Op::SpinStop).unwrap();
        assert!(
            matches!(value, Value::Spin(s) if s.fault.is_some()),
            "{value:?}"
        );
    }
}

/// A client with private tables that hears what it has to give up and never
/// says that it has. It keeps its connection while the value lives.
fn silent_client(pool: &Pool, region: u64) -> UnixStream {
    let mut raw = UnixStream::connect(pool.socket()).unwrap();
    let role = Role::Guest {
        name: "silent".to_owned(),
        policy: Policy::Private,
    };
    let hello = Hello {
        version: VERSION,
        role,
        resume: None,
    };
    frame::send(&mut raw, &ToBroker::Hello(hello)).unwrap();
    let welcome: FromBroker = frame::receive(&mut raw).unwrap();
    assert!(matches!(welcome, FromBroker::Welcome(_)), "{welcome:?}");
    let request = Request::Attach { id: region };
    frame::send(&mut raw, &ToBroker::Request { tag: 1, request }).unwrap();
    let reply: FromBroker = frame::receive(&mut raw).unwrap();
    assert!(matches!(reply, FromBroker::Reply { result: Ok(_), .. }));
    raw
}

#[test]
fn protect_says_whom_it_could_not_stop() {
    let pool = Pool::new();
    let mut a = pool.guest("a", "rw");
    a.agent
        .start_group("w", 1, Some(Map::create("pool/r", START, LEN)))
        .unwrap();
    let region = pool.admin.lookup(b"r").unwrap();
    let silent = silent_client(&pool, region.id);
    assert_eq!(errno_of(&mut a, protect_op(1)), libc::ETIMEDOUT);
    // The right is gone all the same for those who walk the region's tables.
    assert_eq!(try_access(&mut a, "w", 0, true), Some(libc::SIGSEGV));
    drop(silent);
    assert_eq!(errno_of(&mut a, protect_op(1)), 0);
    assert_quiet(&mut a);
}

#[test]
fn private_guest_can_protect_itself_and_is_acknowledged() {
    // The guest that asks is also one that must acknowledge.
    let pool = Pool::new();
    let mut p = pool.guest("p", "private");
    p.agent
        .start_group("w", 2, Some(Map::create("pool/r", START, LEN)))
        .unwrap();
    store(&mut p, "w", 0, 3);
    protect(&mut p, "pool/r", 0, PAGE, 1);
    assert_eq!(try_access(&mut p, "w", 0, true), Some(libc::SIGSEGV));
    assert_eq!(load(&mut p, "w", 0), 3);
    assert_quiet(&mut p);
}

#[test]
fn ro_guest_reads_and_changes_nothing() {
    let pool = Pool::new();
    let mut a = pool.guest("a", "rw");
    a.agent
        .start_group("w", 1, Some(Map::create("pool/r", START, LEN)))
        .unwrap();
    store(&mut a, "w", 0, 7);
    for policy in ["ro", "private-ro"] {
        let mut r = pool.guest(policy, policy);
        let write = Op::Map {
            slot: 0,
            map: Map::attach("pool/r"),
        };
        assert_eq!(errno_of(&mut r, write), libc::EROFS, "{policy}");
        r.agent
            .start_group("r", 1, Some(Map::attach_ro("pool/r")))
            .unwrap();
        assert_eq!(load(&mut r, "r", 0), 7, "{policy}");
        assert_eq!(
            try_access(&mut r, "r", 0, true),
            Some(libc::SIGSEGV),
            "{policy}"
        );
        for (what, op) in [
            ("protect", protect_op(1)),
            (
                "discard",
                region_op(|name| RegionOp::Discard {
                    name,
                    offset: 0,
                    len: PAGE,
                }),
            ),
            ("unlink", region_op(|name| RegionOp::Unlink { name })),
            (
                "create",
                Op::Map {
                    slot: 0,
                    map: Map::create("pool/new", START + GIB, LEN),
                },
            ),
        ] {
            let errno = errno_of(&mut r, op);
            assert_eq!(errno, libc::EROFS, "{policy}: {what}");
        }
        assert_eq!(load(&mut a, "w", 0), 7);
        assert_quiet(&mut r);
    }
}

#[test]
fn guest_with_no_part_in_the_pool_has_no_pool() {
    let pool = Pool::new();
    let options = mshare_tests::guests::Options::new("n");
    let mut n = pool.start(&options);
    assert!(!n.agent.info().unwrap().pool);
    let map = Map::create("pool/r", START, LEN);
    assert_eq!(errno_of(&mut n, Op::Map { slot: 0, map }), libc::ENOENT);
}

#[test]
fn private_and_sharing_guests_live_in_one_pool() {
    let pool = Pool::new();
    let mut p = pool.guest("p", "private");
    let mut a = pool.guest("a", "rw");
    p.agent
        .start_group("w", 1, Some(Map::create("pool/r", START, LEN)))
        .unwrap();
    a.agent
        .start_group("w", 1, Some(Map::attach("pool/r")))
        .unwrap();
    p.agent
        .run_all("w", at(0, MemOp::Fill { len: LEN, seed: 5 }))
        .unwrap();
    let verify = at(0, MemOp::Verify { len: LEN, seed: 5 });
    let value = a.agent.run_one("w", 0, verify).unwrap();
    assert!(
        matches!(value, Value::Verified(v) if v.bad == 0),
        "{value:?}"
    );
    // The sharing guest has no tables for it, the private one 4 KiB per 2 MiB.
    let pte = |guest: &mut mshare_tests::guests::Guest| {
        guest.agent.figures().unwrap().processes[0].vm_pte_kib
    };
    assert!(pte(&mut p) > pte(&mut a) + LEN / (2 * MIB) * 4 - 8);
}
