//! Model-specific registers that firmware would have set.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

/// `MTRRdefType`: MTRRs enabled, memory is write-back by default. Linux takes
/// the memory types of its mappings from here.
const MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE_WRITE_BACK: u64 = (1 << 11) | 6;
/// `IA32_MISC_ENABLE`: fast string operations.
const MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;

const BOOT_MSRS: [(u32, u64); 2] = [
    (MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK),
    (MISC_ENABLE, MISC_ENABLE_FAST_STRING),
];

/// An MSR that was not set.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The list of registers could not be built.
    #[error("cannot list the MSRs")]
    List,
    /// The ioctl failed.
    #[error("cannot set the MSRs")]
    Set(#[source] kvm_ioctls::Error),
    /// KVM stopped at this register.
    #[error("KVM does not take MSR {0:#x}")]
    Refused(u32),
}

/// Sets the registers of one vCPU.
///
/// # Errors
///
/// KVM refuses one of them.
pub fn set_boot_msrs(vcpu: &VcpuFd) -> Result<(), Error> {
    let entries = BOOT_MSRS.map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    });
    let msrs = Msrs::from_entries(&entries).map_err(|_| Error::List)?;
    let done = vcpu.set_msrs(&msrs).map_err(Error::Set)?;
    match BOOT_MSRS.get(done) {
        None => Ok(()),
        Some(&(index, _)) => Err(Error::Refused(index)),
    }
}
