//! Regions of one guest, beside a pool. What they promise inside the guest is
//! tried by the selftests of the kernel series; here is what guests are to them.

use mshare_protocol::agent::{INFO_POOL, INFO_TABLES, Map, MemOp, RegionOp, Value};

use crate::common::*;
use crate::errnos::{RW, mshare};

const LEN: u64 = 64 * MIB;

#[test]
fn a_region_of_one_guest_is_shared_by_its_processes_and_unknown_to_others() {
    let pool = Pool::new();
    let mut a = pool.guest("a", "rw");
    let mut b = pool.guest("b", "rw");
    a.agent
        .start_group("one", 1, Some(Map::create("cache", START, LEN)))
        .unwrap();
    a.agent
        .run_all("one", at(0, MemOp::Fill { len: 0, seed: 7 }))
        .unwrap();
    a.agent
        .start_group("more", 4, Some(Map::attach("cache")))
        .unwrap();
    // The creator leaves first.
    a.agent.stop_group("one").unwrap();
    for value in a
        .agent
        .run_all("more", at(0, MemOp::Verify { len: 0, seed: 7 }))
        .unwrap()
    {
        assert!(
            matches!(value, Value::Verified(seen) if seen.bad == 0 && seen.words == LEN / 8),
            "{value:?}"
        );
    }

    let name = "cache".to_owned();
    let info = a.agent.region(RegionOp::Info { name }).unwrap();
    let Value::RegionInfo(info) = info else {
        panic!("{info:?}")
    };
    assert_eq!((info.start, info.len, info.mappings), (START, LEN, 4));
    assert_eq!((info.resident, info.swapped, info.machines), (LEN, 0, 1));
    assert_eq!(info.flags & (INFO_POOL | INFO_TABLES), INFO_TABLES);
    // One PTE page for each 2 MiB, and what is above them.
    let pages = info.table_bytes / PAGE;
    assert!(
        (LEN / (2 * MIB)..LEN / (2 * MIB) + 8).contains(&pages),
        "{info:?}"
    );

    let attach = mshare("cache", 0, 0, RW);
    assert_eq!(errno_of(&mut b, attach), libc::ENOENT);
    assert_quiet(&mut a);
    assert_quiet(&mut b);
}

#[test]
fn a_local_region_and_one_of_the_pool_live_side_by_side() {
    let pool = Pool::new();
    let mut a = pool.guest("a", "rw");
    a.agent
        .start_group("pool", 2, Some(Map::create("pool/r", START, LEN)))
        .unwrap();
    a.agent
        .start_group("local", 2, Some(Map::create("r", START, LEN)))
        .unwrap();
    store(&mut a, "pool", 0, 1);
    store(&mut a, "local", 0, 2);
    assert_eq!(load(&mut a, "pool", 0), 1);
    assert_eq!(load(&mut a, "local", 0), 2);
    assert_eq!(pool.word("r", 0), 1);

    protect(&mut a, "r", 0, PAGE, 1);
    assert_eq!(try_access(&mut a, "local", 0, true), Some(libc::SIGSEGV));
    assert_eq!(try_access(&mut a, "pool", 0, true), None);
    discard(&mut a, "pool/r", 0, PAGE);
    assert_eq!(load(&mut a, "pool", 0), 0);
    assert_eq!(load(&mut a, "local", 0), 2);
    assert_quiet(&mut a);
}
