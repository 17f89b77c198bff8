//! The mshare device: a guest's door to a pool.
//!
//! ```text
//!   guest driver          vCPU threads         threads of the device        broker
//!
//!   ctrl queue  --------------------------->  mshare-ctrl  --- requests --->
//!                                                 | memslots
//!   event queue <---------------------------  pool-client  <-- invalidate --
//!   ack queue   --------------------------->  mshare-ack   --- ack -------->
//! ```
//!
//! `mshare-ctrl` serves one request at a time and may wait for the broker;
//! acknowledgements have a thread of their own, because the request that the
//! first one waits for may need them. Both live as long as the device and wait
//! for activations in between. They walk the queues, which a guest can make
//! long, under one lock; `pool-client` takes another, under which the memslots
//! are added and removed. No lock is held while a thread waits for the broker.
//!
//! The files: `request` reads what the driver wrote and checks it,
//! `attachment` holds the memslots of one region, `state` is what the threads
//! share, `service` the threads, `device` the virtio face.

mod attachment;
mod device;
mod request;
mod service;
mod state;
#[cfg(test)]
mod tests;

pub use device::{Error, Guest, Mshare};

use mshare_protocol::broker::{Geometry, Policy, Region};
use mshare_protocol::device::{
    VIRTIO_MSHARE_R_RDONLY, VIRTIO_MSHARE_R_SIZED, VIRTIO_MSHARE_R_TABLES,
    VIRTIO_MSHARE_R_UNLINKED, virtio_mshare_region,
};

/// What the driver is told about a region of the pool.
fn describe(geometry: &Geometry, policy: Policy, region: &Region) -> virtio_mshare_region {
    let flag = |set: bool, flag: u32| if set { flag } else { 0 };
    let flags = flag(region.len != 0, VIRTIO_MSHARE_R_SIZED)
        | flag(policy.tables(), VIRTIO_MSHARE_R_TABLES)
        | flag(!policy.writes(), VIRTIO_MSHARE_R_RDONLY)
        | flag(region.name.is_empty(), VIRTIO_MSHARE_R_UNLINKED);
    virtio_mshare_region {
        id: region.id.into(),
        start: region.start.into(),
        len: region.len.into(),
        link_gpa: (geometry.window_gpa + region.table_off).into(),
        data_gpa: (geometry.window_gpa + geometry.data_off + region.data_off).into(),
        resident: region.resident.into(),
        table_bytes: region.table_bytes.into(),
        flags: flags.into(),
        mode: region.mode.into(),
        uid: region.uid.into(),
        gid: region.gid.into(),
        attached: u32::try_from(region.attached.len())
            .unwrap_or(u32::MAX)
            .into(),
        reserved: 0.into(),
    }
}
