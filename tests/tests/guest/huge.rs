//! Regions whose entries map 2 MiB: shared, split by a change of less than that,
//! and put together again.

use mshare_protocol::agent::{Map, MemOp, Op, Spin, SpinKind, Value};
use mshare_protocol::entry::Prot;
use mshare_tests::guests::{Guest, Images};
use mshare_tests::lab::set_shmem_enabled;
use vmm::doctor::{SHMEM_ENABLED, meminfo};

use crate::common::*;

const LEN: u64 = 64 * MIB;

fn huge() -> Pool {
    Pool::huge(Images::from_env().unwrap())
}

/// Two guests; A has created `pool/r`, a process of each is attached.
fn pair(pool: &Pool, policy: &str) -> [Guest; 2] {
    let mut a = pool.guest("a", "rw");
    let mut b = pool.guest("b", policy);
    a.agent
        .start_group("w", 1, Some(Map::create("pool/r", START, LEN)))
        .unwrap();
    b.agent
        .start_group("w", 2, Some(Map::attach("pool/r")))
        .unwrap();
    [a, b]
}

/// PTE pages of the region.
fn splits(pool: &Pool) -> u64 {
    let id = pool.admin.lookup(b"r").unwrap().id;
    pool.admin.stat(id).unwrap().table_bytes / PAGE - 1
}

fn verify(guest: &mut Guest, offset: u64, len: u64, seed: u64) {
    let verify = at(offset, MemOp::Verify { len, seed });
    let value = guest.agent.run_one("w", 0, verify).unwrap();
    assert!(
        matches!(value, Value::Verified(v) if v.bad == 0 && v.words == len / 8),
        "{value:?}"
    );
}

fn stopped(guest: &mut Guest, worker: u32) -> Spin {
    match guest.agent.run_one("w", worker, Op::SpinStop).unwrap() {
        Value::Spin(spin) => spin,
        other => panic!("{other:?}"),
    }
}

#[test]
fn one_page_of_tables_serves_all_and_splits_where_pages_differ() {
    for policy in ["rw", "private"] {
        let pool = huge();
        let [mut a, mut b] = pair(&pool, policy);
        a.agent
            .run_all("w", at(0, MemOp::Fill { len: 0, seed: 1 }))
            .unwrap();
        verify(&mut b, 0, LEN, 1);
        assert_eq!(splits(&pool), 0);

        let page = 6 * MIB + 7 * PAGE;
        protect(&mut a, "pool/r", page, PAGE, 1);
        assert_eq!(splits(&pool), 1);
        for guest in [&mut a, &mut b] {
            assert_eq!(try_access(guest, "w", page, true), Some(libc::SIGSEGV));
            assert_eq!(try_access(guest, "w", page, false), None);
            assert_eq!(try_access(guest, "w", page - PAGE, true), None);
            assert_eq!(try_access(guest, "w", page + PAGE, true), None);
        }
        // All of it, and back: first the one that is split, then all.
        for (prot, write) in [(1, Some(libc::SIGSEGV)), (3, None)] {
            protect(&mut a, "pool/r", 0, LEN, prot);
            assert_eq!(splits(&pool), 0);
            for offset in [0, page, LEN - 8] {
                assert_eq!(try_access(&mut b, "w", offset, true), write, "{prot}");
            }
        }
        protect(&mut a, "pool/r", 8 * MIB, 2 * MIB, 0);
        assert_eq!(
            try_access(&mut b, "w", 9 * MIB, false),
            Some(libc::SIGSEGV),
            "{policy}"
        );
        protect(&mut a, "pool/r", 8 * MIB, 2 * MIB, 3);

        discard(&mut b, "pool/r", 12 * MIB + PAGE, PAGE);
        assert_eq!(load(&mut a, "w", 12 * MIB + PAGE), 0);
        assert_eq!(splits(&pool), 0, "a discard changes no entry");
        verify(&mut a, 12 * MIB + 2 * PAGE, MIB, 1);
        verify(&mut b, 8 * MIB, 4 * MIB, 1);
        assert_quiet(&mut a);
        assert_quiet(&mut b);
    }
}

