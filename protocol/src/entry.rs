//! Format of the shared page-table entries (x86-64).
//!
//! The bits are those of Intel SDM volume 3, section 5.5 (4-level and 5-level
//! paging) and AMD APM volume 2, section 5.3; which of them a Linux guest
//! accepts is decided by `pmd_bad()`, `pte_special()` and `pmd_special()` in
//! `arch/x86/include/asm/pgtable.h`. An entry in any other format makes a
//! guest kernel clear it (`pmd_clear_bad()`) or oops (reserved bit).
//!
//! ```text
//!   63   62..59  58..52   51..12          11..10  9        8  7  6  5  4..3  2   1   0
//!  +----+-------+--------+---------------+-------+--------+--+--+--+--+-----+---+---+---+
//!  | NX | pkey  |   0    | guest-phys    |   0   |SPECIAL |G |PS|D |A | 0   |US |RW |P  |
//!  |    |  = 0  |        | frame address |       |        |=0|  |  |  |     |   |   |   |
//!  +----+-------+--------+---------------+-------+--------+--+--+--+--+-----+---+---+---+
//! ```

/// Bytes in a page and in one page of a table.
pub const PAGE_SIZE: u64 = 4096;
/// Entries in one page of a table.
pub const ENTRIES: u64 = 512;
/// Bytes of address space that one PTE page (one PMD entry) maps: 2 MiB.
pub const PMD_SIZE: u64 = PAGE_SIZE * ENTRIES;
/// Bytes of address space that one PMD page (one link) maps: 1 GiB.
pub const PUD_SIZE: u64 = PMD_SIZE * ENTRIES;

/// Present.
pub const P: u64 = 1 << 0;
/// Writable.
pub const RW: u64 = 1 << 1;
/// User-mode access allowed.
pub const US: u64 = 1 << 2;
/// Accessed; preset, so that CPUs of many guests do not write shared lines.
pub const A: u64 = 1 << 5;
/// Dirty; preset on writable leaves, clear on read-only ones (RW = 0, D = 1
/// would be a shadow-stack page to a CPU with CET).
pub const D: u64 = 1 << 6;
/// Page size: this PMD entry is a leaf of 2 MiB. In a PTE the bit is PAT, and 0.
pub const PS: u64 = 1 << 7;
/// Software bit 9: `_PAGE_SPECIAL`, no `struct page` behind it.
pub const SPECIAL: u64 = 1 << 9;
/// No execute.
pub const NX: u64 = 1 << 63;
/// The frame address inside an entry.
pub const ADDR_MASK: u64 = 0x000f_ffff_ffff_f000;

/// Attributes of a PMD entry that points at a PTE page: exactly `_PAGE_TABLE`.
pub const TABLE_BITS: u64 = P | RW | US | A | D;
/// Attributes of a read-only leaf.
pub const LEAF_RO_BITS: u64 = P | US | A | SPECIAL | NX;
/// Attributes of a writable leaf.
pub const LEAF_RW_BITS: u64 = LEAF_RO_BITS | RW | D;

/// What processes may do with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "std", derive(serde::Serialize, serde::Deserialize))]
pub enum Prot {
    /// No access: the entry is zero (L1TF: no address is left in it).
    None,
    /// Reads only.
    Read,
    /// Reads and writes.
    ReadWrite,
}

impl Prot {
    /// Decodes the `prot` word of a request: `PROT_NONE` (0), `PROT_READ` (1)
    /// or `PROT_READ | PROT_WRITE` (3); `None` for anything else.
    #[must_use]
    pub const fn from_bits(prot: u32) -> Option<Self> {
        match prot {
            0 => Some(Self::None),
            1 => Some(Self::Read),
            3 => Some(Self::ReadWrite),
            _ => None,
        }
    }

    /// The `PROT_*` bits of `mmap(2)`.
    #[must_use]
    pub const fn bits(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Read => 1,
            Self::ReadWrite => 3,
        }
    }
}

/// The leaf entry for the page at guest-physical address `gpa`.
///
/// `gpa` must be page aligned and inside [`ADDR_MASK`]; other bits are
/// dropped, so that no caller can set an attribute through an address.
#[must_use]
pub const fn leaf(gpa: u64, prot: Prot) -> u64 {
    match prot {
        Prot::None => 0,
        Prot::Read => (gpa & ADDR_MASK) | LEAF_RO_BITS,
        Prot::ReadWrite => (gpa & ADDR_MASK) | LEAF_RW_BITS,
    }
}

