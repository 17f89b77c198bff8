//! Shared tables and KVM, without any Linux in between: two guests of a few
//! instructions on tables that a real broker builds and edits.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kvm_ioctls::Kvm;
use mshare_pool::admin;
use mshare_pool::broker::Broker;
use mshare_pool::client::Client;
use mshare_pool::editor::Ablation;
use mshare_pool::layout::PoolConfig;
use mshare_pool::server::{Listener, Options, Server};
use mshare_protocol::broker::{Policy, Region, Role};
use mshare_protocol::entry::Prot;
use mshare_tests::tiny::{End, LINK_RO, LINK_RW, Program, REGION_VA, Running, TinyVm};
use vmm::vstate::memory::{Access, Mapping};

const PAGE: u64 = 4096;
const LEN: u64 = 8 << 20;
/// What one PMD entry maps.
const UNIT: u64 = 2 << 20;
const LIMIT: Duration = Duration::from_secs(20);
/// Rounds of a revocation test.
const ROUNDS: u64 = 30;
/// Rounds in which a revocation with an element missing must show a stale
/// access. On an idle machine nearly every round does; on a loaded one the
/// guests leave guest mode so often that most flushes happen by themselves.
const ABLATION_ROUNDS: u64 = 300;
/// Memslots of the region in a tiny guest; its RAM is slot 0.
const TABLES_SLOT: u32 = 1;
const DATA_SLOT: u32 = 2;

/// Which memslots of a region are `KVM_MEM_READONLY`. The mappings behind them
/// are writable all the same, so that nothing else holds a store back.
#[derive(Clone, Copy)]
struct Slots {
    tables_read_only: bool,
    data_read_only: bool,
}

const WRITABLE: Slots = Slots {
    tables_read_only: false,
    data_read_only: false,
};

struct Bench {
    client: Client,
    region: Region,
    _server: Server,
    _dir: tempfile::TempDir,
    kvm: Kvm,
}

/// A tiny guest and the mappings behind its slots.
struct Attached {
    // Before the mappings: the guest must be gone when they go.
    vm: TinyVm,
    tables: Mapping,
    data: Mapping,
}

impl Bench {
    fn new(ablation: Option<Ablation>) -> Self {
        Self::with(ablation, false)
    }

    fn with(ablation: Option<Ablation>, huge_pages: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("pool");
        let config = PoolConfig {
            ablation,
            huge_pages,
            ..PoolConfig::new(64 << 20)
        };
        let broker = Broker::new(&config).unwrap();
        let server =
            Server::start(Listener::bind(&socket).unwrap(), broker, Options::default()).unwrap();
        let role = Role::Guest {
            name: "tiny".to_owned(),
            policy: Policy::Rw,
        };
        let client = Client::connect(&socket, role, |_, _| {}).unwrap();
        let id = admin::create(&client, b"r", 0o600, REGION_VA, LEN)
            .unwrap()
            .id;
        let region = client.attach(id).unwrap();
        Self {
            client,
            region,
            _server: server,
            _dir: dir,
            kvm: Kvm::new().unwrap(),
        }
    }

    fn link_gpa(&self) -> u64 {
        self.client.geometry().window_gpa + self.region.table_off
    }

    fn data_gpa(&self) -> u64 {
        let geometry = self.client.geometry();
        geometry.window_gpa + geometry.data_off + self.region.data_off
    }

    fn guest(&self, link_bits: u64) -> Attached {
        self.guest_with(link_bits, WRITABLE)
    }

    fn guest_with(&self, link_bits: u64, slots: Slots) -> Attached {
        let files = self.client.files();
        let attached = Attached {
            vm: TinyVm::new(&self.kvm, self.link_gpa(), link_bits).unwrap(),
            tables: Mapping::new(
                files.tables(),
                self.region.table_off,
                self.region.table_len,
                Access::ReadWrite,
            )
            .unwrap(),
            data: Mapping::new(
                files.data(),
                self.region.data_off,
                self.region.len,
                Access::ReadWrite,
            )
            .unwrap(),
        };
        self.show(&attached, slots);
        attached
    }

