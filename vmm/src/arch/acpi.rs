//! The ACPI tables, which tell the guest about everything that is not a CPU
//! feature: hardware-reduced ACPI (ACPI 6.5, 4.1), so no PM timer, no SCI, no
//! legacy devices.
//!
//! ```text
//! RSDP -> XSDT -> FADT -> DSDT (CPUs, COM1, virtio-mmio, panic notifier)
//!              -> MADT (local APICs, I/O APIC)
//! ```

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::layout;
use crate::devices::power;

const OEM_ID: [u8; 6] = *b"MSHARE";
const OEM_TABLE_ID: [u8; 8] = *b"MSHAREVM";
const OEM_REVISION: u32 = 1;

/// FADT boot architecture flags: no VGA, no CMOS clock (and no 8042: its bit
/// is clear).
const BOOT_ARCH: u16 = (1 << 2) | (1 << 5);
/// `_STA`: present, enabled, shown, working.
const STATUS_PRESENT: u8 = 0xf;

/// Tables that do not fit where they belong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Too many devices.
    #[error("the ACPI tables need more than {0} bytes")]
    TooLarge(u64),
    /// There is no RAM for them.
    #[error("cannot write the ACPI tables")]
    Write(#[source] GuestMemoryError),
}

/// What the tables describe.
#[derive(Debug, Clone, Copy)]
pub struct Platform {
    /// Number of CPUs; CPU n has APIC id n.
    pub cpus: u8,
    /// Number of virtio-mmio transports, in slots 0, 1, ...
    pub mmio_devices: u32,
}

/// Bytes of AML.
struct Bytecode(Vec<u8>);

impl AmlSink for Bytecode {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut sink = Bytecode(Vec::new());
    table.to_aml_bytes(&mut sink);
    sink.0
}

fn name(name: &str, value: &dyn Aml) -> Name {
    Name::new(Path::new(name), value)
}

/// An edge-triggered, active-high interrupt of one device.
fn interrupt(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

/// A device with a hardware id, a number and resources.
fn device(path: &str, hid: &dyn Aml, uid: u32, resources: Vec<&dyn Aml>) -> Vec<u8> {
    bytes(&Device::new(
        Path::new(path),
        vec![
            &name("_HID", hid),
            &name("_UID", &uid),
            &name("_STA", &STATUS_PRESENT),
            &name("_CRS", &ResourceTemplate::new(resources)),
        ],
    ))
}

fn cpu(id: u8) -> Vec<u8> {
    bytes(&Device::new(
        Path::new(&format!("C{id:03}")),
        vec![&name("_HID", &"ACPI0007"), &name("_UID", &id)],
    ))
}

fn com1() -> Vec<u8> {
    // One byte is enough for the number of ports.
    #[allow(clippy::cast_possible_truncation)]
    let ports = IO::new(layout::COM1, layout::COM1, 1, layout::COM1_LEN as u8);
    let irq = interrupt(layout::COM1_GSI);
    device("COM1", &EISAName::new("PNP0501"), 0, vec![&ports, &irq])
}

fn pvpanic() -> Vec<u8> {
    let port = IO::new(layout::PVPANIC, layout::PVPANIC, 1, 1);
    device("PEVT", &"QEMU0001", 0, vec![&port])
}

fn virtio_mmio(slot: u32) -> Vec<u8> {
    // The transports lie below 4 GiB.
    #[allow(clippy::cast_possible_truncation)]
    let registers = Memory32Fixed::new(
        true,
        layout::mmio_base(slot) as u32,
        layout::MMIO_DEVICE_LEN as u32,
    );
    let irq = interrupt(layout::mmio_gsi(slot));
    device(
        &format!("V{slot:03}"),
        &"LNRO0005",
        slot,
        vec![&registers, &irq],
    )
}

/// AML that is bytes already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn dsdt(platform: Platform) -> Vec<u8> {
    let mut devices = vec![Raw(com1()), Raw(pvpanic())];
    devices.extend((0..platform.cpus).map(|id| Raw(cpu(id))));
    devices.extend((0..platform.mmio_devices).map(|slot| Raw(virtio_mmio(slot))));
    let devices = devices.iter().map(|d| d as &dyn Aml).collect();
    let scope = Scope::new(Path::new("\\_SB_"), devices);
    let off = Package::new(vec![&power::SLEEP_TYPE_OFF, &0_u8, &0_u8, &0_u8]);
    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&bytes(&scope));
    table.append_slice(&bytes(&name("\\_S5_", &off)));
    table.update_checksum();
    table.as_slice().to_vec()
}

fn power_register(port: u16) -> GAS {
    let address = u64::from(layout::POWER + port);
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        address,
    )
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let mut table = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    table.iapc_boot_arch = BOOT_ARCH.into();
    table.reset_reg = power_register(power::RESET);
    table.reset_value = power::RESET_VALUE;
    table.sleep_control_reg = power_register(power::SLEEP_CONTROL);
    table.sleep_status_reg = power_register(power::SLEEP_STATUS);
    bytes(&table.finalize())
}

fn madt(cpus: u8) -> Vec<u8> {
    // Both lie below 4 GiB.
    #[allow(clippy::cast_possible_truncation)]
    let (lapic, ioapic) = (layout::LAPIC as u32, layout::IOAPIC as u32);
    let local = LocalInterruptController::Address(lapic);
    let mut table = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, local);
    for id in 0..cpus {
        table.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    table.add_structure(IoApic::new(0, ioapic, 0));
    bytes(&table)
}

