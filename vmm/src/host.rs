//! What a guest needs from the host, checked before anything is set up.

use std::io;
use std::time::Instant;

use kvm_ioctls::Kvm;

use crate::config::MemorySize;
use crate::doctor;
use crate::doctor::kernel_code::KernelCode;

/// The API version of every KVM since Linux 2.6.22.
const KVM_API_VERSION: i32 = 12;

/// A host that cannot run a guest.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no KVM.
    #[error(
        "there is no /dev/kvm: load the module kvm_intel or kvm_amd, or turn on virtualisation in the firmware (inside a virtual machine: nested virtualisation)"
    )]
    NoKvm,
    /// The user may not use KVM.
    #[error(
        "no permission to open /dev/kvm: add the user to the group that owns it, usually `kvm`"
    )]
    Permission,
    /// KVM cannot be opened for another reason.
    #[error("cannot open /dev/kvm")]
    Open(#[source] io::Error),
    /// A KVM from another world.
    #[error("/dev/kvm has API version {0}, and {KVM_API_VERSION} is needed")]
    ApiVersion(i32),
    /// Fewer vCPUs than asked for.
    #[error("{asked} vCPUs are asked for, and this host's KVM gives a guest at most {max}")]
    Cpus {
        /// Asked for.
        asked: u8,
        /// What KVM gives.
        max: usize,
    },
    /// Less memory than asked for.
    #[error("{asked} of memory are asked for, and this host has {total}")]
    Memory {
        /// Asked for.
        asked: MemorySize,
        /// What the host has.
        total: MemorySize,
    },
    /// KVM is there, but Linux would not boot on it.
    #[error("Linux guests cannot boot on this host's KVM: {0} (`vmm doctor` tells more)")]
    CannotBoot(String),
}

/// Opens KVM.
///
/// # Errors
///
/// There is none, or it cannot be used.
pub fn open_kvm() -> Result<Kvm, Error> {
    let kvm = Kvm::new().map_err(|e| match e.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => Error::NoKvm,
        libc::EACCES | libc::EPERM => Error::Permission,
        n => Error::Open(io::Error::from_raw_os_error(n)),
    })?;
    match kvm.get_api_version() {
        KVM_API_VERSION => Ok(kvm),
        version => Err(Error::ApiVersion(version)),
    }
}

/// Checks that this host can run a Linux guest with `cpus` vCPUs; returns what
/// was found about its kernel-mode code. Takes a few milliseconds where it can,
/// and less than a second where it cannot; where that is not clear within a
/// second, it says so and takes another five.
///
/// # Errors
///
/// It cannot.
pub fn check_guests(kvm: &Kvm, cpus: u8) -> Result<KernelCode, Error> {
    let max = kvm.get_max_vcpus();
    if usize::from(cpus) > max {
        return Err(Error::Cpus { asked: cpus, max });
    }
    let start = Instant::now();
    let code = doctor::probe_kernel_code(kvm);
    log::debug!("kernel-mode code probed in {:?}", start.elapsed());
    match code.obstacle() {
        None => Ok(code),
        Some(why) => Err(Error::CannotBoot(why)),
    }
}

/// The host's memory in bytes.
pub fn total_memory() -> u64 {
    let info = rustix::system::sysinfo();
    // The fields are unsigned long and unsigned int in every ABI.
    let (total, unit): (u64, u32) = (info.totalram, info.mem_unit);
    total.saturating_mul(unit.into())
}

/// Checks that the host has as much memory as the guest asks for. Less may be
/// free at the moment: a guest takes its memory only as it touches it.
///
/// # Errors
///
/// It has not.
pub fn check_memory(asked: MemorySize) -> Result<(), Error> {
    let total = MemorySize(total_memory());
    if asked > total {
        return Err(Error::Memory { asked, total });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_memory_than_the_host_has_is_refused() {
        let error = check_memory(MemorySize(total_memory() + 1)).unwrap_err();
        assert!(matches!(error, Error::Memory { .. }));
        check_memory(MemorySize(2 << 20)).unwrap();
    }
}