    fn show(&self, to: &Attached, slots: Slots) {
        let (tables, data) = (to.tables.as_ptr(), to.data.as_ptr());
        // SAFETY: the mappings live as long as the guest (`Attached`).
        unsafe {
            to.vm
                .set_slot(
                    TABLES_SLOT,
                    self.link_gpa(),
                    tables,
                    self.region.table_len,
                    slots.tables_read_only,
                )
                .unwrap();
            to.vm
                .set_slot(
                    DATA_SLOT,
                    self.data_gpa(),
                    data,
                    self.region.len,
                    slots.data_read_only,
                )
                .unwrap();
        }
    }

    fn hide(&self, from: &Attached) {
        for (slot, gpa) in [(DATA_SLOT, self.data_gpa()), (TABLES_SLOT, self.link_gpa())] {
            // SAFETY: a length of zero removes the slot.
            unsafe {
                from.vm
                    .set_slot(slot, gpa, std::ptr::null_mut(), 0, false)
                    .unwrap();
            }
        }
    }

    fn protect(&self, offset: u64, len: u64, prot: Prot) {
        self.client
            .protect(self.region.id, offset, len, prot)
            .unwrap();
    }

    fn write_word(&self, offset: u64, word: u64) {
        admin::fill(
            &self.client,
            b"r",
            offset,
            &mut word.to_le_bytes().as_slice(),
        )
        .unwrap();
    }

    fn word(&self, offset: u64) -> u64 {
        let mut bytes = Vec::new();
        admin::read(&self.client, b"r", offset, 8, &mut bytes).unwrap();
        u64::from_le_bytes(bytes.try_into().unwrap())
    }
}

fn turning(running: &Running) {
    assert!(
        running.wait_iterations(1000, LIMIT),
        "the guest does not run"
    );
}

/// Ends the run of a guest that is still in its loop.
fn stop(guest: &mut Attached, running: Running) -> End {
    running.stop();
    guest.vm.finish(running).unwrap()
}

/// Takes all rights of a page away from spinning readers, again and again; the
/// rounds made, and those in which a guest read on after the call returned.
///
/// There are two readers, or one if an element is missing: on two CPUs the
/// broker then need not take a CPU from a reader, which would make it forget
/// what it has cached. With `huge` the page is under an entry of 2 MiB.
fn rounds_with_stale_reads(ablation: Option<Ablation>, huge: bool) -> (u64, u64) {
    let bench = Bench::with(ablation, huge);
    let readers = if ablation.is_some() { 1 } else { 2 };
    let mut guests: Vec<_> = (0..readers).map(|_| bench.guest(LINK_RW)).collect();
    let (mut rounds, mut stale) = (0, 0);
    while rounds < ROUNDS || (ablation.is_some() && stale == 0 && rounds < ABLATION_ROUNDS) {
        let round = rounds;
        rounds += 1;
        let offset = (round % 3) * UNIT + round * PAGE;
        let running: Vec<_> = guests
            .iter_mut()
            .map(|guest| guest.vm.start(Program::Read, offset).unwrap())
            .collect();
        running.iter().for_each(turning);
        let count = || running.iter().map(Running::iterations).collect::<Vec<_>>();

        bench.protect(offset, PAGE, Prot::None);
        let at_return = count();
        std::thread::sleep(Duration::from_millis(10));
        let later = count();

        // The loop counts after the load: one load that was done before the
        // call returned may be counted after it.
        let reads_on = |(later, at_return): (&u64, &u64)| *later > at_return + 1;
        stale += u64::from(later.iter().zip(&at_return).any(reads_on));
        for (guest, running) in guests.iter_mut().zip(running) {
            let end = stop(guest, running);
            if ablation.is_none() {
                let address = REGION_VA + offset;
                assert!(
                    matches!(end, End::Fault { address: at, .. } if at == address),
                    "round {round}: {end:?} instead of a fault at {address:#x}"
                );
            }
        }
        // All of it, so that an entry of 2 MiB comes back.
        bench.protect(offset & !(UNIT - 1), UNIT, Prot::ReadWrite);
    }
    (rounds, stale)
}

