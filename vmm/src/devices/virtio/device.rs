//! What every virtio device is to the transport.

use std::fmt::Debug;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use super::{Interrupt, VirtQueue};

/// A shared-memory region of a device (virtio 1.2, section 2.10).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShmRegion {
    /// Region id, unique within the device.
    pub id: u32,
    /// Guest-physical address of its first byte.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Everything a device needs to serve its guest, from DRIVER_OK to reset.
///
/// All of it may move to any thread.
#[derive(Debug)]
pub struct Activation {
    /// Feature bits the driver accepted.
    pub features: u64,
    /// Guest memory. The queues have been checked to lie inside.
    pub mem: GuestMemoryMmap,
    /// One queue for each entry of [`VirtioDevice::queue_max_sizes`].
    pub queues: Vec<VirtQueue>,
    /// How to call the driver.
    pub interrupt: Arc<Interrupt>,
}

impl Activation {
    /// The queues as an array of the length the device expects.
    ///
    /// # Errors
    ///
    /// The transport gave another number of queues.
    pub fn take_queues<const N: usize>(&mut self) -> Result<[VirtQueue; N], ActivateError> {
        std::mem::take(&mut self.queues)
            .try_into()
            .map_err(|queues: Vec<_>| ActivateError::Queues {
                expected: N,
                found: queues.len(),
            })
    }
}

/// Why a device could not start to work.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The transport and the device disagree about the queues.
    #[error("{found} queues instead of {expected}")]
    Queues {
        /// Queues of this type of device.
        expected: usize,
        /// Queues that were handed over.
        found: usize,
    },
    /// The handler could not be given to the event loop.
    #[error("the event loop does not take the device")]
    EventLoop(#[source] event_manager::Error),
    /// The device needs a resource of the host that it did not get.
    #[error("cannot get {what}")]
    Host {
        /// The resource.
        what: &'static str,
        /// The host's error.
        #[source]
        source: std::io::Error,
    },
}

/// The half of a device that the guest's CPUs see. See the module's overview.
///
/// The methods run on a vCPU thread, under the lock of the transport and of
/// the device, and must not wait for other threads.
pub trait VirtioDevice: Send + Debug {
    /// Virtio device id (virtio 1.2, section 5).
    fn device_type(&self) -> u32;

    /// Feature bits of this type of device. The transport adds
    /// VIRTIO_F_VERSION_1 and the ring features that the queues implement.
    fn avail_features(&self) -> u64;

    /// The largest size of each queue, in descriptors; a power of two.
    fn queue_max_sizes(&self) -> &[u16];

    /// Fills `data` from byte `offset` of the configuration space; bytes past
    /// its end stay zero. [`read_config_bytes`] does so from a byte slice.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Stores `data` at byte `offset` of the configuration space. Without an
    /// implementation the space is read-only and the write has no effect.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The shared-memory regions. They must not change while the device is
    /// active.
    fn shm_regions(&self) -> Vec<ShmRegion> {
        Vec::new()
    }

    /// Starts to serve the guest.
    ///
    /// A device with work that never blocks moves `activation` into a handler
    /// on the `devices` thread with [`Worker::start`](super::Worker::start).
    /// One that may block starts a named thread, moves `activation` there, and
    /// keeps an eventfd to stop it.
    ///
    /// # Errors
    ///
    /// The device stays inactive and the transport sets NEEDS_RESET.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops serving the guest: once this returns, no thread touches the
    /// queues or guest memory on behalf of this device, and the device is as
    /// it was before [`activate`](Self::activate). Not called when inactive.
    fn reset(&mut self);
}

/// Fills `data` with the bytes of `config` from `offset`; what lies past the
/// end of `config` is left as it is.
pub fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let tail = usize::try_from(offset)
        .ok()
        .and_then(|offset| config.get(offset..))
        .unwrap_or_default();
    let len = tail.len().min(data.len());
    data[..len].copy_from_slice(&tail[..len]);
}

#[cfg(test)]
mod tests {
    use super::read_config_bytes;

    #[test]
    fn read_config_bytes_inside_across_and_past_the_end() {
        let read = |offset, len| {
            let mut data = vec![0xee; len];
            read_config_bytes(&[1, 2, 3, 4], offset, &mut data);
            data
        };
        assert_eq!(read(1, 2), [2, 3]);
        assert_eq!(read(2, 4), [3, 4, 0xee, 0xee]);
        assert_eq!(read(4, 1), [0xee]);
        assert_eq!(read(u64::MAX, 1), [0xee]);
    }
}
