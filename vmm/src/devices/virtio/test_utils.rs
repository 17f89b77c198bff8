//! A driver for tests: it sets a device up through the transport's registers
//! and puts any descriptors it likes into the queues.

use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::{MmioTransport, VirtioDevice};
use crate::devices::EventLoop;
use crate::devices::bus::MmioDevice;

/// Bytes of each of the two ranges of guest memory: from 0 and from [`HIGH`].
pub const MEM: u64 = 0x80_0000;
/// Start of the second range, after a hole.
pub const HIGH: u64 = 0x100_0000;
/// Where tests may put their buffers.
pub const BUF: u64 = 0x20_0000;
/// Size of the queues.
pub const QSIZE: u16 = 16;

/// Descriptor flags (virtio 1.2, section 2.7.5).
pub const NEXT: u16 = 1 << 0;
pub const WRITE: u16 = 1 << 1;
pub const INDIRECT: u16 = 1 << 2;

/// A descriptor: address, length, flags, next.
pub type Desc = (u64, u32, u16, u16);

pub fn memory() -> GuestMemoryMmap {
    let len = usize::try_from(MEM).unwrap();
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), len), (GuestAddress(HIGH), len)]).unwrap()
}

/// The driver's side of one queue.
#[derive(Debug)]
pub struct TestQueue {
    mem: GuestMemoryMmap,
    base: u64,
    next_desc: u16,
    avail: u16,
    used: u16,
}

impl TestQueue {
    pub fn new(mem: &GuestMemoryMmap, index: u64) -> Self {
        let base = 0x1_0000 * (index + 1);
        mem.write_slice(&vec![0; 0x1_0000], GuestAddress(base))
            .unwrap();
        Self {
            mem: mem.clone(),
            base,
            next_desc: 0,
            avail: 0,
            used: 0,
        }
    }

    pub fn desc(&self) -> u64 {
        self.base
    }

    pub fn avail(&self) -> u64 {
        self.base + 0x1000
    }

    pub fn used(&self) -> u64 {
        self.base + 0x2000
    }

    /// Writes descriptor `index`, flags and all.
    pub fn write_desc(&self, table: u64, index: u16, desc: Desc) {
        let addr = table + 16 * u64::from(index);
        self.mem.write_obj(desc.0, GuestAddress(addr)).unwrap();
        self.mem.write_obj(desc.1, GuestAddress(addr + 8)).unwrap();
        self.mem.write_obj(desc.2, GuestAddress(addr + 12)).unwrap();
        self.mem.write_obj(desc.3, GuestAddress(addr + 14)).unwrap();
    }

    /// Offers the chain that starts at descriptor `head`.
    pub fn offer(&mut self, head: u16) {
        let slot = self.avail() + 4 + 2 * u64::from(self.avail % QSIZE);
        self.mem.write_obj(head, GuestAddress(slot)).unwrap();
        self.avail = self.avail.wrapping_add(1);
        self.set_avail(self.avail);
    }

    pub fn set_avail(&self, index: u16) {
        self.mem
            .write_obj(index, GuestAddress(self.avail() + 2))
            .unwrap();
    }

    /// Offers a chain of (address, length, flags); links are made here.
    pub fn push(&mut self, parts: &[(u64, u32, u16)]) -> u16 {
        let head = self.next_desc;
        for (i, &(addr, len, flags)) in parts.iter().enumerate() {
            let index = self.next_desc;
            self.next_desc = (index + 1) % QSIZE;
            let link = if i + 1 < parts.len() { NEXT } else { 0 };
            self.write_desc(self.base, index, (addr, len, flags | link, self.next_desc));
        }
        self.offer(head);
        head
    }

    /// The next used chain, if there is one: head and length.
    pub fn pop_used(&mut self) -> Option<(u32, u32)> {
        let index: u16 = self.mem.read_obj(GuestAddress(self.used() + 2)).unwrap();
        if index == self.used {
            return None;
        }
        let slot = self.used() + 4 + 8 * u64::from(self.used % QSIZE);
        self.used = self.used.wrapping_add(1);
        Some((
            self.mem.read_obj(GuestAddress(slot)).unwrap(),
            self.mem.read_obj(GuestAddress(slot + 4)).unwrap(),
        ))
    }
}

/// A device with its transport, event loop and a driver.
pub struct Guest {
    pub mem: GuestMemoryMmap,
    pub irq: Arc<EventFd>,
    pub transport: MmioTransport,
    pub queues: Vec<TestQueue>,
    pub events: EventLoop,
}

