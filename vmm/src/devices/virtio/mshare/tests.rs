//! The device with a real broker, real memslots and a driver that writes
//! whatever it likes.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;
use mshare_pool::admin;
use mshare_pool::broker::Broker;
use mshare_pool::client::Client;
use mshare_pool::layout::PoolConfig;
use mshare_pool::server::{Listener, Options, Server};
use mshare_protocol::broker::Policy;
use mshare_protocol::device::*;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::attachment::{AttachError, Attachment};
use super::state::Shared;
use super::{Error, Mshare};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::test_utils::*;
use crate::exit::{Exit, GuestExit};
use crate::vstate::vm::Vm;

const START: u64 = 0x1000_0000_0000;
const LEN: u64 = 4 << 20;
const REQ: u64 = BUF;
const RESP: u64 = BUF + 0x1000;

fn len_of<T>() -> u32 {
    u32::try_from(size_of::<T>()).unwrap()
}

struct Pool {
    admin: Client,
    socket: PathBuf,
    vm: Arc<Vm>,
    exit: Exit,
    server: Option<Server>,
    _dir: tempfile::TempDir,
}

impl Pool {
    fn new() -> Self {
        Self::with(&PoolConfig::new(64 << 20))
    }

    fn with(config: &PoolConfig) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("pool");
        let broker = Broker::new(config).unwrap();
        let listener = Listener::bind(&socket).unwrap();
        let server = Server::start(listener, broker, Options::default()).unwrap();
        // Memslots are real: this needs /dev/kvm, but runs no guest.
        let vm = Arc::new(Vm::new(&Kvm::new().unwrap()).unwrap());
        Self {
            admin: admin::connect(&socket).unwrap(),
            socket,
            vm,
            exit: Exit::new().unwrap(),
            server: Some(server),
            _dir: dir,
        }
    }

    fn join(&self, policy: Policy, tables: bool) -> Result<Mshare, Error> {
        Mshare::join(self.place(1 << 30, 48), &self.socket, policy, tables)
    }

    fn place(&self, ram_end: u64, phys_bits: u8) -> super::Guest<'static> {
        super::Guest {
            vm: Arc::clone(&self.vm),
            exit: self.exit.clone(),
            name: "g",
            ram_end,
            phys_bits,
        }
    }

    fn guest(&self, policy: Policy) -> Guest {
        let device = self.join(policy, true).unwrap();
        let mut guest = Guest::new(|_| device);
        guest.boot(0);
        guest
    }

    fn attached(&self, name: &[u8]) -> usize {
        admin::stat(&self.admin, name).unwrap().attached.len()
    }
}

fn request(kind: u32) -> virtio_mshare_req {
    let mut req = virtio_mshare_req::new_zeroed();
    req.r#type = kind.into();
    req
}

fn named(kind: u32, name: &[u8]) -> virtio_mshare_req {
    let mut req = request(kind);
    req.name[..name.len()].copy_from_slice(name);
    req.name_len = u32::try_from(name.len()).unwrap().into();
    req
}

fn about(kind: u32, id: u64) -> virtio_mshare_req {
    let mut req = request(kind);
    req.id = id.into();
    req
}