#[test]
fn revocation_leaves_no_stale_read_on_any_cpu() {
    assert_eq!(rounds_with_stale_reads(None, false), (ROUNDS, 0));
}

#[test]
fn without_the_punch_stale_reads_are_seen() {
    let (rounds, stale) = rounds_with_stale_reads(Some(Ablation::SkipPunch), false);
    println!("copy and publish without the punch: stale reads in {stale} of {rounds} rounds");
    assert!(stale > 0, "the punch makes no difference here");
}

#[test]
fn edit_in_place_leaves_stale_reads() {
    let (rounds, stale) = rounds_with_stale_reads(Some(Ablation::EditInPlace), false);
    println!("edit in place: stale reads in {stale} of {rounds} rounds");
    assert!(stale > 0, "copy-publish-punch makes no difference here");
}

#[test]
fn revocation_under_a_huge_entry_leaves_no_stale_read() {
    assert_eq!(rounds_with_stale_reads(None, true), (ROUNDS, 0));
}

#[test]
fn huge_entry_that_is_changed_in_place_leaves_stale_reads() {
    let (rounds, stale) = rounds_with_stale_reads(Some(Ablation::SkipPunch), true);
    println!("2 MiB entry, PMD page not punched: stale reads in {stale} of {rounds} rounds");
    assert!(
        stale > 0,
        "the punch of the PMD page makes no difference here"
    );
}

/// What is beside the page whose rights change, under the same PMD page, may
/// find no entry for a moment; whoever tries again finds it, with its rights.
#[test]
fn neighbours_of_a_split_lose_nothing() {
    let bench = Bench::with(None, true);
    bench.write_word(UNIT - PAGE, 3);
    let mut guest = bench.guest(LINK_RW);
    let mut gaps = 0;
    for round in 0..ROUNDS {
        let reader = guest.vm.start(Program::Read, UNIT - PAGE).unwrap();
        turning(&reader);
        bench.protect(round % 3 * UNIT, PAGE, Prot::None);
        bench.protect(round % 3 * UNIT, UNIT, Prot::ReadWrite);
        reader.stop();
        match guest.vm.finish(reader).unwrap() {
            End::Stopped => {}
            // Not present, read: it came while the page was being written.
            End::Fault { code, .. } if code & 3 == 0 => gaps += 1,
            end => panic!("round {round}: {end:?}"),
        }
        let again = guest.vm.start(Program::Read, UNIT - PAGE).unwrap();
        turning(&again);
        assert_eq!(again.last(), 3);
        assert_eq!(stop(&mut guest, again), End::Stopped);
    }
    println!("{gaps} gaps in {ROUNDS} rounds");
}

#[test]
fn two_guests_walk_one_set_of_tables() {
    let bench = Bench::new(None);
    let (mut a, mut b) = (bench.guest(LINK_RW), bench.guest(LINK_RW));
    let writer = a.vm.start(Program::Write, PAGE).unwrap();
    let reader = b.vm.start(Program::Read, PAGE).unwrap();
    turning(&writer);
    let seen = reader.last();
    turning(&writer);
    turning(&reader);
    assert!(reader.last() > seen, "the reader does not see the writer");
    assert_eq!(stop(&mut a, writer), End::Stopped);
    assert_eq!(stop(&mut b, reader), End::Stopped);
}

#[test]
fn read_only_protection_stops_the_writer_and_not_the_reader() {
    let bench = Bench::new(None);
    let (mut a, mut b) = (bench.guest(LINK_RW), bench.guest(LINK_RW));
    let writer = a.vm.start(Program::Write, 0).unwrap();
    let reader = b.vm.start(Program::Read, 0).unwrap();
    turning(&writer);
    turning(&reader);

    bench.protect(0, PAGE, Prot::Read);
    let at_return = bench.word(0);
    turning(&reader);

    assert_eq!(bench.word(0), at_return, "a write landed after the call");
    let end = a.vm.finish(writer).unwrap();
    // Error code: present, write.
    assert!(
        matches!(end, End::Fault { address: REGION_VA, code } if code & 3 == 3),
        "{end:?}"
    );
    assert_eq!(reader.last(), at_return);
    assert_eq!(stop(&mut b, reader), End::Stopped);
}

