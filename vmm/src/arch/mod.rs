//! The x86-64 platform: layout, CPU features, registers, ACPI tables.

pub mod acpi;
pub mod cpuid;
pub mod layout;
pub mod msrs;
pub mod regs;
