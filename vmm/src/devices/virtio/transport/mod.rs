//! The virtio-mmio transport (virtio 1.2, section 4.2).
//!
//! ```text
//! 0x000  registers, 32 bits each, 32-bit accesses only
//! 0x050  QueueNotify: KVM turns writes into the queue's eventfd
//! 0x100  the device's configuration space, accesses of any size
//! 0x1000 end
//! ```
//!
//! The driver's settings are plain data ([`Registers`], [`QueueRegisters`])
//! apart from the wiring (device, eventfds, interrupt), so that reset is an
//! assignment and saving a device is a copy.

mod queue_registers;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS,
    VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY,
    VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY,
    VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW,
    VIRTIO_MMIO_SHM_BASE_HIGH, VIRTIO_MMIO_SHM_BASE_LOW, VIRTIO_MMIO_SHM_LEN_HIGH,
    VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_SHM_SEL, VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID,
    VIRTIO_MMIO_VERSION,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use self::queue_registers::QueueRegisters;
use super::{Activation, Interrupt, VirtQueue, VirtioDevice};
use crate::devices::bus::MmioDevice;

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
/// Version of the transport's registers (1 is the legacy layout).
const VERSION: u32 = 2;
/// "MSHR": no meaning is attached to it (virtio 1.2, section 4.2.2).
const VENDOR: u32 = 0x5248_534d;
/// VIRTIO_F_VERSION_1 as a mask.
const F_VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
/// What the transport and its queues implement for every device.
const TRANSPORT_FEATURES: u64 =
    F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// The transport cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No eventfd for the driver's notifications.
    #[error("cannot create an eventfd for queue {queue}")]
    EventFd {
        /// Index of the queue.
        queue: usize,
        /// The host's error.
        #[source]
        source: std::io::Error,
    },
}

/// The registers that a reset clears, except those of the queues.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Registers {
    /// Status without NEEDS_RESET, which [`Interrupt`] holds.
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    /// The driver asked for features above bit 63.
    wild_features: bool,
    queue_sel: u32,
    shm_sel: u32,
}

struct QueueSlot {
    registers: QueueRegisters,
    max_size: u16,
    notify: EventFd,
}

/// One virtio device on the MMIO bus.
pub struct MmioTransport {
    device: Arc<Mutex<dyn VirtioDevice>>,
    /// Device id, also its name in messages.
    device_type: u32,
    mem: GuestMemoryMmap,
    interrupt: Arc<Interrupt>,
    registers: Registers,
    queues: Vec<QueueSlot>,
    /// The device has been activated and not been reset.
    active: bool,
}

impl fmt::Debug for MmioTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MmioTransport")
            .field("device_type", &self.device_type)
            .field("registers", &self.registers)
            .field("active", &self.active)
            .finish_non_exhaustive()
    }
}

impl MmioTransport {
    /// Puts `device` behind a set of registers. `irq` is the irqfd of the
    /// device's GSI, which must be edge-triggered.
    ///
    /// # Errors
    ///
    /// The host has no more eventfds.
    pub fn new(
        device: Arc<Mutex<dyn VirtioDevice>>,
        mem: GuestMemoryMmap,
        irq: Arc<EventFd>,
    ) -> Result<Self, Error> {
        let (device_type, sizes) = {
            let device = lock(&device);
            (device.device_type(), device.queue_max_sizes().to_vec())
        };
        let queues = sizes
            .into_iter()
            .enumerate()
            .map(|(queue, max_size)| {
                let notify = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
                    .map_err(|source| Error::EventFd { queue, source })?;
                Ok(QueueSlot {
                    registers: QueueRegisters::default(),
                    max_size,
                    notify,
                })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            device,
            device_type,
            mem,
            interrupt: Arc::new(Interrupt::new(irq)),
            registers: Registers::default(),
            queues,
            active: false,
        })
    }

    /// The eventfd of each queue's notifications, with the queue's index: to
    /// be registered with KVM_IOEVENTFD for 4-byte writes of that index to
    /// offset 0x50. The transport works without, only slower.
    ///
    /// # Errors
    ///
    /// The host has no more file descriptors.
    pub fn queue_notify_fds(&self) -> Result<Vec<(u32, EventFd)>, Error> {
        (0u32..)
            .zip(&self.queues)
            .enumerate()
            .map(|(queue, (index, slot))| {
                let fd = slot.notify.try_clone();
                Ok((
                    index,
                    fd.map_err(|source| Error::EventFd { queue, source })?,
                ))
            })
            .collect()
    }

