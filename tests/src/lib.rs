//! What the tests stand on: the lab (a software-emulated machine with nested
//! paging, in which the real KVM and the real VMM run), plain emulated boots,
//! the initramfs writer and the runner behind `make test` and `make demo`.

pub mod artifacts;
pub mod cache;
pub mod cpio;
pub mod demo;
pub mod guests;
pub mod hooks;
pub mod initramfs;
pub mod lab;
pub mod plain;
mod qemu;
pub mod runner;
pub mod selftests;
pub mod tiny;