#[test]
fn discard_reads_as_zero_in_a_running_guest() {
    let bench = Bench::new(None);
    bench.write_word(3 * PAGE, 77);
    let mut a = bench.guest(LINK_RW);
    let reader = a.vm.start(Program::Read, 3 * PAGE).unwrap();
    turning(&reader);
    assert_eq!(reader.last(), 77);

    bench
        .client
        .discard(bench.region.id, 3 * PAGE, PAGE)
        .unwrap();
    // The load after the one in flight.
    assert!(reader.wait_iterations(2, LIMIT));

    assert_eq!(reader.last(), 0);
    assert_eq!(stop(&mut a, reader), End::Stopped);
}

#[test]
fn added_right_is_seen_without_any_flush() {
    let bench = Bench::new(None);
    bench.protect(0, PAGE, Prot::Read);
    let mut a = bench.guest(LINK_RW);
    let refused = a.vm.start(Program::Write, 0).unwrap();
    assert!(matches!(a.vm.finish(refused).unwrap(), End::Fault { .. }));

    bench.protect(0, PAGE, Prot::ReadWrite);

    let writer = a.vm.start(Program::Write, 0).unwrap();
    turning(&writer);
    assert_eq!(stop(&mut a, writer), End::Stopped);
}

#[test]
fn read_only_link_refuses_writes_and_a_writable_one_lets_them_through() {
    let bench = Bench::new(None);
    let mut reader = bench.guest(LINK_RO);
    let run = reader.vm.start(Program::Write, 0).unwrap();
    let end = reader.vm.finish(run).unwrap();
    assert!(
        matches!(end, End::Fault { code, .. } if code & 3 == 3),
        "{end:?}"
    );
    assert_eq!(bench.word(0), 0);

    // Without the missing RW bit nothing else holds the write back.
    let mut writer = bench.guest(LINK_RW);
    let run = writer.vm.start(Program::Write, 0).unwrap();
    turning(&run);
    assert_eq!(stop(&mut writer, run), End::Stopped);
    assert_ne!(bench.word(0), 0);
}

#[test]
fn read_only_data_slot_refuses_writes_and_a_writable_one_lets_them_through() {
    let bench = Bench::new(None);
    bench.write_word(0, u64::MAX);
    let read_only = Slots {
        data_read_only: true,
        ..WRITABLE
    };
    let mut guest = bench.guest_with(LINK_RW, read_only);
    let reader = guest.vm.start(Program::Read, 0).unwrap();
    turning(&reader);
    assert_eq!(reader.last(), u64::MAX);
    assert_eq!(stop(&mut guest, reader), End::Stopped);
    let run = guest.vm.start(Program::Write, 0).unwrap();
    let end = guest.vm.finish(run).unwrap();
    let (gpa, write) = (bench.data_gpa(), true);
    assert_eq!(end, End::Mmio { gpa, write });
    assert_eq!(bench.word(0), u64::MAX);

    let mut writer = bench.guest(LINK_RW);
    let run = writer.vm.start(Program::Write, 0).unwrap();
    turning(&run);
    assert_eq!(stop(&mut writer, run), End::Stopped);
    assert_ne!(bench.word(0), u64::MAX);
}

