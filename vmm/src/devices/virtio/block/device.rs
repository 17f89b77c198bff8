//! The disk as the guest's CPUs see it.

use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

use super::Disk;
use super::handler::BlockHandler;
use super::request::{MAX_RANGE_SECTORS, MAX_RANGES};
use crate::devices::EventLoopHandle;
use crate::devices::virtio::{
    ActivateError, Activation, QUEUE_SIZE, VirtioDevice, Worker, WorkerThread, read_config_bytes,
};

/// `struct virtio_blk_config` (virtio 1.2, section 5.2.4). What belongs to
/// features that are not offered is zero.
#[derive(Clone, Copy, Debug, Default, IntoBytes, Immutable)]
#[repr(C)]
struct Config {
    capacity: U64,
    size_max: U32,
    seg_max: U32,
    geometry: [u8; 4],
    blk_size: U32,
    topology: [u8; 8],
    writeback: u8,
    unused0: u8,
    num_queues: U16,
    max_discard_sectors: U32,
    max_discard_seg: U32,
    discard_sector_alignment: U32,
    max_write_zeroes_sectors: U32,
    max_write_zeroes_seg: U32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
}

/// A virtio disk.
#[derive(Debug)]
pub struct Block {
    disk: Arc<Disk>,
    config: Config,
    thread: WorkerThread,
    worker: Option<Worker>,
}

impl Block {
    /// The guest's view of `disk`; works on the event loop `events`.
    pub fn new(disk: Disk, events: EventLoopHandle) -> Self {
        let config = Config {
            capacity: U64::new(disk.sectors()),
            // Header and status take a descriptor each.
            seg_max: U32::new(u32::from(QUEUE_SIZE) - 2),
            blk_size: U32::new(512),
            max_discard_sectors: U32::new(MAX_RANGE_SECTORS),
            max_discard_seg: U32::new(MAX_RANGES),
            // Smaller pieces free nothing on a host with 4 KiB blocks.
            discard_sector_alignment: U32::new(8),
            max_write_zeroes_sectors: U32::new(MAX_RANGE_SECTORS),
            max_write_zeroes_seg: U32::new(MAX_RANGES),
            write_zeroes_may_unmap: 1,
            ..Config::default()
        };
        Self {
            disk: Arc::new(disk),
            config,
            thread: events.into(),
            worker: None,
        }
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn avail_features(&self) -> u64 {
        let always =
            1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_FLUSH;
        if self.disk.is_read_only() {
            always | 1 << VIRTIO_BLK_F_RO
        } else {
            always | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        }
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(self.config.as_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let handler = BlockHandler::new(activation, self.disk.clone())?;
        self.worker = Some(Worker::start(&self.thread, handler)?);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take() {
            worker.stop();
        }
    }
}
