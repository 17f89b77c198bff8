//! The registers of one queue.

use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH,
    VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_USED_HIGH,
    VIRTIO_MMIO_QUEUE_USED_LOW,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

use super::{high, join, low};

/// Why a queue's settings do not make a queue.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum QueueConfigError {
    /// Not a power of two, zero or too large.
    #[error("size {size} is not a power of two of at most {max}")]
    Size {
        /// QueueNum as written.
        size: u32,
        /// Largest size.
        max: u16,
    },
    /// A part of the queue is not aligned as virtio 1.2, section 2.7 asks.
    #[error("the {part} at {addr:#x} is misaligned")]
    Alignment {
        /// Which part.
        part: &'static str,
        /// Its address.
        addr: u64,
    },
    /// A part of the queue is not, or not all, in guest memory.
    #[error("the {part} at {addr:#x} with {len:#x} bytes is not in guest memory")]
    Outside {
        /// Which part.
        part: &'static str,
        /// Its address.
        addr: u64,
        /// Its length in bytes.
        len: usize,
    },
}

/// What the driver has written, unchecked until [`build`](Self::build).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct QueueRegisters {
    /// QueueReady.
    pub(super) ready: bool,
    size: u32,
    desc: u64,
    avail: u64,
    used: u64,
}

impl QueueRegisters {
    /// Stores `value` in the register at `offset`, which is one of a queue's.
    pub(super) fn write(&mut self, offset: u32, value: u32) {
        let set_low = |register: &mut u64| *register = join(value, high(*register));
        let set_high = |register: &mut u64| *register = join(low(*register), value);
        match offset {
            VIRTIO_MMIO_QUEUE_NUM => self.size = value,
            VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut self.desc),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut self.desc),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut self.avail),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut self.avail),
            VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut self.used),
            VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut self.used),
            _ => {}
        }
    }

    /// The queue these settings describe, checked against guest memory.
    pub(super) fn build(
        &self,
        max: u16,
        event_idx: bool,
        mem: &GuestMemoryMmap,
    ) -> Result<Queue, QueueConfigError> {
        let bad_size = QueueConfigError::Size {
            size: self.size,
            max,
        };
        let (Ok(mut queue), Ok(size)) = (Queue::new(max), u16::try_from(self.size)) else {
            return Err(bad_size);
        };
        if queue.try_set_size(size).is_err() {
            return Err(bad_size);
        }
        // Sizes of section 2.7: the flags, index and event fields are two
        // bytes each.
        let size = usize::from(queue.size());
        check_part("descriptor table", self.desc, 16 * size, 16, mem)?;
        check_part("available ring", self.avail, 6 + 2 * size, 2, mem)?;
        check_part("used ring", self.used, 6 + 8 * size, 4, mem)?;
        queue.set_desc_table_address(Some(low(self.desc)), Some(high(self.desc)));
        queue.set_avail_ring_address(Some(low(self.avail)), Some(high(self.avail)));
        queue.set_used_ring_address(Some(low(self.used)), Some(high(self.used)));
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        Ok(queue)
    }
}

/// Checks the place of one part of a queue.
fn check_part(
    part: &'static str,
    addr: u64,
    len: usize,
    align: u64,
    mem: &GuestMemoryMmap,
) -> Result<(), QueueConfigError> {
    if !addr.is_multiple_of(align) {
        return Err(QueueConfigError::Alignment { part, addr });
    }
    // The queue crate takes address zero of the available ring for unset.
    if addr == 0 || !mem.check_range(GuestAddress(addr), len, Permissions::ReadWrite) {
        return Err(QueueConfigError::Outside { part, addr, len });
    }
    Ok(())
}
