//! Runs without one safety element of the guest's kernel: what the element
//! prevents must be seen. The switches are those of `images/kernel/ablation`.

use mshare_pool::layout::PoolConfig;
use mshare_protocol::agent::{Map, MemOp, Op, Probe, SpinKind, Value};
use mshare_protocol::entry::Prot;
use mshare_tests::guests::{Guest, Images, Options};

use crate::common::*;
use crate::removal;

const LEN: u64 = 16 * MIB;

/// What `mshare_ablate=` takes away.
#[derive(Clone, Copy, Debug)]
enum Without {
    Nothing = 0,
    DirectMap = 1 << 2,
    ReadOnlyLink = 1 << 5,
    ZapOnInvalidate = 1 << 6,
    ZapOnRemoval = 1 << 9,
    ForkCheck = 1 << 10,
    Retry = 1 << 15,
}

fn pool() -> Pool {
    let images = Images::ablation_from_env().unwrap();
    Pool::with(&PoolConfig::new(GIB), images)
}

fn guest(pool: &Pool, name: &str, policy: &str, without: Without) -> Guest {
    let options = Options::new(name)
        .pool(&pool.socket(), policy)
        .cmdline(&format!("mshare_ablate={}", without as u32));
    pool.start(&options)
}

/// A guest with one process, group `w`, that has made region `r`.
fn guest_with_worker(pool: &Pool, name: &str, policy: &str, without: Without) -> Guest {
    let mut guest = guest(pool, name, policy, without);
    let map = Map::create("pool/r", START, LEN);
    guest.agent.start_group("w", 1, Some(map)).unwrap();
    guest
}

fn write_through_read_only_attachment(without: Without) -> Option<i32> {
    let pool = pool();
    let mut a = guest(&pool, "a", "rw", without);
    a.agent.create("pool/r", START, LEN).unwrap();
    a.agent
        .start_group("ro", 1, Some(Map::attach_ro("pool/r")))
        .unwrap();
    // Makes the link; without it the kernel would look at the VMA and refuse.
    assert_eq!(load(&mut a, "ro", 0), 0);
    try_access(&mut a, "ro", 0, true)
}

#[test]
fn link_with_rw_lets_the_write_of_a_read_only_attachment_through() {
    let intact = write_through_read_only_attachment(Without::Nothing);
    assert_eq!(intact, Some(libc::SIGSEGV));
    assert_eq!(
        write_through_read_only_attachment(Without::ReadOnlyLink),
        None
    );
}

/// Whether a private guest still writes after its right was taken away.
fn private_guest_writes_on(without: Without) -> bool {
    let pool = pool();
    let mut p = guest_with_worker(&pool, "p", "private", without);
    let spin = at(0, MemOp::Spin(SpinKind::Write));
    p.agent.run_one("w", 0, spin).unwrap();
    eventually("the guest writes", || pool.word("r", 0) > 1000);
    let id = pool.admin.lookup(b"r").unwrap().id;
    pool.admin.protect(id, 0, PAGE, Prot::Read).unwrap();
    let at_return = pool.word("r", 0);
    std::thread::sleep(std::time::Duration::from_millis(200));
    let writes_on = pool.word("r", 0) != at_return;
    let value = p.agent.run_one("w", 0, Op::SpinStop).unwrap();
    assert!(
        matches!(value, Value::Spin(s) if s.fault.is_none() == writes_on),
        "{value:?}"
    );
    writes_on
}

#[test]
fn private_guest_that_ignores_invalidate_writes_on() {
    assert!(!private_guest_writes_on(Without::Nothing));
    assert!(private_guest_writes_on(Without::ZapOnInvalidate));
}