/// Tables that are placed one after the other.
struct Placer<'a> {
    memory: &'a GuestMemoryMmap,
    next: u64,
}

impl Placer<'_> {
    fn place(&mut self, table: &[u8]) -> Result<u64, Error> {
        let address = self.next;
        let end = address + table.len() as u64;
        if end > layout::ACPI + layout::ACPI_MAX {
            return Err(Error::TooLarge(layout::ACPI_MAX));
        }
        self.memory
            .write_slice(table, GuestAddress(address))
            .map_err(Error::Write)?;
        self.next = end.next_multiple_of(16);
        Ok(address)
    }
}

/// Writes the tables to guest memory; returns the address of the RSDP.
///
/// # Errors
///
/// They do not fit.
pub fn write_tables(memory: &GuestMemoryMmap, platform: Platform) -> Result<u64, Error> {
    let mut placer = Placer {
        memory,
        next: (layout::ACPI + Rsdp::len() as u64).next_multiple_of(16),
    };
    let dsdt = placer.place(&dsdt(platform))?;
    let fadt = placer.place(&fadt(dsdt))?;
    let madt = placer.place(&madt(platform.cpus))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = placer.place(&bytes(&xsdt))?;
    placer.next = layout::ACPI;
    placer.place(&bytes(&Rsdp::new(OEM_ID, xsdt)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x20_0000)]).unwrap()
    }

    fn read(memory: &GuestMemoryMmap, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        memory.read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }

    fn table(memory: &GuestMemoryMmap, address: u64) -> Vec<u8> {
        let len: u32 = memory.read_obj(GuestAddress(address + 4)).unwrap();
        read(memory, address, len as usize)
    }

    fn u64_at(data: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(data[offset..offset + 8].try_into().unwrap())
    }

    fn sum(data: &[u8]) -> u8 {
        data.iter().fold(0, |sum, b| sum.wrapping_add(*b))
    }

    const LARGEST: Platform = Platform {
        cpus: layout::MAX_CPUS,
        mmio_devices: layout::MAX_MMIO_DEVICES,
    };

    #[test]
    fn tables_are_linked_and_their_checksums_hold() {
        let memory = memory();
        let rsdp = write_tables(&memory, LARGEST).unwrap();
        assert_eq!(rsdp, layout::ACPI);
        let rsdp = read(&memory, rsdp, Rsdp::len());
        assert_eq!((&rsdp[..8], sum(&rsdp)), (&b"RSD PTR "[..], 0));
        let xsdt = table(&memory, u64_at(&rsdp, 24));
        assert_eq!(
            (&xsdt[..4], sum(&xsdt), xsdt.len()),
            (&b"XSDT"[..], 0, 36 + 16)
        );
        let fadt = table(&memory, u64_at(&xsdt, 36));
        let madt = table(&memory, u64_at(&xsdt, 44));
        let dsdt = table(&memory, u64_at(&fadt, 140));
        for (table, signature) in [(&fadt, b"FACP"), (&madt, b"APIC"), (&dsdt, b"DSDT")] {
            assert_eq!((&table[..4], sum(table)), (&signature[..], 0));
        }
    }

    #[test]
    fn fadt_is_hardware_reduced_with_sleep_and_reset_registers() {
        let fadt = fadt(0x1234);
        let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
        assert_eq!(flags & ((1 << 20) | (1 << 10)), (1 << 20) | (1 << 10));
        // Generic addresses: space, width, offset, access size, address.
        assert_eq!(fadt[116..120], [1, 8, 0, 1]);
        assert_eq!(u64_at(&fadt, 120), u64::from(layout::POWER + power::RESET));
        assert_eq!(fadt[128], power::RESET_VALUE);
        assert_eq!(u64_at(&fadt, 248), u64::from(layout::POWER));
        assert_eq!(u64_at(&fadt, 260), u64::from(layout::POWER + 1));
        // Boot architecture: neither an 8042 (bit 1) nor a CMOS clock (bit 5 set).
        assert_eq!(fadt[109] & 0b10_0010, 0b10_0000);
    }

    #[test]
    fn madt_lists_each_cpu_and_the_io_apic() {
        let madt = madt(3);
        assert_eq!(madt.len(), 44 + 3 * 8 + 12);
        assert_eq!(madt[44 + 16..44 + 24], [0, 8, 2, 2, 1, 0, 0, 0]);
        assert_eq!(madt[44 + 24..44 + 26], [1, 12]);
    }

    #[test]
    fn dsdt_describes_each_device_once() {
        let dsdt = dsdt(Platform {
            cpus: 2,
            mmio_devices: 3,
        });
        let count = |text: &[u8]| dsdt.windows(text.len()).filter(|w| *w == text).count();
        assert_eq!(count(b"LNRO0005"), 3);
        assert_eq!(count(b"ACPI0007"), 2);
        assert_eq!(count(b"QEMU0001"), 1);
        assert_eq!(count(b"V002"), 1);
        assert_eq!(count(b"_S5_"), 1);
        let base = u32::try_from(layout::mmio_base(2)).unwrap().to_le_bytes();
        assert_eq!(count(&base), 1);
    }

    #[test]
    fn tables_without_ram_are_an_error() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        assert!(matches!(
            write_tables(&memory, LARGEST),
            Err(Error::Write(_))
        ));
    }
}
