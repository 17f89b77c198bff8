//! `boot_params`, the "zero page", and the command line (Linux
//! `Documentation/arch/x86/zero-page.rst`).

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::initrd::LoadedInitrd;
use crate::arch::layout;

/// "A boot loader without a number of its own."
const LOADER_UNDEFINED: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// Longest command line of a kernel without a header, in bytes.
const ELF_CMDLINE_MAX: u32 = 2047;

const E820_RAM: u32 = 1;
const E820_ACPI: u32 = 3;

/// Parameters that cannot be given to the kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line is too long.
    #[error("the kernel command line has {len} bytes; this kernel takes at most {max}")]
    CmdlineTooLong {
        /// Its length in bytes.
        len: usize,
        /// What the kernel takes.
        max: usize,
    },
    /// The command line could not be written.
    #[error("cannot write the kernel command line")]
    Cmdline(#[source] GuestMemoryError),
    /// The parameters could not be written.
    #[error("cannot write the kernel's boot parameters")]
    Write(#[source] linux_loader::configurator::Error),
}

/// What the kernel is told.
#[derive(Debug)]
pub struct Params<'a> {
    /// Bytes of memory.
    pub ram: u64,
    /// The command line.
    pub cmdline: &'a str,
    /// The header of a bzImage.
    pub header: Option<setup_header>,
    /// The initrd.
    pub initrd: Option<LoadedInitrd>,
    /// Guest-physical address of the ACPI root pointer.
    pub rsdp: u64,
}

/// The memory map.
fn e820(ram: u64) -> Vec<boot_e820_entry> {
    let entry = |addr, size, kind| boot_e820_entry {
        addr,
        size,
        r#type: kind,
    };
    let mut map = vec![
        entry(0, layout::LOW_RAM_END, E820_RAM),
        // Up to 1 MiB: the reset vector follows the tables.
        entry(layout::ACPI, layout::HIMEM - layout::ACPI, E820_ACPI),
    ];
    for (base, len) in layout::ram_ranges(ram) {
        let start = base.max(layout::HIMEM);
        let end = base + len;
        if end > start {
            map.push(entry(start, end - start, E820_RAM));
        }
    }
    map
}

/// Writes the command line and `boot_params`.
///
/// # Errors
///
/// The command line is too long for the kernel, or there is no RAM.
pub fn write(memory: &GuestMemoryMmap, params: &Params) -> Result<(), Error> {
    let mut page = boot_params {
        acpi_rsdp_addr: params.rsdp,
        hdr: params.header.unwrap_or(setup_header {
            boot_flag: BOOT_FLAG,
            header: HEADER_MAGIC,
            cmdline_size: ELF_CMDLINE_MAX,
            ..Default::default()
        }),
        ..Default::default()
    };
    let limit = usize::try_from(page.hdr.cmdline_size).unwrap_or(usize::MAX);
    let max = limit.min(layout::CMDLINE_MAX - 1);
    let len = params.cmdline.len();
    if len > max {
        return Err(Error::CmdlineTooLong { len, max });
    }
    memory
        .write_slice(params.cmdline.as_bytes(), GuestAddress(layout::CMDLINE))
        .and_then(|()| memory.write_obj(0_u8, GuestAddress(layout::CMDLINE + len as u64)))
        .map_err(Error::Cmdline)?;

    page.hdr.type_of_loader = LOADER_UNDEFINED;
    #[allow(clippy::cast_possible_truncation)] // below 1 MiB
    let cmdline = layout::CMDLINE as u32;
    page.hdr.cmd_line_ptr = cmdline;
    if let Some(initrd) = params.initrd {
        page.hdr.ramdisk_image = initrd.address;
        page.hdr.ramdisk_size = initrd.len;
    }
    for entry in e820(params.ram) {
        page.e820_table[usize::from(page.e820_entries)] = entry;
        page.e820_entries += 1;
    }
    let page = BootParams::new(&page, GuestAddress(layout::BOOT_PARAMS));
    LinuxBootConfigurator::write_bootparams(&page, memory).map_err(Error::Write)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x20_0000)]).unwrap()
    }

    fn params(cmdline: &str) -> Params<'_> {
        Params {
            ram: 0x20_0000,
            cmdline,
            header: None,
            initrd: None,
            rsdp: layout::ACPI,
        }
    }

    fn page(memory: &GuestMemoryMmap) -> boot_params {
        memory.read_obj(GuestAddress(layout::BOOT_PARAMS)).unwrap()
    }

    #[test]
    fn page_names_command_line_initrd_and_acpi() {
        let memory = memory();
        let mut params = params("console=ttyS0");
        params.initrd = Some(LoadedInitrd {
            address: 0x1f_f000,
            len: 77,
        });
        write(&memory, &params).unwrap();
        let page = page(&memory);
        assert_eq!({ page.hdr.ramdisk_image }, 0x1f_f000);
        assert_eq!({ page.hdr.ramdisk_size }, 77);
        assert_eq!({ page.acpi_rsdp_addr }, layout::ACPI);
        assert_eq!(page.hdr.type_of_loader, LOADER_UNDEFINED);
        let mut text = [0xff; 14];
        let at = GuestAddress({ page.hdr.cmd_line_ptr }.into());
        memory.read_slice(&mut text, at).unwrap();
        assert_eq!(&text, b"console=ttyS0\0");
    }

    #[test]
    fn memory_map_covers_ram_and_nothing_else() {
        let ram = layout::LOW_RAM_MAX + 0x4000_0000;
        let map: Vec<_> = e820(ram)
            .iter()
            .map(|e| (e.addr, e.size, e.r#type))
            .collect();
        assert_eq!(
            map,
            [
                (0, layout::LOW_RAM_END, E820_RAM),
                (layout::ACPI, 0x2_0000, E820_ACPI),
                (layout::HIMEM, layout::LOW_RAM_MAX - layout::HIMEM, E820_RAM),
                (layout::HIGH_RAM, 0x4000_0000, E820_RAM),
            ]
        );
    }

    #[test]
    fn long_command_line_is_refused_with_the_kernels_limit() {
        let memory = memory();
        let longest = "x".repeat(ELF_CMDLINE_MAX as usize);
        write(&memory, &params(&longest)).unwrap();
        let error = write(&memory, &params(&(longest + "x"))).unwrap_err();
        assert!(
            matches!(
                error,
                Error::CmdlineTooLong {
                    len: 2048,
                    max: 2047
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn huge_limit_of_a_kernel_is_cut_to_the_room_there_is() {
        let header = setup_header {
            cmdline_size: u32::MAX,
            ..Default::default()
        };
        let line = "x".repeat(layout::CMDLINE_MAX);
        let mut params = params(&line);
        params.header = Some(header);
        let error = write(&memory(), &params).unwrap_err();
        assert!(matches!(error, Error::CmdlineTooLong { max: 65535, .. }));
    }
}