/// The signal of a process that reads a region when the device goes.
fn reader_when_the_device_goes(without: Without) -> Option<i32> {
    let pool = pool();
    // Private tables: with shared ones the CPU would soon look for the tables
    // themselves in a window that is gone.
    let mut p = guest_with_worker(&pool, "p", "private", without);
    let spin = at(0, MemOp::Spin(SpinKind::Read));
    p.agent.run_one("w", 0, spin).unwrap();
    let device = removal::device(&mut p);
    removal::tell_driver(&mut p, "unbind", &device);
    let value = p.agent.run_one("w", 0, Op::SpinStop).unwrap();
    let Value::Spin(spin) = value else {
        panic!("{value:?}")
    };
    spin.fault.map(|fault| fault.signal)
}

#[test]
fn mappings_that_removal_leaves_raise_no_signal() {
    let intact = reader_when_the_device_goes(Without::Nothing);
    assert_eq!(intact, Some(libc::SIGBUS));
    assert_eq!(reader_when_the_device_goes(Without::ZapOnRemoval), None);
}

/// Complaints of a kernel after an attempt to pin a page of a region.
fn complaints_about_pinning(without: Without) -> Vec<String> {
    let pool = pool();
    let mut a = guest_with_worker(&pool, "a", "rw", without);
    store(&mut a, "w", 0, 1);
    let direct = Probe::ODirectRead {
        path: "/dev/ram0".to_owned(),
        len: 4096,
    };
    // The worker may not survive it.
    let _ = a.agent.run("w", at(0, MemOp::Probe(direct)));
    a.agent.complaints().unwrap()
}

#[test]
fn tables_outside_the_direct_map_make_gup_fast_oops() {
    let intact = complaints_about_pinning(Without::Nothing);
    assert!(intact.is_empty(), "{intact:?}");
    assert!(!complaints_about_pinning(Without::DirectMap).is_empty());
}

/// Complaints of a kernel after a process with linked tables had a child.
fn complaints_about_a_child(without: Without) -> Vec<String> {
    let pool = pool();
    let mut a = guest_with_worker(&pool, "a", "rw", without);
    store(&mut a, "w", 0, 1);
    // The child may get what the parent has, or not survive.
    let _ = a.agent.run("w", at(0, MemOp::Probe(Probe::ForkRead)));
    a.agent.complaints().unwrap()
}

#[test]
fn fork_that_copies_linked_tables_leaks_the_copies() {
    let intact = complaints_about_a_child(Without::Nothing);
    assert!(intact.is_empty(), "{intact:?}");
    let leaked = complaints_about_a_child(Without::ForkCheck);
    assert!(
        leaked.iter().any(|line| line.contains("pgtables_bytes")),
        "{leaked:?}"
    );
}

/// The signal that a process gets that reads beside a page whose rights come
/// and go, under one entry of 2 MiB.
fn neighbour_of_a_split(without: Without) -> Option<i32> {
    let pool = Pool::huge(Images::ablation_from_env().unwrap());
    let mut a = guest_with_worker(&pool, "a", "rw", without);
    let spin = at(MIB, MemOp::Spin(SpinKind::Read));
    a.agent.run_one("w", 0, spin).unwrap();
    let id = pool.admin.lookup(b"r").unwrap().id;
    let protect = |len, prot| pool.admin.protect(id, 0, len, prot).unwrap();
    let begun = std::time::Instant::now();
    let mut fault = None;
    while fault.is_none() && begun.elapsed() < std::time::Duration::from_secs(20) {
        for _ in 0..50 {
            protect(PAGE, Prot::None);
            protect(2 * MIB, Prot::ReadWrite);
        }
        let status = a.agent.run_one("w", 0, Op::SpinStatus).unwrap();
        let Value::Spin(spin) = status else {
            panic!("{status:?}")
        };
        fault = spin.fault.map(|fault| fault.signal);
        if matches!(without, Without::Nothing) && begun.elapsed().as_secs() >= 2 {
            break;
        }
    }
    a.agent.run_one("w", 0, Op::SpinStop).unwrap();
    fault
}

#[test]
fn absent_entry_taken_for_a_lack_of_rights_kills_neighbours_of_a_split() {
    assert_eq!(neighbour_of_a_split(Without::Nothing), None);
    assert_eq!(neighbour_of_a_split(Without::Retry), Some(libc::SIGSEGV));
}
