//! Registers, descriptors and page tables of the boot processor at the kernel's
//! 64-bit entry point (Linux `Documentation/arch/x86/boot.rst`, "64-bit Boot
//! Protocol"): long mode, the first 4 GiB mapped one to one, flat segments,
//! interrupts off, RSI pointing at `boot_params`.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::layout;
use crate::devices::power;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const PTE_PRESENT_RW: u64 = 0b11;
const PDE_LARGE: u64 = 1 << 7;
/// GiB that are mapped one to one.
const IDENTITY_GIB: u64 = 4;

/// Selectors that Linux expects (`__BOOT_CS`, `__BOOT_DS`).
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const CODE_DESCRIPTOR: u64 = 0x00af_9b00_0000_ffff;
const DATA_DESCRIPTOR: u64 = 0x00cf_9300_0000_ffff;
const GDT_ENTRIES: [u64; 4] = [0, 0, CODE_DESCRIPTOR, DATA_DESCRIPTOR];
const GDT_LIMIT: u16 = 31;

/// The unpacked form of a flat segment descriptor.
const fn flat_segment(selector: u16, code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: if code { 0xb } else { 0x3 },
        present: 1,
        dpl: 0,
        db: if code { 0 } else { 1 },
        s: 1,
        l: if code { 1 } else { 0 },
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// Real-mode code at the reset vector: Linux built with EFI support jumps here
/// to reboot a machine with hardware-reduced ACPI.
///
/// mov dx, reset port; mov al, reset value; out dx, al; 1: hlt; jmp 1b
fn reset_code() -> [u8; 9] {
    let [low, high] = (layout::POWER + power::RESET).to_le_bytes();
    [
        0xba,
        low,
        high,
        0xb0,
        power::RESET_VALUE,
        0xee,
        0xf4,
        0xeb,
        0xfd,
    ]
}

/// Writes the descriptor table, the page tables and the code at the reset
/// vector.
///
/// # Errors
///
/// Guest RAM does not reach that far.
pub fn write_tables(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    for (address, entry) in (layout::GDT..).step_by(8).zip(GDT_ENTRIES) {
        memory.write_obj(entry, GuestAddress(address))?;
    }
    memory.write_slice(&reset_code(), GuestAddress(layout::RESET_VECTOR))?;
    let pml4 = layout::PAGE_TABLES;
    let pdpt = pml4 + 0x1000;
    let first_pd = pdpt + 0x1000;
    memory.write_obj(pdpt | PTE_PRESENT_RW, GuestAddress(pml4))?;
    for gib in 0..IDENTITY_GIB {
        let pd = first_pd + gib * 0x1000;
        memory.write_obj(pd | PTE_PRESENT_RW, GuestAddress(pdpt + gib * 8))?;
        for i in 0..512 {
            let entry = (gib << 30) | (i << 21) | PDE_LARGE | PTE_PRESENT_RW;
            memory.write_obj(entry, GuestAddress(pd + i * 8))?;
        }
    }
    Ok(())
}

/// Turns the reset state `sregs` into the state at the kernel's entry.
pub fn set_boot_sregs(sregs: &mut kvm_sregs) {
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = GDT_LIMIT;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cs = flat_segment(CODE_SELECTOR, true);
    let data = flat_segment(DATA_SELECTOR, false);
    sregs.ds = data;
    sregs.es = data;
    sregs.ss = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.cr3 = layout::PAGE_TABLES;
    sregs.cr4 = CR4_PAE;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
    sregs.efer = EFER_LME | EFER_LMA;
}

/// General registers for a kernel that starts at guest-physical `entry`.
pub fn boot_regs(entry: u64) -> kvm_regs {
    kvm_regs {
        rip: entry,
        rsi: layout::BOOT_PARAMS,
        // Bit 1 always reads as one.
        rflags: 2,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap()
    }

    fn entry(memory: &GuestMemoryMmap, table: u64, index: u64) -> u64 {
        memory.read_obj(GuestAddress(table + index * 8)).unwrap()
    }

    #[test]
    fn page_tables_map_4_gib_one_to_one() {
        let memory = memory();
        write_tables(&memory).unwrap();
        for address in [0, 0x20_0000, 0x1234_5678, 0xffff_ffff_u64] {
            let pml4e = entry(&memory, layout::PAGE_TABLES, address >> 39);
            let pdpte = entry(&memory, pml4e & !0xfff, (address >> 30) & 511);
            let pde = entry(&memory, pdpte & !0xfff, (address >> 21) & 511);
            assert_eq!(pde & !0x1f_ffff, address & !0x1f_ffff);
            assert_eq!(pde & 0xfff, PDE_LARGE | PTE_PRESENT_RW);
        }
    }

    #[test]
    fn reset_vector_writes_the_reset_register() {
        let memory = memory();
        write_tables(&memory).unwrap();
        let mut code = [0; 6];
        memory
            .read_slice(&mut code, GuestAddress(0xf_fff0))
            .unwrap();
        assert_eq!(code, [0xba, 0x02, 0x06, 0xb0, 0x01, 0xee]);
    }

    #[test]
    fn tables_stay_clear_of_boot_params_and_command_line() {
        let end = layout::PAGE_TABLES + (2 + IDENTITY_GIB) * 0x1000;
        let order = [
            layout::BOOT_PARAMS + 0x1000,
            layout::PAGE_TABLES,
            end,
            layout::CMDLINE,
            layout::CMDLINE + layout::CMDLINE_MAX as u64,
            layout::LOW_RAM_END,
        ];
        assert!(order.is_sorted(), "{order:x?}");
    }

    #[test]
    fn boot_regs_point_at_entry_and_boot_params() {
        let regs = boot_regs(0x100_0200);
        assert_eq!((regs.rip, regs.rsi), (0x100_0200, layout::BOOT_PARAMS));
        assert_eq!(regs.rflags & (1 << 9), 0, "interrupts are off");
    }

    #[test]
    fn sregs_select_the_descriptors_of_the_table() {
        let mut sregs = kvm_sregs::default();
        set_boot_sregs(&mut sregs);
        assert_eq!(
            GDT_ENTRIES[usize::from(sregs.cs.selector) / 8],
            CODE_DESCRIPTOR
        );
        assert_eq!(
            GDT_ENTRIES[usize::from(sregs.ds.selector) / 8],
            DATA_DESCRIPTOR
        );
        assert_eq!(usize::from(GDT_LIMIT) + 1, GDT_ENTRIES.len() * 8);
    }
}
