//! The kernel: a bzImage, or an ELF file (`vmlinux`).
//!
//! A bzImage goes to the address it prefers, an ELF file to the addresses of
//! its segments. Both are entered in 64-bit mode. Everything is checked before
//! the first byte is loaded, so that a wrong file gets an error that says what
//! it is instead.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use linux_loader::loader::bootparam::{XLF_KERNEL_64, setup_header};
use linux_loader::loader::{BzImage, Elf, Error as LoaderError, KernelLoader};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::open_regular;
use crate::arch::layout;

/// Offsets in a bzImage (Linux `Documentation/arch/x86/boot.rst`).
const SETUP_HEADER: usize = 0x1f1;
const BOOT_FLAG: usize = 0x1fe;
const MAGIC: usize = 0x202;
const SECTOR: u64 = 512;
/// Setup sectors if the header says none.
const DEFAULT_SETUP_SECTORS: u64 = 4;
/// The 64-bit entry point lies this far into the loaded kernel.
const ENTRY_64: u64 = 0x200;
/// Boot protocol 2.12, the first with a 64-bit entry point.
const PROTOCOL_64: u16 = 0x020c;
/// How much of the file the checks look at.
const HEAD: usize = 0x1000;

/// Offsets and values in an ELF header.
const ELF_CLASS: usize = 4;
const ELF_CLASS_64: u8 = 2;
const ELF_DATA: usize = 5;
const ELF_LITTLE_ENDIAN: u8 = 1;
const ELF_TYPE: usize = 16;
const ELF_TYPE_EXEC: u16 = 2;
const ELF_TYPE_DYN: u16 = 3;
const ELF_MACHINE: usize = 18;
const ELF_MACHINE_X86_64: u16 = 62;
const ELF_PHOFF: usize = 32;
const ELF_PHENTSIZE: usize = 54;
const ELF_PHNUM: usize = 56;
const ELF_HEADER_LEN: usize = 64;
const ELF_PHDR_LEN: usize = 56;
const PT_LOAD: u32 = 1;

/// A kernel that cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be opened.
    #[error("cannot open the kernel {0:?}")]
    Open(PathBuf, #[source] io::Error),
    /// The file cannot be read.
    #[error("cannot read the kernel {0:?}")]
    Read(PathBuf, #[source] io::Error),
    /// The file has no bytes.
    #[error("the kernel {0:?} is empty")]
    Empty(PathBuf),
    /// The file ends too early.
    #[error("the kernel {path:?} is truncated: it has {len} bytes and should have at least {need}")]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
        /// Bytes that its header speaks of.
        need: u64,
    },
    /// The file is something else.
    #[error(
        "{path:?} is not a kernel this VMM can start: it is {what}; give a bzImage or a vmlinux"
    )]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// What it looks like.
        what: &'static str,
    },
    /// The file is a kernel for another machine.
    #[error("the kernel {path:?} is for {what}, and this VMM runs x86-64 kernels")]
    WrongArchitecture {
        /// The file.
        path: PathBuf,
        /// The other machine.
        what: String,
    },
    /// The kernel is too old.
    #[error("the kernel {path:?} speaks boot protocol {major}.{minor}; 2.12 or later is needed")]
    OldProtocol {
        /// The file.
        path: PathBuf,
        /// Protocol version.
        major: u16,
        /// Protocol version.
        minor: u16,
    },
    /// The guest is too small for it.
    #[error(
        "the kernel {path:?} needs the guest's memory from {start:#x} to {end:#x}; \
         give the guest more memory"
    )]
    DoesNotFit {
        /// The file.
        path: PathBuf,
        /// First guest-physical address.
        start: u64,
        /// Guest-physical address after the last byte.
        end: u64,
    },
    /// The segments of an ELF kernel make no sense.
    #[error("the kernel {path:?} is damaged: {what}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
    /// The loader failed.
    #[error("cannot load the kernel {0:?}")]
    Load(PathBuf, #[source] LoaderError),
}

/// A kernel that has been checked but not loaded.
#[derive(Debug)]
pub struct Kernel {
    path: PathBuf,
    file: File,
    image: Image,
}

#[derive(Debug)]
enum Image {
    BzImage(Box<setup_header>),
    Elf {
        /// Lowest and highest guest-physical address.
        start: u64,
        end: u64,
    },
}

/// A kernel in guest memory.
#[derive(Debug)]
pub struct LoadedKernel {
    /// Guest-physical address of the 64-bit entry point.
    pub entry: u64,
    /// Guest-physical address after the last byte the kernel needs at first.
    pub end: u64,
    /// The header of a bzImage.
    pub header: Option<setup_header>,
}