/// Waits for the device's threads.
fn used(guest: &mut Guest, queue: usize) -> (u32, u32) {
    let begun = Instant::now();
    loop {
        if let Some(used) = guest.queues[queue].pop_used() {
            return used;
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "no answer");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Makes a request with room for an answer of `back` bytes; returns how many the
/// device wrote.
fn exchange(guest: &mut Guest, req: &virtio_mshare_req, back: u32) -> u32 {
    guest
        .mem
        .write_slice(req.as_bytes(), GuestAddress(REQ))
        .unwrap();
    let out = len_of::<virtio_mshare_req>();
    guest.queues[0].push(&[(REQ, out, 0), (RESP, back, WRITE)]);
    guest.notify(0);
    used(guest, 0).1
}

fn call(guest: &mut Guest, req: &virtio_mshare_req) -> virtio_mshare_resp {
    let back = len_of::<virtio_mshare_resp>();
    assert_eq!(exchange(guest, req, back), back);
    let mut bytes = [0; size_of::<virtio_mshare_resp>()];
    guest
        .mem
        .read_slice(&mut bytes, GuestAddress(RESP))
        .unwrap();
    virtio_mshare_resp::read_from_bytes(&bytes).unwrap()
}

fn ok(guest: &mut Guest, req: &virtio_mshare_req) -> virtio_mshare_region {
    let resp = call(guest, req);
    assert_eq!(resp.status.get(), 0, "{req:?}");
    resp.region
}

/// Creates and sizes a region; its id.
fn region(guest: &mut Guest, name: &[u8]) -> u64 {
    let mut create = named(VIRTIO_MSHARE_T_CREATE, name);
    create.mode = 0o600.into();
    let id = ok(guest, &create).id.get();
    let mut size = about(VIRTIO_MSHARE_T_SIZE, id);
    (size.addr, size.len) = (START.into(), LEN.into());
    ok(guest, &size);
    id
}

#[test]
fn features_and_configuration_follow_policy_and_geometry() {
    let pool = Pool::new();
    let bits = |device: &Mshare| device.avail_features();
    assert_eq!(bits(&pool.join(Policy::Rw, true).unwrap()), 0b111);
    assert_eq!(bits(&pool.join(Policy::Ro, true).unwrap()), 0b011);
    assert_eq!(bits(&pool.join(Policy::Private, true).unwrap()), 0b100);
    assert_eq!(bits(&pool.join(Policy::PrivateRo, true).unwrap()), 0);
    let reduced = pool.join(Policy::Rw, false).unwrap();
    assert_eq!((bits(&reduced), reduced.policy()), (0b100, Policy::Private));

    let geometry = pool.admin.geometry();
    let mut bytes = [0; size_of::<virtio_mshare_config>()];
    reduced.read_config(0, &mut bytes);
    let config = virtio_mshare_config::read_from_bytes(&bytes).unwrap();
    assert_eq!(config.window_gpa.get(), geometry.window_gpa);
    assert_eq!(config.window_len.get(), geometry.window_len());
    assert_eq!(config.pool_uuid, geometry.uuid);
    let shm = reduced.shm_regions();
    assert_eq!(
        (shm[0].gpa, shm[0].len),
        (geometry.window_gpa, geometry.window_len())
    );
}

#[test]
fn window_out_of_reach_is_refused() {
    let pool = Pool::new();
    for (ram_end, phys_bits) in [(1 << 40, 48), (1 << 30, 36)] {
        let place = pool.place(ram_end, phys_bits);
        let error = Mshare::join(place, &pool.socket, Policy::Rw, true).unwrap_err();
        assert!(matches!(error, Error::Window { .. }), "{error}");
    }
}

#[test]
fn window_over_devices_is_refused() {
    let window = |window_gpa, size| PoolConfig {
        window_gpa,
        ..PoolConfig::new(size)
    };
    for (start, size) in [(0x8000_0000, 2 << 30), (0xc000_0000, 64 << 20)] {
        let pool = Pool::with(&window(start, size));
        let error = pool.join(Policy::Rw, true).unwrap_err();
        assert!(matches!(error, Error::Devices { .. }), "{error}");
        let said = error.to_string();
        for place in ["0xd0000000..0x100000000", "from 0x100000000 on"] {
            assert!(said.contains(place), "{said}");
        }
    }
    for start in [0x8000_0000, 1 << 32] {
        let beside = Pool::with(&window(start, 64 << 20));
        beside.join(Policy::Rw, true).unwrap();
    }
}

#[test]
fn attach_adds_two_memslots_and_detach_removes_them() {
    let pool = Pool::new();
    let mut guest = pool.guest(Policy::Rw);
    let id = region(&mut guest, b"r");
    assert_eq!(pool.vm.memslots(), 0);
    let seen = ok(&mut guest, &about(VIRTIO_MSHARE_T_ATTACH, id));
    assert_eq!(pool.vm.memslots(), 2);
    assert_eq!((seen.start.get(), seen.len.get()), (START, LEN));
    assert_eq!(
        seen.flags.get(),
        VIRTIO_MSHARE_R_SIZED | VIRTIO_MSHARE_R_TABLES
    );
    assert_eq!(pool.attached(b"r"), 1);
    let twice = call(&mut guest, &about(VIRTIO_MSHARE_T_ATTACH, id));
    assert_ne!(twice.status.get(), 0);
    assert_eq!(pool.vm.memslots(), 2);
    ok(&mut guest, &about(VIRTIO_MSHARE_T_DETACH, id));
    assert_eq!((pool.vm.memslots(), pool.attached(b"r")), (0, 0));
    let gone = call(&mut guest, &about(VIRTIO_MSHARE_T_DETACH, id));
    assert_eq!(gone.status.get(), libc::ENOTCONN.unsigned_abs());
}

#[test]
fn driver_that_does_not_understand_huge_pages_attaches_nothing() {
    let pool = Pool::with(&PoolConfig {
        huge_pages: true,
        ..PoolConfig::new(64 << 20)
    });
    let mut guest = pool.guest(Policy::Rw);
    let id = region(&mut guest, b"r");
    let refused = call(&mut guest, &about(VIRTIO_MSHARE_T_ATTACH, id));
    assert_eq!(refused.status.get(), libc::EOPNOTSUPP.unsigned_abs());
    assert_eq!((pool.vm.memslots(), pool.attached(b"r")), (0, 0));
    guest.write(0x70, 0);
    guest.boot(1 << VIRTIO_MSHARE_F_HUGE);
    ok(&mut guest, &about(VIRTIO_MSHARE_T_ATTACH, id));
    assert_eq!((pool.vm.memslots(), pool.attached(b"r")), (2, 1));
    // A pool of small pages does not offer the bit.
    let small = Pool::new();
    let device = small.join(Policy::Rw, true).unwrap();
    assert_eq!(device.avail_features() >> VIRTIO_MSHARE_F_HUGE & 1, 0);
}

#[test]
fn reset_detaches_everything_and_the_device_comes_back() {
    let pool = Pool::new();
    let mut guest = pool.guest(Policy::Rw);
    let id = region(&mut guest, b"r");
    ok(&mut guest, &about(VIRTIO_MSHARE_T_ATTACH, id));
    guest.write(0x70, 0);
    assert_eq!(pool.vm.memslots(), 0, "memslots go with the reset itself");
    guest.boot(0);
    ok(&mut guest, &about(VIRTIO_MSHARE_T_ATTACH, id));
    assert_eq!((pool.vm.memslots(), pool.attached(b"r")), (2, 1));
}

#[test]
fn end_of_the_device_detaches_at_the_broker() {
    let pool = Pool::new();
    let mut guest = pool.guest(Policy::Rw);
    let id = region(&mut guest, b"r");
    ok(&mut guest, &about(VIRTIO_MSHARE_T_ATTACH, id));
    drop(guest);
    let begun = Instant::now();
    while pool.attached(b"r") != 0 {
        assert!(begun.elapsed() < Duration::from_secs(10));
        thread::sleep(Duration::from_millis(1));
    }
}

/// A guest with one attached region, and the state of its device.
fn attached(pool: &Pool, policy: Policy) -> (Guest, Arc<Shared>, u64) {
    let device = pool.join(policy, true).unwrap();
    let shared = Arc::clone(&device.service.shared);
    let mut guest = Guest::new(|_| device);
    guest.boot(0);
    let id = region(&mut guest, b"r");
    ok(&mut guest, &about(VIRTIO_MSHARE_T_ATTACH, id));
    (guest, shared, id)
}

/// Makes the removal of the next memslot fail, as it does when the host's
/// kernel has no memory.
fn steal_a_memslot(pool: &Pool) {
    let slot = pool.vm.slot_ids()[0];
    pool.vm.remove_memslot(slot).unwrap();
}

fn vmm_failed(pool: &Pool) -> bool {
    matches!(pool.exit.reported(), Some(GuestExit::VmmFailed(why)) if why.contains("region"))
}

#[test]
fn region_whose_memslot_stays_is_not_detached_and_ends_the_run() {
    let pool = Pool::new();
    let (mut guest, _, id) = attached(&pool, Policy::Rw);
    steal_a_memslot(&pool);
    let refused = call(&mut guest, &about(VIRTIO_MSHARE_T_DETACH, id));
    assert_eq!(refused.status.get(), libc::EIO.unsigned_abs());
    assert!(vmm_failed(&pool), "{:?}", pool.exit.reported());
    // Nor by a reset.
    guest.write(0x70, 0);
    guest.boot(0);
    ok(&mut guest, &about(VIRTIO_MSHARE_T_STAT, id));
    assert_eq!(pool.attached(b"r"), 1, "the broker was told");
}

#[test]
fn revocation_waits_for_the_end_of_the_run_if_a_memslot_stays() {
    let pool = Pool::new();
    let (guest, shared, _) = attached(&pool, Policy::Rw);
    steal_a_memslot(&pool);
    let revoking = thread::spawn(move || shared.revoke_all());
    let begun = Instant::now();
    while !vmm_failed(&pool) {
        assert!(begun.elapsed() < Duration::from_secs(10));
        thread::sleep(Duration::from_millis(1));
    }
    assert!(!revoking.is_finished(), "the broker may use the memory");
    drop(guest);
    revoking.join().unwrap();
}

#[test]
fn revocation_during_an_attach_leaves_no_memslot() {
    let pool = Pool::new();
    let (mut guest, shared, id) = attached(&pool, Policy::Rw);
    ok(&mut guest, &about(VIRTIO_MSHARE_T_DETACH, id));
    let bells = Arc::clone(shared.lock().bells.as_ref().unwrap());
    let region = pool.admin.stat(id).unwrap();
    let revoking = Mutex::new(None);
    let show = || {
        let client = &pool.admin;
        let (files, geometry) = (client.files(), client.geometry());
        let shown = Attachment::new(&pool.vm, files, geometry, Policy::Rw, &region);
        let (shared, vm) = (Arc::clone(&shared), Arc::clone(&pool.vm));
        let (begun, begins) = std::sync::mpsc::channel();
        let thread = thread::spawn(move || {
            begun.send(()).unwrap();
            shared.revoke_all();
            vm.memslots()
        });
        begins.recv().unwrap();
        *revoking.lock().unwrap() = Some(thread);
        shown
    };
    shared.attach(id, &bells, 0, show).unwrap();
    let left = revoking.into_inner().unwrap().unwrap().join().unwrap();
    assert_eq!(left, 0, "memslots when the broker may use the memory");
    // What was asked before a revocation is not done after it.
    let late = shared.attach(id, &bells, 0, || panic!("memslots are added"));
    assert!(matches!(late, Err(AttachError::Overtaken { .. })));
}

#[test]
fn list_pages_through_the_directory() {
    let pool = Pool::new();
    for i in 0..10_u64 {
        let name = format!("region-{i}");
        admin::create(
            &pool.admin,
            name.as_bytes(),
            0o600,
            START + (i << 30),
            2 << 20,
        )
        .unwrap();
    }
    let mut guest = pool.guest(Policy::Ro);
    let mut from = 0;
    let mut names = Vec::new();
    loop {
        let req = about(VIRTIO_MSHARE_T_LIST, from);
        let back = len_of::<virtio_mshare_list>();
        assert_eq!(exchange(&mut guest, &req, back), back);
        let mut bytes = vec![0; size_of::<virtio_mshare_list>()];
        guest
            .mem
            .read_slice(&mut bytes, GuestAddress(RESP))
            .unwrap();
        let list = virtio_mshare_list::read_from_bytes(&bytes).unwrap();
        let count = usize::try_from(list.count.get()).unwrap();
        for entry in &list.entry[..count] {
            let len = usize::try_from(entry.name_len.get()).unwrap();
            names.push(String::from_utf8(entry.name[..len].to_vec()).unwrap());
            from = entry.id.get() + 1;
        }
        if count < VIRTIO_MSHARE_LIST_MAX {
            break;
        }
    }
    let all: Vec<_> = (0..10).map(|i| format!("region-{i}")).collect();
    assert_eq!(names, all);
}

#[test]
fn private_guest_is_told_and_its_acknowledgement_ends_the_wait() {
    let pool = Pool::new();
    let mut guest = pool.guest(Policy::Private);
    let id = region(&mut guest, b"r");
    ok(&mut guest, &about(VIRTIO_MSHARE_T_ATTACH, id));
    let asked = {
        let admin = admin::connect(&pool.socket).unwrap();
        thread::spawn(move || {
            let prot = mshare_protocol::entry::Prot::Read;
            admin.protect(id, 0, 4096, prot)
        })
    };
    let told = event(&mut guest);
    assert_eq!(told.r#type.get(), VIRTIO_MSHARE_E_INVALIDATE);
    assert_eq!(
        (told.id.get(), told.offset.get(), told.len.get()),
        (id, 0, 4096)
    );
    assert!(!asked.is_finished(), "nobody has acknowledged yet");
    guest
        .mem
        .write_obj(told.seq.get(), GuestAddress(RESP))
        .unwrap();
    guest.queues[2].push(&[(RESP, len_of::<virtio_mshare_ack>(), 0)]);
    guest.notify(2);
    assert_eq!(asked.join().unwrap(), Ok(()));
    assert_eq!(pool.vm.memslots(), 2);
}

#[test]
fn reset_acknowledges_what_the_driver_owes() {
    let pool = Pool::new();
    let (mut guest, shared, id) = attached(&pool, Policy::Private);
    let admin = admin::connect(&pool.socket).unwrap();
    let asked = thread::spawn(move || {
        let prot = mshare_protocol::entry::Prot::Read;
        admin.protect(id, 0, 4096, prot)
    });
    event(&mut guest);
    guest.write(0x70, 0);
    guest.boot(0);
    ok(&mut guest, &about(VIRTIO_MSHARE_T_ATTACH, id));
    assert_eq!(asked.join().unwrap(), Ok(()));
    assert_eq!(shared.lock().revocations, 0, "the guest was given up");
    assert_eq!(pool.vm.memslots(), 2);
}

/// Waits for the next event; buffers must be there.
fn event(guest: &mut Guest) -> virtio_mshare_event {
    let at = RESP + 0x1000;
    let len = len_of::<virtio_mshare_event>();
    guest.queues[1].push(&[(at, len, WRITE)]);
    guest.notify(1);
    assert_eq!(used(guest, 1).1, len);
    let bytes = guest.get(at, size_of::<virtio_mshare_event>());
    virtio_mshare_event::read_from_bytes(&bytes).unwrap()
}

/// A vCPU that makes one chain of a queue available again and again.
struct Refill {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Refill {
    fn start(guest: &Guest, index: usize, chain: Desc) -> Self {
        let queue = &guest.queues[index];
        queue.write_desc(queue.desc(), 0, chain);
        let (mem, avail, used) = (guest.mem.clone(), queue.avail() + 2, queue.used() + 2);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let used: u16 = mem.read_obj(GuestAddress(used)).unwrap();
                mem.write_obj(used.wrapping_add(QSIZE), GuestAddress(avail))
                    .unwrap();
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Refill {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

#[test]
fn guest_that_refills_its_queues_without_end_loses_its_memslots() {
    for (queue, chain) in [
        (1, (RESP, 4, WRITE, 0)), // too short for an event
        (2, (RESP, len_of::<virtio_mshare_ack>(), 0, 0)),
    ] {
        let pool = Pool::new();
        let mut guest = pool.guest(Policy::Private);
        let id = region(&mut guest, b"r");
        ok(&mut guest, &about(VIRTIO_MSHARE_T_ATTACH, id));
        let refill = Refill::start(&guest, queue, chain);
        guest.notify(u32::try_from(queue).unwrap());
        let admin = admin::connect(&pool.socket).unwrap();
        thread::spawn(move || {
            let prot = mshare_protocol::entry::Prot::Read;
            let _ = admin.protect(id, 0, 4096, prot);
        });
        let begun = Instant::now();
        while pool.vm.memslots() != 0 {
            assert!(begun.elapsed() < Duration::from_secs(10), "queue {queue}");
            thread::sleep(Duration::from_millis(1));
        }
        drop(refill);
    }
}

#[test]
fn memslots_go_while_a_queue_is_walked() {
    let pool = Pool::new();
    let (guest, shared, id) = attached(&pool, Policy::Private);
    // As long as a guest could keep a thread in a queue, with the best timing.
    let walking = shared.queues();
    let admin = admin::connect(&pool.socket).unwrap();
    let asked = thread::spawn(move || {
        let prot = mshare_protocol::entry::Prot::Read;
        admin.protect(id, 0, 4096, prot)
    });
    let begun = Instant::now();
    while pool.vm.memslots() != 0 {
        assert!(begun.elapsed() < Duration::from_secs(10));
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(asked.join().unwrap(), Ok(()));
    drop(walking);
    drop(guest);
}

#[test]
fn resets_while_the_broker_hangs_add_no_threads_and_no_descriptors() {
    let mut pool = Pool::new();
    let device = pool.join(Policy::Rw, true).unwrap();
    let shared = Arc::clone(&device.service.shared);
    let mut guest = Guest::new(|_| device);
    guest.boot(0);
    ok(&mut guest, &named(VIRTIO_MSHARE_T_CREATE, b"r"));
    drop(pool.server.take());
    let holders = Arc::strong_count(&shared);
    let mut activations = Vec::new();
    for _ in 0..20 {
        guest.write(0x70, 0);
        guest.boot(0);
        guest.put(REQ, about(VIRTIO_MSHARE_T_STAT, 1).as_bytes());
        let (out, back) = (
            len_of::<virtio_mshare_req>(),
            len_of::<virtio_mshare_resp>(),
        );
        guest.queues[0].push(&[(REQ, out, 0), (RESP, back, WRITE)]);
        guest.notify(0);
        activations.push(Arc::downgrade(shared.lock().bells.as_ref().unwrap()));
        let alive = activations.iter().filter(|a| a.strong_count() > 0).count();
        // Those of now, and those each of the two threads has not left yet.
        assert!(alive <= 3, "doorbells of {alive} activations are open");
        assert_eq!(Arc::strong_count(&shared), holders);
    }
    assert!(guest.queues[0].pop_used().is_none(), "nobody has answered");
}

#[test]
fn private_guest_that_stays_silent_loses_its_memslots() {
    let pool = Pool::new();
    let mut guest = pool.guest(Policy::Private);
    let id = region(&mut guest, b"r");
    ok(&mut guest, &about(VIRTIO_MSHARE_T_ATTACH, id));
    let prot = mshare_protocol::entry::Prot::Read;
    assert_eq!(pool.admin.protect(id, 0, 4096, prot), Ok(()));
    assert_eq!(
        pool.vm.memslots(),
        0,
        "the guest can still use what was revoked"
    );
    // Nothing that it did not take comes before this.
    let told = event(&mut guest);
    assert_eq!(
        (told.r#type.get(), told.id.get(), told.seq.get()),
        (VIRTIO_MSHARE_E_REVOKED, id, 0)
    );
    // It may attach again.
    ok(&mut guest, &about(VIRTIO_MSHARE_T_ATTACH, id));
}

#[test]
fn bad_chains_fail_by_themselves() {
    let pool = Pool::new();
    let mut guest = pool.guest(Policy::Rw);
    let (out, back) = (
        len_of::<virtio_mshare_req>(),
        len_of::<virtio_mshare_resp>(),
    );
    let unknown = request(99);
    guest
        .mem
        .write_slice(unknown.as_bytes(), GuestAddress(REQ))
        .unwrap();
    for chain in [
        vec![(REQ, out, 0)],                               // no room for an answer
        vec![(REQ, out, 0), (RESP, 4, WRITE)],             // not enough of it
        vec![(RESP, back, WRITE)],                         // no request
        vec![(REQ, 8, 0), (RESP, back, WRITE)],            // half of one
        vec![(u64::MAX - 4, out, 0), (RESP, back, WRITE)], // outside memory
        vec![(REQ, out, 0), (MEM - 4, back, WRITE)],
    ] {
        guest.queues[0].push(&chain);
        guest.notify(0);
        let (_, len) = used(&mut guest, 0);
        assert!(len == 0 || len == back, "{chain:?}");
    }
    assert_eq!(
        call(&mut guest, &unknown).status.get(),
        libc::EOPNOTSUPP.unsigned_abs()
    );
    assert!(!guest.needs_reset());
}

#[test]
fn broken_queue_is_told_of_once_and_not_looked_at_again() {
    let pool = Pool::new();
    let device = pool.join(Policy::Rw, true).unwrap();
    let shared = Arc::clone(&device.service.shared);
    let mut guest = Guest::new(|_| device);
    for round in 1..=20 {
        guest.write(0x70, 0);
        guest.boot(0);
        guest.interrupts();
        // All three queues rest once one is broken.
        let queue = round % 3;
        guest.queues[usize::try_from(queue).unwrap()].set_avail(0x8000);
        if queue == 1 {
            // The event queue is looked at when there is something to tell.
            guest.queues[2].set_avail(0x8000);
            guest.notify(2);
        }
        guest.notify(queue);
        let begun = Instant::now();
        while !guest.needs_reset() {
            assert!(begun.elapsed() < Duration::from_secs(10));
            thread::sleep(Duration::from_millis(1));
        }
        for _ in 0..5 {
            (0..3).for_each(|queue| guest.notify(queue));
            thread::sleep(Duration::from_millis(1));
        }
        let interrupts = guest.interrupts();
        assert!(interrupts <= 1, "{interrupts} interrupts for one mistake");
        let bells = Arc::clone(shared.lock().bells.as_ref().unwrap());
        let lines = bells.interrupt.complaints().lines();
        assert_eq!(lines, round.min(16), "warnings after {round} broken queues");
    }
}

#[test]
fn chain_that_loops_ends() {
    let pool = Pool::new();
    let mut guest = pool.guest(Policy::Rw);
    let desc = guest.queues[0].desc();
    guest.queues[0].write_desc(desc, 0, (REQ, 16, NEXT, 1));
    guest.queues[0].write_desc(desc, 1, (REQ, 16, NEXT, 0));
    guest.queues[0].offer(0);
    guest.notify(0);
    used(&mut guest, 0);
    assert!(!guest.needs_reset());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_request_gets_an_answer(kind in 0_u32..13, rest in prop::collection::vec(any::<u8>(), size_of::<virtio_mshare_req>() - 4)) {
        thread_local! {
            static POOL: Pool = Pool::new();
        }
        POOL.with(|pool| {
            let mut guest = pool.guest(Policy::Rw);
            let mut bytes = kind.to_le_bytes().to_vec();
            bytes.extend(&rest);
            let req = virtio_mshare_req::read_from_bytes(&bytes).unwrap();
            if kind == VIRTIO_MSHARE_T_LIST {
                let back = len_of::<virtio_mshare_list>();
                let len = exchange(&mut guest, &req, back);
                // A refusal is no longer than that of any other request.
                let refused = len_of::<virtio_mshare_resp>();
                prop_assert!(len == back || len == refused, "{}", len);
            } else {
                let status = call(&mut guest, &req).status.get();
                prop_assert!(status < 4096, "{status}");
            }
            prop_assert!(!guest.needs_reset());
            Ok(())
        })?;
    }

    #[test]
    fn any_queues_are_survived(ctrl in any_queue(), event in any_queue(), ack in any_queue()) {
        thread_local! {
            static POOL: Pool = Pool::new();
        }
        POOL.with(|pool| {
            let mut guest = pool.guest(Policy::Private);
            for (index, queue) in (0..).zip([&ctrl, &event, &ack]) {
                queue.offer_to(&mut guest, index);
            }
            // The threads have a moment to look before the driver starts again.
            thread::sleep(Duration::from_millis(2));
            guest.write(0x70, 0);
            guest.boot(0);
            let status = call(&mut guest, &request(99)).status.get();
            prop_assert_eq!(status, libc::EOPNOTSUPP.unsigned_abs());
            prop_assert!(!guest.needs_reset());
            Ok(())
        })?;
    }
}
