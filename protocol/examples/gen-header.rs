//! Prints the C header of the virtio-mshare device.

#![allow(clippy::expect_used)]

#[path = "../tests/abi/header.rs"]
mod header;

fn main() {
    print!("{}", header::generate());
}
