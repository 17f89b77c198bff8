//! The objects KVM gives us, each with its invariants: memory, the virtual
//! machine, its virtual CPUs.

pub mod memory;
pub mod vcpu;
pub mod vm;
