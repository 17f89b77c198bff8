//! Where things lie in guest-physical memory.
//!
//! ```text
//! 0                                                             RAM
//! |-- 0x0500  GDT                  \
//! |-- 0x7000  boot_params           |  needed until Linux has its own
//! |-- 0x9000  page tables, 6 pages  |
//! |-- 0x20000 command line, 64 KiB /
//! 0x9_fc00    end of conventional memory
//! 0xe_0000    ACPI tables, the RSDP first
//! 0xf_fff0    what a PC's firmware would have here: code that resets
//! 0x10_0000   RAM: kernel, initrd at the top of low RAM
//! 0xc000_0000 (3 GiB) end of low RAM
//! 0xd000_0000 virtio-mmio transports, 4 KiB each
//! 0xfec0_0000 I/O APIC        0xfee0_0000 local APIC
//! 0xfffb_c000 identity map    0xfffb_d000 TSS (both used by KVM on Intel)
//! 0x1_0000_0000 (4 GiB) the rest of RAM
//! 0x40_0000_0000 (256 GiB) default window of the shared pool
//! ```

/// The global descriptor table used before Linux loads its own.
pub const GDT: u64 = 0x500;
/// Linux's `boot_params`, the "zero page".
pub const BOOT_PARAMS: u64 = 0x7000;
/// First of the boot page tables.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Room for the command line with its final NUL.
pub const CMDLINE_MAX: usize = 0x1_0000;
/// End of the memory a PC calls conventional.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// The ACPI tables; the RSDP is the first thing here.
pub const ACPI: u64 = 0xe_0000;
/// Room for the ACPI tables.
pub const ACPI_MAX: u64 = RESET_VECTOR - ACPI;
/// Where Linux jumps, in real mode, to have the firmware reset the machine.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Start of the memory above the first MiB, where kernels go.
pub const HIMEM: u64 = 0x10_0000;

/// End of the RAM below 4 GiB.
pub const LOW_RAM_MAX: u64 = 0xc000_0000;
/// Start of the RAM that does not fit below the devices.
pub const HIGH_RAM: u64 = 0x1_0000_0000;
/// Default start of the window in which a guest sees the shared pool.
pub const WINDOW: u64 = 0x40_0000_0000;
/// Most memory a guest can have, in bytes: RAM ends where the window starts.
pub const RAM_MAX: u64 = WINDOW - HIGH_RAM + LOW_RAM_MAX;

/// First virtio-mmio transport.
pub const MMIO_DEVICES: u64 = 0xd000_0000;
/// Bytes of one virtio-mmio transport.
pub const MMIO_DEVICE_LEN: u64 = 0x1000;
/// Byte offset of the virtio-mmio register `QueueNotify` (virtio 1.2, 4.2.2).
pub const MMIO_QUEUE_NOTIFY: u64 = 0x50;
/// Interrupt of the first virtio-mmio transport.
pub const MMIO_FIRST_GSI: u32 = 5;

/// The I/O APIC.
pub const IOAPIC: u64 = 0xfec0_0000;
/// Bytes of the I/O APIC's registers.
pub const IOAPIC_LEN: u64 = 0x1000;
/// Interrupt inputs of the I/O APIC.
pub const IOAPIC_PINS: u32 = 24;
/// The local APICs.
pub const LAPIC: u64 = 0xfee0_0000;
/// A page KVM uses on Intel CPUs without unrestricted guest mode.
pub const IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages KVM uses on Intel CPUs without unrestricted guest mode.
pub const TSS: u64 = 0xfffb_d000;

/// First port of the serial port COM1.
pub const COM1: u16 = 0x3f8;
/// Ports of a serial port.
pub const COM1_LEN: u16 = 8;
/// Interrupt of COM1.
pub const COM1_GSI: u32 = 4;
/// Port of the panic notifier (the same as in QEMU).
pub const PVPANIC: u16 = 0x505;
/// First port of the power block: sleep control, sleep status, reset.
pub const POWER: u16 = 0x600;
/// Ports of the power block.
pub const POWER_LEN: u16 = 3;

/// Most vCPUs of a guest.
pub const MAX_CPUS: u8 = 32;
/// Most virtio-mmio transports: as many as the I/O APIC has inputs left.
pub const MAX_MMIO_DEVICES: u32 = IOAPIC_PINS - MMIO_FIRST_GSI;

/// Guest-physical address of virtio-mmio transport `slot`.
pub const fn mmio_base(slot: u32) -> u64 {
    MMIO_DEVICES + slot as u64 * MMIO_DEVICE_LEN
}

/// Interrupt of virtio-mmio transport `slot`.
pub const fn mmio_gsi(slot: u32) -> u32 {
    MMIO_FIRST_GSI + slot
}

/// Where no memory may be shown to a guest: from the first virtio-mmio
/// transport over the APICs and KVM's own pages to 4 GiB.
pub const DEVICES: std::ops::Range<u64> = MMIO_DEVICES..HIGH_RAM;

/// The ranges of RAM of a guest with `bytes` of memory, as (address, length).
pub fn ram_ranges(bytes: u64) -> Vec<(u64, u64)> {
    if bytes <= LOW_RAM_MAX {
        vec![(0, bytes)]
    } else {
        vec![(0, LOW_RAM_MAX), (HIGH_RAM, bytes - LOW_RAM_MAX)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_below_the_hole_is_one_range() {
        assert_eq!(ram_ranges(LOW_RAM_MAX), [(0, LOW_RAM_MAX)]);
    }

    #[test]
    fn ram_beyond_the_hole_goes_on_at_4_gib() {
        assert_eq!(
            ram_ranges(LOW_RAM_MAX + 0x20_0000),
            [(0, LOW_RAM_MAX), (HIGH_RAM, 0x20_0000)]
        );
    }

    #[test]
    fn largest_ram_ends_at_the_window() {
        let (base, len) = ram_ranges(RAM_MAX)[1];
        assert_eq!(base + len, WINDOW);
    }

    #[test]
    fn devices_lie_in_their_range_and_transports_below_the_io_apic() {
        let last = MAX_MMIO_DEVICES - 1;
        assert!(mmio_base(last) + MMIO_DEVICE_LEN <= IOAPIC);
        assert!(mmio_gsi(last) < IOAPIC_PINS);
        for place in [
            mmio_base(0),
            mmio_base(last),
            IOAPIC,
            LAPIC,
            IDENTITY_MAP,
            TSS,
        ] {
            assert!(DEVICES.contains(&place), "{place:#x}");
        }
    }
}