/// The PMD entry that maps 2 MiB from guest-physical address `gpa` on.
///
/// `gpa` must be 2 MiB-aligned and inside [`ADDR_MASK`]; other bits are
/// dropped. There is none for [`Prot::None`]: zero in a PMD entry means that
/// the page is being written again.
#[must_use]
pub const fn huge_leaf(gpa: u64, prot: Prot) -> u64 {
    match leaf(gpa & !(PMD_SIZE - 1), prot) {
        0 => 0,
        entry => entry | PS,
    }
}

/// The PMD entry for the PTE page at guest-physical address `gpa`.
#[must_use]
pub const fn table(gpa: u64) -> u64 {
    (gpa & ADDR_MASK) | TABLE_BITS
}

/// An entry that no broker writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadEntry(
    /// The entry as found.
    pub u64,
);

/// Decodes a leaf entry to its address and protection; `Ok(None)` if absent.
///
/// # Errors
/// [`BadEntry`] if the attributes are none that [`leaf`] writes.
pub const fn decode_leaf(entry: u64) -> Result<Option<(u64, Prot)>, BadEntry> {
    let addr = entry & ADDR_MASK;
    match entry & !ADDR_MASK {
        0 if addr == 0 => Ok(None),
        LEAF_RO_BITS => Ok(Some((addr, Prot::Read))),
        LEAF_RW_BITS => Ok(Some((addr, Prot::ReadWrite))),
        _ => Err(BadEntry(entry)),
    }
}

/// Decodes a PMD entry that is a leaf to its address and protection;
/// `Ok(None)` if absent.
///
/// # Errors
/// [`BadEntry`] if it is none that [`huge_leaf`] writes.
pub const fn decode_huge_leaf(entry: u64) -> Result<Option<(u64, Prot)>, BadEntry> {
    if entry == 0 {
        return Ok(None);
    }
    match decode_leaf(entry & !PS) {
        Ok(Some((addr, prot))) if entry & PS != 0 && addr.is_multiple_of(PMD_SIZE) => {
            Ok(Some((addr, prot)))
        }
        _ => Err(BadEntry(entry)),
    }
}

/// Decodes a PMD entry to the address of its PTE page; `Ok(None)` if absent.
///
/// # Errors
/// [`BadEntry`] if the attributes are not [`TABLE_BITS`].
pub const fn decode_table(entry: u64) -> Result<Option<u64>, BadEntry> {
    match entry & !ADDR_MASK {
        0 if entry == 0 => Ok(None),
        TABLE_BITS => Ok(Some(entry & ADDR_MASK)),
        _ => Err(BadEntry(entry)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaf_decodes_to_what_was_encoded() {
        for prot in [Prot::Read, Prot::ReadWrite] {
            let entry = leaf(0x40_1234_5000, prot);
            assert_eq!(decode_leaf(entry), Ok(Some((0x40_1234_5000, prot))));
        }
        assert_eq!(decode_leaf(leaf(0x5000, Prot::None)), Ok(None));
    }

    #[test]
    fn huge_leaf_decodes_to_what_was_encoded_and_is_no_table() {
        for prot in [Prot::Read, Prot::ReadWrite] {
            let entry = huge_leaf(0x40_1220_0000, prot);
            assert_eq!(decode_huge_leaf(entry), Ok(Some((0x40_1220_0000, prot))));
            assert!(decode_table(entry).is_err() && decode_leaf(entry).is_err());
        }
        assert_eq!(huge_leaf(0x20_0000, Prot::None), 0);
        let astray = huge_leaf(0x20_0000, Prot::Read) | 0x1000;
        assert_eq!(decode_huge_leaf(astray), Err(BadEntry(astray)));
        let small = leaf(0x20_0000, Prot::Read);
        assert_eq!(decode_huge_leaf(small), Err(BadEntry(small)));
    }

    #[test]
    fn table_entry_is_exactly_page_table() {
        assert_eq!(table(0x7000), 0x7067);
        assert_eq!(decode_table(0x7067), Ok(Some(0x7000)));
        assert_eq!(decode_table(0x7065), Err(BadEntry(0x7065)));
    }

    #[test]
    fn read_only_leaf_has_no_dirty_bit() {
        assert_eq!(leaf(0x1000, Prot::Read) & (RW | D), 0);
    }

    #[test]
    fn address_cannot_set_attributes() {
        assert_eq!(leaf(!0, Prot::Read) & !ADDR_MASK, LEAF_RO_BITS);
    }
}