impl Guest {
    /// A device before the driver has touched it. `make` builds it for the
    /// event loop it is given.
    pub fn new<D: VirtioDevice + 'static>(
        make: impl FnOnce(crate::devices::EventLoopHandle) -> D,
    ) -> Self {
        let events = EventLoop::new().unwrap();
        let device = make(events.remote_endpoint());
        let mem = memory();
        let irq = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let count = device.queue_max_sizes().len() as u64;
        let device: Arc<Mutex<dyn VirtioDevice>> = Arc::new(Mutex::new(device));
        let transport = MmioTransport::new(device, mem.clone(), irq.clone()).unwrap();
        let queues = (0..count).map(|i| TestQueue::new(&mem, i)).collect();
        Self {
            mem,
            irq,
            transport,
            queues,
            events,
        }
    }

    pub fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn write(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    /// Walks the driver's steps up to FEATURES_OK, accepting `features` on top
    /// of VERSION_1.
    pub fn negotiate(&mut self, features: u64) {
        self.write(0x70, 0);
        self.write(0x70, 1);
        self.write(0x70, 3);
        let features = features | 1 << 32;
        self.write(0x24, 0);
        self.write(0x20, u32::try_from(features & 0xffff_ffff).unwrap());
        self.write(0x24, 1);
        self.write(0x20, u32::try_from(features >> 32).unwrap());
        self.write(0x70, 0xb);
    }

    pub fn set_up_queue(&mut self, index: u32) {
        let queue = &self.queues[index as usize];
        let parts = [
            (0x80, queue.desc()),
            (0x90, queue.avail()),
            (0xa0, queue.used()),
        ];
        self.write(0x30, index);
        self.write(0x38, QSIZE.into());
        for (offset, addr) in parts {
            self.write(offset, u32::try_from(addr & 0xffff_ffff).unwrap());
            self.write(offset + 4, u32::try_from(addr >> 32).unwrap());
        }
        self.write(0x44, 1);
    }

    /// Brings the device up with fresh queues.
    pub fn boot(&mut self, features: u64) {
        for (i, queue) in self.queues.iter_mut().enumerate() {
            *queue = TestQueue::new(&self.mem, i as u64);
        }
        self.negotiate(features);
        for index in 0..u32::try_from(self.queues.len()).unwrap() {
            self.set_up_queue(index);
        }
        self.write(0x70, 0xf);
        assert_eq!(self.read(0x70), 0xf, "status after DRIVER_OK");
        self.run();
    }

    /// Tells the device about queue `index` and lets it work.
    pub fn notify(&mut self, index: u32) {
        self.write(0x50, index);
        self.run();
    }

    /// Runs the event loop until it has nothing to do.
    pub fn run(&mut self) {
        while self.events.run_with_timeout(0).unwrap() > 0 {}
    }

    pub fn needs_reset(&mut self) -> bool {
        self.read(0x70) & 0x40 != 0
    }

    /// The number of interrupts since the last time this was asked.
    pub fn interrupts(&self) -> u64 {
        self.irq.read().unwrap_or(0)
    }

    pub fn put(&self, addr: u64, bytes: &[u8]) {
        self.mem.write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    pub fn get(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mem.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }
}

/// Addresses worth trying: valid, at the edges, across the hole, wild, and in
/// the queue itself.
fn any_addr() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => BUF..BUF + 0x1_0000,
        1 => MEM - 64..MEM + 64,
        1 => HIGH - 64..HIGH + 64,
        1 => HIGH + MEM - 64..HIGH + MEM + 64,
        1 => 0u64..0x4_0000,
        1 => Just(u64::MAX - 8),
        1 => any::<u64>(),
    ]
}

fn any_len() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => 0u32..2048,
        2 => prop_oneof![Just(1u32), Just(16), Just(44), Just(512), Just(4096), Just(0x1_0000)],
        1 => Just(u32::MAX),
        1 => any::<u32>(),
    ]
}

fn any_flags() -> impl Strategy<Value = u16> {
    prop_oneof![4 => 0u16..4, 1 => 0u16..8, 1 => any::<u16>()]
}

/// A descriptor that may be anything.
pub fn any_desc() -> impl Strategy<Value = Desc> {
    let next = prop_oneof![4 => 0..QSIZE, 1 => any::<u16>()];
    (any_addr(), any_len(), any_flags(), next)
}

/// A whole queue that may be anything: descriptor table, heads, and how far
/// the available index runs ahead of the heads.
#[derive(Clone, Debug)]
pub struct AnyQueue {
    pub table: Vec<Desc>,
    pub heads: Vec<u16>,
    pub extra: u16,
}

pub fn any_queue() -> impl Strategy<Value = AnyQueue> {
    let head = prop_oneof![8 => 0..QSIZE, 1 => any::<u16>()];
    let extra = prop_oneof![8 => Just(0u16), 1 => any::<u16>()];
    (
        prop::collection::vec(any_desc(), usize::from(QSIZE)),
        prop::collection::vec(head, 0..usize::from(QSIZE)),
        extra,
    )
        .prop_map(|(table, heads, extra)| AnyQueue {
            table,
            heads,
            extra,
        })
}

impl AnyQueue {
    /// Puts it into queue `index` of `guest` and notifies the device.
    pub fn offer_to(&self, guest: &mut Guest, index: u32) {
        let queue = &mut guest.queues[index as usize];
        for (i, desc) in (0u16..).zip(&self.table) {
            queue.write_desc(queue.desc(), i, *desc);
        }
        for head in &self.heads {
            queue.offer(*head);
        }
        queue.set_avail(queue.avail.wrapping_add(self.extra));
        guest.notify(index);
    }
}