fn u16_at(head: &[u8], offset: usize) -> u16 {
    let bytes = head.get(offset..offset + 2).unwrap_or(&[0, 0]);
    u16::from_le_bytes([bytes[0], bytes[1]])
}

fn u64_at(head: &[u8], offset: usize) -> u64 {
    let mut bytes = [0; 8];
    for (to, from) in bytes.iter_mut().zip(head.iter().skip(offset)) {
        *to = *from;
    }
    u64::from_le_bytes(bytes)
}

/// What a file that is no kernel looks like.
fn guess(head: &[u8]) -> &'static str {
    let starts = |magic: &[u8]| head.starts_with(magic);
    if starts(b"\x1f\x8b") {
        "gzip-compressed data"
    } else if starts(b"\x28\xb5\x2f\xfd") {
        "zstd-compressed data"
    } else if starts(b"\xfd7zXZ") {
        "xz-compressed data"
    } else if starts(b"070701") || starts(b"070702") {
        "a cpio archive (an initrd?)"
    } else if starts(b"MZ") {
        "an EFI program without the Linux boot header"
    } else if starts(b"#!") {
        "a script"
    } else if head
        .iter()
        .all(|b| b.is_ascii_graphic() || b.is_ascii_whitespace())
    {
        "text"
    } else {
        "neither a bzImage nor an ELF file"
    }
}

impl Kernel {
    /// Opens and checks the kernel at `path`.
    ///
    /// # Errors
    ///
    /// The file cannot be read or is not an x86-64 kernel.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let mut file = open_regular(path).map_err(|e| Error::Open(path.into(), e))?;
        let read_error = |e| Error::Read(path.into(), e);
        let len = file.metadata().map_err(read_error)?.len();
        if len == 0 {
            return Err(Error::Empty(path.into()));
        }
        let mut head = Vec::with_capacity(HEAD);
        (&file)
            .take(HEAD as u64)
            .read_to_end(&mut head)
            .map_err(read_error)?;
        let image = if head.starts_with(b"\x7fELF") {
            check_elf(path, &mut file, &head, len)?
        } else if head.get(0x38..0x3c) == Some(b"ARM\x64") {
            return Err(Error::WrongArchitecture {
                path: path.into(),
                what: "arm64".into(),
            });
        } else if head.get(MAGIC..MAGIC + 4) == Some(b"HdrS") && u16_at(&head, BOOT_FLAG) == 0xaa55
        {
            check_bzimage(path, &head, len)?
        } else {
            return Err(Error::NotAKernel {
                path: path.into(),
                what: guess(&head),
            });
        };
        Ok(Self {
            path: path.into(),
            file,
            image,
        })
    }

    /// Loads the kernel into guest memory.
    ///
    /// # Errors
    ///
    /// The guest's memory is too small, or the file changed meanwhile.
    pub fn load(mut self, memory: &GuestMemoryMmap) -> Result<LoadedKernel, Error> {
        match self.image {
            Image::BzImage(header) => {
                let (start, end) = (header.pref_address, {
                    let size = u64::from(header.init_size);
                    header.pref_address.saturating_add(size)
                });
                require(memory, &self.path, start, end)?;
                let at = Some(GuestAddress(start));
                let loaded = BzImage::load(memory, at, &mut self.file, None)
                    .map_err(|e| Error::Load(self.path, e))?;
                Ok(LoadedKernel {
                    entry: start + ENTRY_64,
                    end: end.max(loaded.kernel_end),
                    header: loaded.setup_header,
                })
            }
            Image::Elf { start, end } => {
                require(memory, &self.path, start, end)?;
                let himem = Some(GuestAddress(layout::HIMEM));
                let loaded = Elf::load(memory, None, &mut self.file, himem)
                    .map_err(|e| Error::Load(self.path, e))?;
                Ok(LoadedKernel {
                    entry: loaded.kernel_load.0,
                    end,
                    header: None,
                })
            }
        }
    }
}

/// Checks that the guest has RAM from `start` to `end`, above the first MiB.
fn require(memory: &GuestMemoryMmap, path: &Path, start: u64, end: u64) -> Result<(), Error> {
    let fits = end.checked_sub(start).is_some_and(|len| {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        len > 0 && memory.check_range(GuestAddress(start), len)
    });
    if fits && start >= layout::HIMEM {
        Ok(())
    } else {
        Err(Error::DoesNotFit {
            path: path.into(),
            start,
            end,
        })
    }
}

