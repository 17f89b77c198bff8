//! The virtio face of the device.

use std::path::Path;
use std::sync::Arc;

use mshare_pool::client::{Client, ClientError, Event};
use mshare_protocol::broker::{Geometry, Policy, Role};
use mshare_protocol::device::{
    VIRTIO_ID_MSHARE, VIRTIO_MSHARE_F_FORCED, VIRTIO_MSHARE_F_HUGE, VIRTIO_MSHARE_F_TABLES,
    VIRTIO_MSHARE_F_WRITE, VIRTIO_MSHARE_SHM_ID, virtio_mshare_config,
};
use zerocopy::IntoBytes;

use super::service::Service;
use super::state::{Active, Shared};
use crate::arch::layout::DEVICES;
use crate::devices::virtio::{
    ActivateError, Activation, QUEUE_SIZE, ShmRegion, VirtioDevice, read_config_bytes,
};
use crate::exit::Exit;
use crate::vstate::vm::Vm;

/// Why the device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No pool.
    #[error("cannot join the pool at {path}")]
    Join {
        /// Path of the broker's socket.
        path: String,
        /// Cause.
        #[source]
        source: ClientError,
    },
    /// No thread.
    #[error("cannot start the threads of the mshare device")]
    Threads(#[source] std::io::Error),
    /// The pool's window is out of this guest's reach.
    #[error(
        "the pool's window {start:#x}..{end:#x} does not fit this guest: its RAM ends at \
         {ram_end:#x} and it has {phys_bits} physical address bits"
    )]
    Window {
        /// First guest-physical address.
        start: u64,
        /// First address behind it.
        end: u64,
        /// First address behind the guest's RAM.
        ram_end: u64,
        /// Bits of a guest-physical address.
        phys_bits: u8,
    },
    /// The pool's window lies over the guest's devices.
    #[error(
        "the pool's window {start:#x}..{end:#x} lies over the devices that every guest has at \
         {from:#x}..{above:#x}; make the pool with a window from {above:#x} on",
        from = DEVICES.start, above = DEVICES.end
    )]
    Devices {
        /// First guest-physical address.
        start: u64,
        /// First address behind it.
        end: u64,
    },
}

/// Checks that a window fits a guest whose RAM ends at `ram_end` and whose
/// addresses have `phys_bits`.
fn check_window(geometry: &Geometry, ram_end: u64, phys_bits: u8) -> Result<(), Error> {
    let start = geometry.window_gpa;
    let end = start.saturating_add(geometry.window_len());
    let limit = 1_u64.checked_shl(phys_bits.into()).unwrap_or(u64::MAX);
    if start < ram_end || end > limit {
        return Err(Error::Window {
            start,
            end,
            ram_end,
            phys_bits,
        });
    }
    if start < DEVICES.end && end > DEVICES.start {
        return Err(Error::Devices { start, end });
    }
    Ok(())
}

/// What the device has to know about its guest.
#[derive(Debug)]
pub struct Guest<'a> {
    /// Where memslots are added.
    pub vm: Arc<Vm>,
    /// Where the run is ended if one cannot be removed.
    pub exit: Exit,
    /// How the broker calls it.
    pub name: &'a str,
    /// First address behind its RAM.
    pub ram_end: u64,
    /// Bits of a guest-physical address.
    pub phys_bits: u8,
}

/// The device.
#[derive(Debug)]
pub struct Mshare {
    pub(super) service: Service,
    config: virtio_mshare_config,
}

impl Mshare {
    /// Lets `guest` join the pool whose broker listens at `path`.
    ///
    /// `tables` says whether this host can share page tables; without that,
    /// `policy` is reduced to private tables.
    ///
    /// # Errors
    ///
    /// The broker does not answer, or refuses, or its window does not fit a
    /// guest like this.
    pub fn join(
        guest: Guest<'_>,
        path: &Path,
        policy: Policy,
        tables: bool,
    ) -> Result<Self, Error> {
        let policy = if tables {
            policy
        } else {
            without_tables(policy)
        };
        let shared = Arc::new(Shared::new(guest.exit));
        let role = Role::Guest {
            name: guest.name.to_owned(),
            policy,
        };
        let events = Arc::clone(&shared);
        let client = Client::connect(path, role, move |event, acker| match event {
            Event::Invalidate {
                id,
                offset,
                len,
                seq,
            } => events.invalidate(id, offset, len, seq, acker),
            Event::Dropped(why) => {
                log::error!("the broker has given this guest up: {why}");
                events.revoke_all();
            }
            Event::Lost => log::warn!("the broker is gone; the pool's memory stays"),
            Event::Resumed => log::info!("a broker serves the pool again"),
        })
        .map_err(|source| Error::Join {
            path: path.display().to_string(),
            source,
        })?;
        let geometry = *client.geometry();
        check_window(&geometry, guest.ram_end, guest.phys_bits)?;
        let service = Service {
            shared,
            client: Arc::new(client),
            vm: guest.vm,
            policy,
        };
        service.start().map_err(Error::Threads)?;
        Ok(Self {
            service,
            config: config(&geometry),
        })
    }

    /// What the guest may do, after a host without two-dimensional paging had
    /// its say.
    #[must_use]
    pub fn policy(&self) -> Policy {
        self.service.policy
    }

    fn huge_pages(&self) -> bool {
        self.service.client.geometry().huge_pages
    }
}

const fn without_tables(policy: Policy) -> Policy {
    match policy {
        Policy::Rw | Policy::Private => Policy::Private,
        Policy::Ro | Policy::PrivateRo => Policy::PrivateRo,
    }
}

fn config(geometry: &Geometry) -> virtio_mshare_config {
    virtio_mshare_config {
        window_gpa: geometry.window_gpa.into(),
        window_len: geometry.window_len().into(),
        table_len: geometry.table_len.into(),
        data_off: geometry.data_off.into(),
        data_len: geometry.data_len.into(),
        pool_uuid: geometry.uuid,
    }
}

impl VirtioDevice for Mshare {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_MSHARE
    }

    fn avail_features(&self) -> u64 {
        let policy = self.service.policy;
        let bit = |set: bool, bit: u32| u64::from(set) << bit;
        bit(policy.tables(), VIRTIO_MSHARE_F_TABLES)
            | bit(policy.tables(), VIRTIO_MSHARE_F_FORCED)
            | bit(policy.writes(), VIRTIO_MSHARE_F_WRITE)
            | bit(self.huge_pages(), VIRTIO_MSHARE_F_HUGE)
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 3]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(self.config.as_bytes(), offset, data);
    }

    fn shm_regions(&self) -> Vec<ShmRegion> {
        vec![ShmRegion {
            id: VIRTIO_MSHARE_SHM_ID,
            gpa: self.config.window_gpa.get(),
            len: self.config.window_len.get(),
        }]
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let queues = activation.take_queues()?;
        let active = Active::new(activation.mem, activation.interrupt, queues);
        let understood = activation.features >> VIRTIO_MSHARE_F_HUGE & 1 != 0;
        let may_attach = understood || !self.huge_pages();
        self.service
            .shared
            .activate(active, may_attach)
            .map_err(|source| ActivateError::Host {
                what: "doorbells for the mshare device",
                source,
            })
    }

    fn reset(&mut self) {
        self.service.shared.deactivate();
    }
}

impl Drop for Mshare {
    fn drop(&mut self) {
        self.reset();
        self.service.shared.end();
        // A thread that waits for a broker which never comes must not keep
        // the process.
        self.service.client.close();
    }
}
