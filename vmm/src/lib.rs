//! A virtual machine monitor for Linux guests on KVM whose guests can share
//! page tables.
//!
//! ```text
//! cli ──> config ──> builder ──> machine          exit: how it ended
//!                      │ assembles  │ runs
//!        host, doctor  │            └─ threads: vcpu0.., devices
//!        (can it work?)│
//!                      ├─ vstate   KVM objects: memory, vm, vcpu
//!                      ├─ arch     the platform: layout, cpuid, registers, ACPI
//!                      ├─ boot     kernel, initrd, boot parameters
//!                      └─ devices  buses, serial port, I/O APIC, virtio
//! ```
//!
//! To run a guest from a program: fill a [`config::Config`], give it to
//! [`builder::Builder::new`], add devices, [`builder::Builder::build`], and
//! [`machine::Machine::run`].

pub mod agent_client;
pub mod arch;
pub mod boot;
pub mod builder;
pub mod cli;
pub mod config;
pub mod devices;
pub mod doctor;
pub mod exit;
pub mod host;
pub mod launch;
pub mod machine;
pub mod patience;
pub mod pool_service;
pub mod signals;
pub mod supervisor;
pub mod terminal;
pub mod vstate;