fn check_bzimage(path: &Path, head: &[u8], len: u64) -> Result<Image, Error> {
    let mut header = setup_header::default();
    let size = size_of::<setup_header>();
    let Some(bytes) = head.get(SETUP_HEADER..SETUP_HEADER + size) else {
        return Err(Error::Truncated {
            path: path.into(),
            len,
            need: (SETUP_HEADER + size) as u64,
        });
    };
    header.as_mut_slice().copy_from_slice(bytes);
    let version = header.version;
    if version < PROTOCOL_64 {
        return Err(Error::OldProtocol {
            path: path.into(),
            major: version >> 8,
            minor: version & 0xff,
        });
    }
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(Error::WrongArchitecture {
            path: path.into(),
            what: "32-bit x86".into(),
        });
    }
    let setup = match u64::from(header.setup_sects) {
        0 => DEFAULT_SETUP_SECTORS,
        n => n,
    };
    // The size of the kernel proper counts paragraphs of 16 bytes.
    let need = (setup + 1) * SECTOR + u64::from(header.syssize) * 16;
    // The last paragraph may be cut short.
    if len + 15 < need {
        return Err(Error::Truncated {
            path: path.into(),
            len,
            need,
        });
    }
    Ok(Image::BzImage(Box::new(header)))
}

fn machine(number: u16) -> String {
    match number {
        3 => "32-bit x86".into(),
        20 | 21 => "PowerPC".into(),
        22 => "s390".into(),
        40 => "32-bit Arm".into(),
        183 => "arm64".into(),
        243 => "RISC-V".into(),
        n => format!("ELF machine {n}"),
    }
}

fn check_elf(path: &Path, file: &mut File, head: &[u8], len: u64) -> Result<Image, Error> {
    let truncated = |need| Error::Truncated {
        path: path.into(),
        len,
        need,
    };
    let damaged = |what| Error::Damaged {
        path: path.into(),
        what,
    };
    if head.len() < ELF_HEADER_LEN {
        return Err(truncated(ELF_HEADER_LEN as u64));
    }
    if head[ELF_DATA] != ELF_LITTLE_ENDIAN {
        return Err(Error::WrongArchitecture {
            path: path.into(),
            what: "a big-endian machine".into(),
        });
    }
    let number = u16_at(head, ELF_MACHINE);
    if number != ELF_MACHINE_X86_64 || head[ELF_CLASS] != ELF_CLASS_64 {
        return Err(Error::WrongArchitecture {
            path: path.into(),
            what: machine(number),
        });
    }
    if !matches!(u16_at(head, ELF_TYPE), ELF_TYPE_EXEC | ELF_TYPE_DYN) {
        return Err(Error::NotAKernel {
            path: path.into(),
            what: "an ELF file that cannot be executed",
        });
    }
    let (table, count) = (u64_at(head, ELF_PHOFF), u64::from(u16_at(head, ELF_PHNUM)));
    if u64::from(u16_at(head, ELF_PHENTSIZE)) != ELF_PHDR_LEN as u64 && count > 0 {
        return Err(damaged("its program headers have an unknown size"));
    }
    let need = table.saturating_add(count * ELF_PHDR_LEN as u64);
    if len < need {
        return Err(truncated(need));
    }
    let (mut start, mut end) = (u64::MAX, 0);
    file.seek(SeekFrom::Start(table))
        .map_err(|e| Error::Read(path.into(), e))?;
    for _ in 0..count {
        let mut header = [0; ELF_PHDR_LEN];
        file.read_exact(&mut header)
            .map_err(|e| Error::Read(path.into(), e))?;
        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let (offset, paddr) = (u64_at(&header, 8), u64_at(&header, 24));
        let (in_file, in_memory) = (u64_at(&header, 32), u64_at(&header, 40));
        if kind != PT_LOAD || in_file == 0 {
            continue;
        }
        let need = offset.saturating_add(in_file);
        if len < need {
            return Err(truncated(need));
        }
        let last = paddr
            .checked_add(in_memory.max(in_file))
            .ok_or_else(|| damaged("a segment leaves the address space"))?;
        start = start.min(paddr);
        end = end.max(last);
    }
    if end == 0 {
        return Err(Error::NotAKernel {
            path: path.into(),
            what: "an ELF file without anything to load",
        });
    }
    // A program for Linux, not Linux, is linked to virtual addresses only; a
    // kernel's entry point is a physical address inside its segments.
    let entry = u64_at(head, 24);
    if !(start..end).contains(&entry) || start < layout::HIMEM {
        return Err(Error::NotAKernel {
            path: path.into(),
            what: "an ELF program whose entry point is not in its loadable memory above 1 MiB",
        });
    }
    Ok(Image::Elf { start, end })
}

#[cfg(test)]
mod tests;
