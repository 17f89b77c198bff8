//! A pool of memory that virtual machines share together with its page tables.
//!
//! A **pool** is three sealed memfds (data, tables, directory) and the process
//! that owns them, the **broker**. A VMM is a client of the broker: it receives
//! the three descriptors, maps what its guest attaches, and asks the broker for
//! everything that changes the directory or a table.
//!
//! | module | what is there |
//! |---|---|
//! | [`memory`] | the three files, mappings, punching, resident bytes |
//! | [`layout`] | where things lie in the window and in a region's tables |
//! | [`alloc`] | first-fit allocation of ranges |
//! | [`editor`] | the one writer of table entries |
//! | [`directory`] | regions, persisted so that a killed broker loses nothing |
//! | [`marks`] | proof that a client of a former broker is dead |
//! | [`broker`] | sessions and requests: what is allowed, in which order |
//! | [`server`] | the broker's socket |
//! | [`client`] | the VMM's side of the socket; survives a broker's death |
//! | [`admin`] | what `vmm pool` does with a client |
//! | [`socket`] | listening sockets, for the broker and for others |
//! | [`wire`] | frames with descriptors on a unix socket |
//!
//! **Trust.** Clients of the socket are VMMs of one user and trusted to hold
//! their guest to its policy: with the descriptors they could write anything.
//! A client that merely misbehaves on the socket hurts only itself. Guests that
//! link tables are one trust domain (see `mshare_protocol::device`).

pub mod admin;
pub mod alloc;
pub mod broker;
pub mod client;
pub mod directory;
pub mod editor;
mod failure;
pub mod layout;
pub mod marks;
pub mod memory;
mod record;
pub mod server;
mod session;
pub mod socket;
pub mod wire;

#[cfg(test)]
mod model_tests;

pub use mshare_protocol::broker::{
    Failure, Geometry, Policy, PoolStat, Region, Reply, Request, Role,
};
