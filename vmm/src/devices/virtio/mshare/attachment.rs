//! The memslots of one attached region.

use std::sync::Arc;

use mshare_pool::memory::PoolFiles;
use mshare_protocol::broker::{Geometry, Policy, Region};
use rustix::mm::Advice;

use crate::vstate::memory::{Access, Backing, Error as MemoryError, Mapping};
use crate::vstate::vm::{Error as VmError, SlotId, Vm};

/// Why a region could not be shown to the guest.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The broker's description does not fit the pool.
    #[error("region {id} does not lie inside the pool")]
    Outside {
        /// Region.
        id: u64,
    },
    /// The host does not map it.
    #[error("cannot map region {id}")]
    Map {
        /// Region.
        id: u64,
        /// Cause.
        #[source]
        source: MemoryError,
    },
    /// Table memory must stay in small pages, which the host refuses.
    #[error("cannot keep huge pages away from the tables of region {id}")]
    SmallPages {
        /// Region.
        id: u64,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// KVM does not take its memslots.
    #[error("cannot add the memslots of region {id}")]
    Slot {
        /// Region.
        id: u64,
        /// Cause.
        #[source]
        source: VmError,
    },
    /// The driver was reset, or the broker gave the guest up, since it asked.
    #[error("region {id} is not attached: its driver was reset or cut off meanwhile")]
    Overtaken {
        /// Region.
        id: u64,
    },
    /// Half of it was shown, and stays.
    #[error(transparent)]
    Remove(#[from] RemoveError),
}

/// A region that the guest can still reach although it was to be taken away.
/// The broker must not hear that it is detached: it would give the memory to
/// another region.
#[derive(Debug, thiserror::Error)]
#[error("cannot take region {id} of the pool away from the guest, which must end for it")]
pub struct RemoveError {
    id: u64,
    #[source]
    source: VmError,
}

/// A region that the guest sees: two memslots, until [`Attachment::remove`].
///
/// ```text
/// guest-physical   link_gpa .. + table_len      data_gpa .. + len
///                  |  tables slot            |  |  data slot     |
/// pool files       tables [table_off ..]        data [data_off ..]
/// ```
#[derive(Debug)]
pub(super) struct Attachment {
    id: u64,
    vm: Arc<Vm>,
    slots: Vec<SlotId>,
}

impl Attachment {
    /// Maps `region` and adds its memslots with the rights of `policy`.
    pub(super) fn new(
        vm: &Arc<Vm>,
        files: &PoolFiles,
        geometry: &Geometry,
        policy: Policy,
        region: &Region,
    ) -> Result<Self, AttachError> {
        let id = region.id;
        let inside = |offset: u64, len: u64, limit: u64| {
            len > 0 && offset.checked_add(len).is_some_and(|end| end <= limit)
        };
        if !inside(region.table_off, region.table_len, geometry.table_len)
            || !inside(region.data_off, region.len, geometry.data_len)
        {
            return Err(AttachError::Outside { id });
        }
        // CPUs write accessed and dirty bits into live tables, so that their
        // slot must be writable; tables that the guest's kernel only reads
        // need not be.
        let table_access = access(policy.tables());
        let data_access = access(policy.writes());
        let unmapped = |source| AttachError::Map { id, source };
        let tables = Mapping::new(
            files.tables(),
            region.table_off,
            region.table_len,
            table_access,
        )
        .map_err(unmapped)?;
        keep_small(&tables).map_err(|source| AttachError::SmallPages { id, source })?;
        // Whatever the entries map: pages of 4 KiB here would cost every VM second-stage
        // tables as large as those that the region saves.
        let data = Mapping::huge(files.data(), region.data_off, region.len, data_access)
            .map_err(unmapped)?;
        let mut attachment = Self {
            id,
            vm: Arc::clone(vm),
            slots: Vec::with_capacity(2),
        };
        let table_gpa = geometry.window_gpa + region.table_off;
        let data_gpa = geometry.window_gpa + geometry.data_off + region.data_off;
        for (gpa, mapping, access) in [
            (table_gpa, tables, table_access),
            (data_gpa, data, data_access),
        ] {
            match vm.add_memslot(gpa, Arc::new(mapping), access) {
                Ok(slot) => attachment.slots.push(slot),
                Err(source) => {
                    attachment.remove()?;
                    return Err(AttachError::Slot { id, source });
                }
            }
        }
        Ok(attachment)
    }

    /// Removes the memslots; those that KVM does not remove are kept.
    pub(super) fn remove(&mut self) -> Result<(), RemoveError> {
        let (id, mut result) = (self.id, Ok(()));
        self.slots.retain(|slot| {
            let removed = self.vm.remove_memslot(*slot);
            let stays = removed.is_err();
            if let Err(source) = removed {
                result = Err(RemoveError { id, source });
            }
            stays
        });
        result
    }
}

const fn access(write: bool) -> Access {
    if write {
        Access::ReadWrite
    } else {
        Access::ReadOnly
    }
}

/// Punching one table page must free exactly that page.
fn keep_small(mapping: &Mapping) -> std::io::Result<()> {
    let len = usize::try_from(Backing::len(mapping)).map_err(std::io::Error::other)?;
    // SAFETY: the range is the mapping's own; the advice changes no contents.
    let advised =
        unsafe { rustix::mm::madvise(mapping.as_ptr().cast(), len, Advice::LinuxNoHugepage) };
    match advised {
        // A kernel without huge pages has nothing to keep away.
        Err(rustix::io::Errno::INVAL) => Ok(()),
        other => Ok(other?),
    }
}