#[test]
fn writer_under_a_huge_entry_is_stopped_and_its_neighbour_goes_on() {
    let pool = huge();
    let [mut a, mut b] = pair(&pool, "rw");
    let neighbour = at(MIB, MemOp::Spin(SpinKind::Read));
    b.agent.run_one("w", 1, neighbour).unwrap();
    for round in 0..5 {
        let offset = round % 2 * 2 * MIB + 3 * PAGE;
        b.agent
            .run_one("w", 0, at(offset, MemOp::Spin(SpinKind::Write)))
            .unwrap();
        let before = pool.word("r", offset);
        eventually("B writes", || pool.word("r", offset) > before + 1000);

        protect(&mut a, "pool/r", offset, PAGE, 1);
        let at_return = pool.word("r", offset);
        std::thread::sleep(std::time::Duration::from_millis(50));

        assert_eq!(pool.word("r", offset), at_return, "round {round}");
        let fault = stopped(&mut b, 0).fault.map(|fault| fault.signal);
        assert_eq!(fault, Some(libc::SIGSEGV));
        protect(&mut a, "pool/r", offset / (2 * MIB) * 2 * MIB, 2 * MIB, 3);
        assert_eq!(splits(&pool), 0);
    }
    let spin = stopped(&mut b, 1);
    assert!(spin.fault.is_none() && spin.iterations > 0, "{spin:?}");
    assert_quiet(&mut b);
}

/// The data is asked for in huge pages, whatever the entries map; whether there
/// are any is up to the host. With them the second stage is small, too.
#[test]
fn data_is_backed_by_huge_pages_where_the_host_has_them() {
    for mode in ["never", "advise"] {
        set_shmem_enabled(mode).unwrap();
        for pool in [Pool::new(), huge()] {
            backed_by_huge_pages(&pool);
        }
    }
}

fn backed_by_huge_pages(pool: &Pool) {
    let modes = std::fs::read_to_string(SHMEM_ENABLED).unwrap();
    let expected = ["[advise]", "[always]", "[within_size]", "[force]"]
        .iter()
        .any(|mode| modes.contains(mode));
    let [mut a, _b] = pair(pool, "rw");
    let kib =
        |path: &str, key| meminfo(&std::fs::read_to_string(path).unwrap(), key).unwrap() >> 10;
    let second_stage = || kib("/proc/meminfo", "SecPageTables");
    let before = second_stage();
    a.agent
        .run_all("w", at(0, MemOp::Fill { len: 0, seed: 1 }))
        .unwrap();
    let grown = second_stage().saturating_sub(before);
    let smaps = format!("/proc/{}/smaps_rollup", a.process.pid());
    let mapped = kib(&smaps, "ShmemPmdMapped");
    println!(
        "{mapped} KiB of {} in huge pages, {grown} KiB of second-stage tables, {}",
        LEN >> 10,
        modes.trim()
    );
    assert_eq!(mapped == LEN >> 10, expected, "{modes}");
    // 8 bytes for each 4 KiB, or next to nothing.
    let small_pages = (LEN / PAGE * 8) >> 10;
    assert_eq!(grown < small_pages / 2, expected, "{grown} KiB, {modes}");

    // Less than 2 MiB of it goes, and only that.
    let id = pool.admin.lookup(b"r").unwrap().id;
    discard(&mut a, "pool/r", 2 * MIB + PAGE, PAGE);
    pool.admin.protect(id, 0, PAGE, Prot::Read).unwrap();
    assert_eq!(load(&mut a, "w", 2 * MIB + PAGE), 0);
    verify(&mut a, 2 * MIB + 2 * PAGE, 2 * MIB, 1);
    assert_quiet(&mut a);
}
