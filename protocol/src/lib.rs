//! The wire formats of the system, in one place.
//!
//! * [`device`]: the virtio-mshare device as a guest sees it: configuration
//!   space, requests, events, feature bits. `no_std`. The C header that the
//!   kernel includes is generated from it.
//! * [`msharefs`]: what programs in a guest see. `no_std`.
//! * [`entry`]: the format of the page-table entries that the broker writes
//!   and every attached guest walks. `no_std`.
//! * `broker`: the messages between a pool's broker and its clients (VMMs and
//!   `vmm pool`).
//! * `agent`: the messages between the host and the agent inside a guest.
//! * `frame`: how messages go over a stream; `report`: how errors are told;
//!   `klog`: how a kernel tells that it misbehaved.

#![cfg_attr(not(feature = "std"), no_std)]

pub mod device;
pub mod entry;
pub mod msharefs;

#[cfg(feature = "std")]
pub mod agent;
#[cfg(feature = "std")]
pub mod broker;
#[cfg(feature = "std")]
pub mod frame;
#[cfg(feature = "std")]
pub mod klog;
#[cfg(feature = "std")]
pub mod report;