#[test]
fn read_only_table_slot_refuses_a_store_into_the_tables_and_a_writable_one_does_not() {
    let bench = Bench::new(None);
    // The last entry of the PMD page: nothing is behind it.
    let at = PAGE - 8;
    let gpa = bench.link_gpa() + at;
    let entry = |guest: &Attached| {
        let entry = guest.tables.as_ptr().wrapping_add(at.try_into().unwrap());
        // SAFETY: aligned, inside the mapping, and only reached by atomics here.
        let entry = unsafe { AtomicU64::from_ptr(entry.cast()) };
        entry.load(Ordering::Acquire)
    };
    let read_only = Slots {
        tables_read_only: true,
        ..WRITABLE
    };
    let mut guest = bench.guest_with(LINK_RW, read_only);
    let before = entry(&guest);
    let offset = guest.vm.map_directly(gpa);
    let reader = guest.vm.start(Program::Read, offset).unwrap();
    turning(&reader);
    assert_eq!(reader.last(), before);
    assert_eq!(stop(&mut guest, reader), End::Stopped);
    let run = guest.vm.start(Program::Write, offset).unwrap();
    let end = guest.vm.finish(run).unwrap();
    assert_eq!(end, End::Mmio { gpa, write: true });
    assert_eq!(entry(&guest), before);

    let mut writer = bench.guest(LINK_RW);
    let offset = writer.vm.map_directly(gpa);
    let run = writer.vm.start(Program::Write, offset).unwrap();
    turning(&run);
    assert_eq!(stop(&mut writer, run), End::Stopped);
    assert_ne!(entry(&writer), before);
}

#[test]
fn region_appears_with_its_memslots_and_goes_with_them() {
    let bench = Bench::new(None);
    bench.write_word(0, 5);
    let mut a = bench.guest(LINK_RW);
    let reader = a.vm.start(Program::Read, 0).unwrap();
    turning(&reader);
    assert_eq!(reader.last(), 5);

    bench.hide(&a);
    let at_return = reader.iterations();
    std::thread::sleep(Duration::from_millis(5));
    assert!(
        reader.iterations() <= at_return + 1,
        "the guest still reaches the region"
    );
    let end = stop(&mut a, reader);
    assert_ne!(end, End::Stopped, "the load did not fail");

    bench.show(&a, WRITABLE);
    let reader = a.vm.start(Program::Read, 0).unwrap();
    turning(&reader);
    assert_eq!(reader.last(), 5);
    assert_eq!(stop(&mut a, reader), End::Stopped);
}

/// A VMM takes the memslots away before it tells the broker that it is detached: a
/// guest whose slots stay reads what the next owner of the memory has written.
#[test]
fn memory_with_a_new_owner_is_out_of_reach_unless_the_slots_have_stayed() {
    const NEXT: u64 = 0x5ec3e7;
    for removed in [true, false] {
        let bench = Bench::new(None);
        let mut a = bench.guest(LINK_RW);
        if removed {
            bench.hide(&a);
        }
        bench.client.detach(bench.region.id).unwrap();
        admin::remove(&bench.client, b"r").unwrap();
        let next = admin::create(&bench.client, b"next", 0o600, REGION_VA, LEN).unwrap();
        let next = bench.client.attach(next.id).unwrap();
        assert_eq!(
            (next.table_off, next.data_off),
            (bench.region.table_off, bench.region.data_off),
            "the memory is not given away again, so that this shows nothing"
        );
        let secret = NEXT.to_le_bytes();
        admin::fill(&bench.client, b"next", 0, &mut secret.as_slice()).unwrap();

        let reader = a.vm.start(Program::Read, 0).unwrap();
        if removed {
            let end = a.vm.finish(reader).unwrap();
            assert!(
                matches!(end, End::Fault { .. } | End::Mmio { .. } | End::Other(_)),
                "{end:?}"
            );
        } else {
            turning(&reader);
            assert_eq!(reader.last(), NEXT);
            assert_eq!(stop(&mut a, reader), End::Stopped);
        }
    }
}

#[test]
fn regions_that_are_not_attached_are_out_of_reach() {
    let bench = Bench::new(None);
    let a = bench.guest(LINK_RW);
    bench.hide(&a);
    let mut a = a;
    let reader = a.vm.start(Program::Read, 0).unwrap();
    let end = a.vm.finish(reader).unwrap();
    assert!(
        matches!(end, End::Fault { .. } | End::Mmio { .. } | End::Other(_)),
        "{end:?}"
    );
}
