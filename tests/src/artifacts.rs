//! What guest tests and the demo need, and by which variables they are told
//! where it is: on this machine or in the lab, wherever they run.

use std::path::{Path, PathBuf};

/// Path of the `vmm` binary.
pub const VMM: &str = "MSHARE_VMM";
/// Path of the guest kernel, a bzImage.
pub const KERNEL: &str = "MSHARE_KERNEL";
/// Path of the same kernel as an ELF file; only tests need it.
pub const VMLINUX: &str = "MSHARE_VMLINUX";
/// Path of the guest initramfs.
pub const INITRD: &str = "MSHARE_INITRD";
/// Path of the guest kernel whose safety elements can be taken out.
pub const KERNEL_ABLATION: &str = "MSHARE_KERNEL_ABLATION";

/// The built things.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artifacts {
    /// The `vmm` binary.
    pub vmm: PathBuf,
    /// The guest kernel.
    pub kernel: PathBuf,
    /// The same kernel as an ELF file.
    pub vmlinux: PathBuf,
    /// The guest initramfs.
    pub initramfs: PathBuf,
    /// The kernel for ablations; only tests need it.
    pub ablation: Option<PathBuf>,
}

impl Artifacts {
    /// Variables and what they say on this machine.
    pub fn env(&self) -> Vec<(&'static str, &Path)> {
        self.places().map(|(name, here, _)| (name, here)).collect()
    }

    /// Variable, path on this machine and path in the lab.
    pub fn places(&self) -> impl Iterator<Item = (&'static str, &Path, &'static str)> {
        let ablation = self.ablation.as_deref();
        [
            (VMM, self.vmm.as_path(), "/bin/vmm"),
            (KERNEL, &self.kernel, "/guest/bzImage"),
            (VMLINUX, &self.vmlinux, "/guest/vmlinux"),
            (INITRD, &self.initramfs, "/guest/initramfs"),
        ]
        .into_iter()
        .chain(ablation.map(|path| (KERNEL_ABLATION, path, "/guest/bzImage-ablation")))
    }
}