    fn read_register(&mut self, offset: u32) -> u32 {
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device_type,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => match self.registers.device_features_sel {
                0 => low(self.offered_features()),
                1 => high(self.offered_features()),
                _ => 0,
            },
            VIRTIO_MMIO_QUEUE_NUM_MAX => self
                .selected_queue()
                .map_or(0, |slot| u32::from(slot.max_size)),
            VIRTIO_MMIO_QUEUE_READY => self
                .selected_queue()
                .map_or(0, |slot| u32::from(slot.registers.ready)),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            VIRTIO_MMIO_STATUS => self.status(),
            // All ones: there is no such region.
            VIRTIO_MMIO_SHM_LEN_LOW => low(self.selected_shm().map_or(u64::MAX, |r| r.1)),
            VIRTIO_MMIO_SHM_LEN_HIGH => high(self.selected_shm().map_or(u64::MAX, |r| r.1)),
            VIRTIO_MMIO_SHM_BASE_LOW => low(self.selected_shm().map_or(u64::MAX, |r| r.0)),
            VIRTIO_MMIO_SHM_BASE_HIGH => high(self.selected_shm().map_or(u64::MAX, |r| r.0)),
            // No device changes its configuration space.
            VIRTIO_MMIO_CONFIG_GENERATION => 0,
            _ => {
                self.complain(format_args!("read of register {offset:#x}"));
                0
            }
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.registers.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.registers.driver_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.write_driver_features(value),
            VIRTIO_MMIO_QUEUE_SEL => self.registers.queue_sel = value,
            VIRTIO_MMIO_QUEUE_NUM
            | VIRTIO_MMIO_QUEUE_DESC_LOW
            | VIRTIO_MMIO_QUEUE_DESC_HIGH
            | VIRTIO_MMIO_QUEUE_AVAIL_LOW
            | VIRTIO_MMIO_QUEUE_AVAIL_HIGH
            | VIRTIO_MMIO_QUEUE_USED_LOW
            | VIRTIO_MMIO_QUEUE_USED_HIGH => self.write_queue(offset, value),
            VIRTIO_MMIO_QUEUE_READY => self.write_queue_ready(value),
            VIRTIO_MMIO_QUEUE_NOTIFY => self.notify_queue(value),
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            VIRTIO_MMIO_STATUS => self.write_status(value),
            VIRTIO_MMIO_SHM_SEL => self.registers.shm_sel = value,
            _ => self.complain(format_args!("write of {value:#x} to register {offset:#x}")),
        }
    }

    fn offered_features(&self) -> u64 {
        lock(&self.device).avail_features() | TRANSPORT_FEATURES
    }

    fn selected_queue(&mut self) -> Option<&mut QueueSlot> {
        let index = usize::try_from(self.registers.queue_sel).ok()?;
        self.queues.get_mut(index)
    }

    /// Address and length of the selected shared-memory region.
    fn selected_shm(&self) -> Option<(u64, u64)> {
        let id = self.registers.shm_sel;
        let regions = lock(&self.device).shm_regions();
        let region = regions.into_iter().find(|region| region.id == id)?;
        Some((region.gpa, region.len))
    }

    fn status(&self) -> u32 {
        let broken = if self.interrupt.is_broken() {
            VIRTIO_CONFIG_S_NEEDS_RESET
        } else {
            0
        };
        self.registers.status | broken
    }

    fn has_status(&self, bit: u32) -> bool {
        self.registers.status & bit != 0
    }

    fn write_driver_features(&mut self, value: u32) {
        if self.has_status(VIRTIO_CONFIG_S_FEATURES_OK) {
            self.complain(format_args!("features changed after FEATURES_OK"));
            return;
        }
        let features = self.registers.driver_features;
        match self.registers.driver_features_sel {
            0 => self.registers.driver_features = join(value, high(features)),
            1 => self.registers.driver_features = join(low(features), value),
            _ => self.registers.wild_features |= value != 0,
        }
    }

    fn write_queue(&mut self, offset: u32, value: u32) {
        let active = self.active;
        match self.selected_queue() {
            Some(slot) if !active && !slot.registers.ready => {
                slot.registers.write(offset, value);
            }
            Some(_) => self.complain(format_args!("a queue in use was changed")),
            None => self.complain(format_args!("a queue that does not exist was changed")),
        }
    }

    fn write_queue_ready(&mut self, value: u32) {
        let mem = self.mem.clone();
        let active = self.active;
        let Some(slot) = self.selected_queue() else {
            self.complain(format_args!("a queue that does not exist was made ready"));
            return;
        };
        let ready = value & 1 != 0;
        if ready == slot.registers.ready {
            return;
        }
        if active {
            // The handler owns the queue until a reset.
            self.complain(format_args!("a queue was made ready or stopped too late"));
            self.fail();
        } else if !ready {
            slot.registers.ready = false;
        } else if let Err(error) = slot.registers.build(slot.max_size, false, &mem) {
            self.complain(format_args!("a queue is not usable: {error}"));
            self.fail();
        } else {
            slot.registers.ready = true;
        }
    }

    fn notify_queue(&mut self, value: u32) {
        let slot = usize::try_from(value)
            .ok()
            .and_then(|index| self.queues.get(index));
        match slot {
            Some(slot) if self.active => {
                if let Err(error) = slot.notify.write(1) {
                    log::error!("cannot notify a virtio queue: {error}");
                }
            }
            _ => self.complain(format_args!("notification of queue {value}, not in use")),
        }
    }

    /// Follows the driver through the steps of section 3.1.1. A bit that does
    /// not follow from the ones before stays clear, which the driver can see.
    fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        if self.registers.status & !value != 0 {
            self.complain(format_args!("status bits cleared without a reset"));
        }
        let asked = |bit| value & bit != 0;
        self.registers.status |= value & (VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_FAILED);
        if asked(VIRTIO_CONFIG_S_DRIVER) && self.has_status(VIRTIO_CONFIG_S_ACKNOWLEDGE) {
            self.registers.status |= VIRTIO_CONFIG_S_DRIVER;
        }
        if asked(VIRTIO_CONFIG_S_FEATURES_OK)
            && self.has_status(VIRTIO_CONFIG_S_DRIVER)
            && self.features_are_ok()
        {
            self.registers.status |= VIRTIO_CONFIG_S_FEATURES_OK;
        }
        if asked(VIRTIO_CONFIG_S_DRIVER_OK) && !self.has_status(VIRTIO_CONFIG_S_DRIVER_OK) {
            if self.has_status(VIRTIO_CONFIG_S_FEATURES_OK) {
                self.registers.status |= VIRTIO_CONFIG_S_DRIVER_OK;
                self.activate();
            } else {
                self.complain(format_args!("DRIVER_OK without FEATURES_OK"));
            }
        }
    }

    /// Whether the driver accepted only what was offered, and the version of
    /// virtio that this is.
    fn features_are_ok(&mut self) -> bool {
        let accepted = self.registers.driver_features;
        let wild = accepted & !self.offered_features();
        if wild != 0 || self.registers.wild_features {
            self.complain(format_args!("features {wild:#x} were not offered"));
            false
        } else if accepted & F_VERSION_1 == 0 {
            self.complain(format_args!("a legacy driver"));
            false
        } else {
            true
        }
    }

    fn activate(&mut self) {
        if self.interrupt.is_broken() {
            self.complain(format_args!("DRIVER_OK of a device that needs a reset"));
            return;
        }
        let activation = match self.activation() {
            Ok(activation) => activation,
            Err(message) => {
                self.complain(format_args!("{message}"));
                self.fail();
                return;
            }
        };
        let result = lock(&self.device).activate(activation);
        match result {
            Ok(()) => self.active = true,
            Err(error) => {
                let cause = std::error::Error::source(&error)
                    .map_or_else(String::new, |c| format!(": {c}"));
                self.complain(format_args!("not served: {error}{cause}"));
                self.fail();
            }
        }
    }

    fn activation(&self) -> Result<Activation, String> {
        let features = self.registers.driver_features;
        let event_idx = features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let mut queues = Vec::with_capacity(self.queues.len());
        for (index, slot) in self.queues.iter().enumerate() {
            if !slot.registers.ready {
                return Err(format!("DRIVER_OK before queue {index} is ready"));
            }
            let queue = slot
                .registers
                .build(slot.max_size, event_idx, &self.mem)
                .map_err(|error| format!("queue {index} is not usable: {error}"))?;
            let notify = slot
                .notify
                .try_clone()
                .map_err(|error| format!("no eventfd for queue {index}: {error}"))?;
            queues.push(VirtQueue::new(queue, notify));
        }
        Ok(Activation {
            features,
            mem: self.mem.clone(),
            queues,
            interrupt: self.interrupt.clone(),
        })
    }

    /// Sets NEEDS_RESET, with an interrupt if the driver is up.
    fn fail(&self) {
        if self.has_status(VIRTIO_CONFIG_S_DRIVER_OK) {
            self.interrupt.fail();
        } else {
            self.interrupt.set_broken();
        }
    }

    fn reset(&mut self) {
        if std::mem::take(&mut self.active) {
            lock(&self.device).reset();
        }
        // Nothing else changes the interrupt's state now.
        self.interrupt.reset();
        self.registers = Registers::default();
        for slot in &mut self.queues {
            slot.registers = QueueRegisters::default();
        }
    }

    fn complain(&self, what: fmt::Arguments<'_>) {
        self.interrupt.complaints().warn(format_args!(
            "virtio device {}: guest: {what}",
            self.device_type
        ));
    }
}

impl MmioDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(u64::from(VIRTIO_MMIO_CONFIG)) {
            lock(&self.device).read_config(offset, data);
            return;
        }
        match (<&mut [u8; 4]>::try_from(&mut *data), u32::try_from(offset)) {
            (Ok(data), Ok(offset)) => *data = self.read_register(offset).to_le_bytes(),
            _ => self.complain(format_args!("{}-byte read at {offset:#x}", data.len())),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(u64::from(VIRTIO_MMIO_CONFIG)) {
            lock(&self.device).write_config(offset, data);
            return;
        }
        match (<[u8; 4]>::try_from(data), u32::try_from(offset)) {
            (Ok(data), Ok(offset)) => self.write_register(offset, u32::from_le_bytes(data)),
            _ => self.complain(format_args!("{}-byte write at {offset:#x}", data.len())),
        }
    }
}

/// A device whose lock was poisoned is still the device.
fn lock(device: &Mutex<dyn VirtioDevice>) -> MutexGuard<'_, dyn VirtioDevice + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The low half of a 64-bit register.
fn low(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// The high half of a 64-bit register.
fn high(value: u64) -> u32 {
    low(value >> 32)
}

/// A 64-bit register from its halves.
fn join(low: u32, high: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}
