//! Can guests share page tables? Only if the hardware walks the tables that
//! the host edits: with two-dimensional paging it does, with shadow paging it
//! walks copies that KVM made and does not notice the edit.
//!
//! The probe decides by trying. A guest in user mode reads one byte again and
//! again through a page table of its own. The host changes the translation as
//! the broker would: copy the page table, edit the copy, publish it in the
//! directory, punch the old page out of its file. The next read must see the
//! new page.

use std::io;
use std::time::Duration;

use kvm_bindings::KVM_CAP_PRE_FAULT_MEMORY;
use kvm_ioctls::Kvm;
use serde::Serialize;

use super::guest::{CODE, Mode, PROBE_PMD, PROBE_PTE, PROBE_VA, Stop, TinyGuest};
use crate::patience;

/// For the first try and, if it ran out of time, the second: the host may just
/// be busy.
pub(super) const LIMITS: [Duration; 2] = [Duration::from_millis(300), Duration::from_secs(3)];
/// What is said when time ran out.
const TIMED_OUT: &str = "the guest does not come back";
/// Reads before and after each edit, and edits.
const READS: usize = 3;
const ROUNDS: u64 = 4;
/// The kernel from which KVM_CAP_PRE_FAULT_MEMORY says whether there is
/// two-dimensional paging.
const PRE_FAULT_SINCE: (u32, u32) = (6, 11);

/// Pages of the probe: a page table for each round, then the data pages.
const FIRST_TABLE: u64 = 0x4_0000;
const FIRST_DATA: u64 = 0x8_0000;
const PAGE: u64 = 0x1000;
/// Present, writable, user, accessed, dirty.
const ENTRY: u64 = 0x67;

/// mov al, [rbx]; out PORT_OK, al; jmp back
const SPIN: [u8; 6] = [0x8a, 0x03, 0xe6, 0xf8, 0xeb, 0xfa];

/// What the guest saw after the host's edit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Edits {
    /// The new translation, every time.
    Seen,
    /// The old translation.
    Stale,
    /// Nothing: the probe did not run.
    Unknown(String),
}

/// What is known about the host's paging.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Tables {
    /// KVM_CAP_PRE_FAULT_MEMORY.
    pub pre_fault_memory: i32,
    /// The module parameter and its value, such as `kvm_intel.ept=Y`.
    pub module_parameter: Option<String>,
    /// Whether these say that there is two-dimensional paging.
    pub two_dimensional: Option<bool>,
    /// What the guest saw.
    pub edits: Edits,
}

impl Tables {
    /// Whether guests can share page tables.
    pub fn shareable(&self) -> bool {
        self.refusal().is_none()
    }

    /// Why guests cannot share page tables, or could not be tried; none if they
    /// can.
    pub fn refusal(&self) -> Option<String> {
        match &self.edits {
            Edits::Unknown(why) => Some(format!(
                "whether this host can share page tables could not be tried: {why}"
            )),
            Edits::Seen if self.two_dimensional != Some(false) => None,
            Edits::Seen | Edits::Stale => Some("this host cannot share page tables".into()),
        }
    }
}

/// Probes the host's paging. Where that takes more than a moment, it says so.
pub fn probe(kvm: &Kvm) -> Tables {
    let pre_fault_memory = kvm.check_extension_raw(KVM_CAP_PRE_FAULT_MEMORY.into());
    let parameter = module_parameter();
    let two_dimensional = judge(
        pre_fault_memory,
        kernel_version(),
        parameter.as_ref().map(|(_, on)| *on),
    );
    let try_edits =
        |limit| probe_edits(kvm, limit).unwrap_or_else(|e| Edits::Unknown(e.to_string()));
    let undecided = |edits: &Edits| *edits == Edits::Unknown(TIMED_OUT.into());
    let edits = patience::try_twice(LIMITS, try_edits, undecided, patience::say);
    Tables {
        pre_fault_memory,
        module_parameter: parameter.map(|(text, _)| text),
        two_dimensional,
        edits,
    }
}

/// Whether there is two-dimensional paging, as far as the host says.
fn judge(pre_fault: i32, kernel: Option<(u32, u32)>, parameter: Option<bool>) -> Option<bool> {
    if pre_fault > 0 {
        return Some(true);
    }
    match kernel {
        Some(version) if version >= PRE_FAULT_SINCE => Some(false),
        _ => parameter,
    }
}

fn kernel_version() -> Option<(u32, u32)> {
    let name = rustix::system::uname();
    parse_version(name.release().to_str().ok()?)
}

fn parse_version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn module_parameter() -> Option<(String, bool)> {
    [("kvm_intel", "ept"), ("kvm_amd", "npt")]
        .iter()
        .find_map(|(module, parameter)| {
            let path = format!("/sys/module/{module}/parameters/{parameter}");
            let value = std::fs::read_to_string(path).ok()?;
            let value = value.trim();
            let on = matches!(value, "Y" | "1");
            Some((format!("{module}.{parameter}={value}"), on))
        })
}

fn probe_edits(kvm: &Kvm, limit: Duration) -> io::Result<Edits> {
    let mut guest = TinyGuest::new(kvm, limit)?;
    let edits = edit(&mut guest)?;
    guest.retire();
    Ok(edits)
}

fn edit(guest: &mut TinyGuest) -> io::Result<Edits> {
    guest.copy(CODE, &SPIN);
    for round in 0..=ROUNDS {
        guest.copy(data_page(round), &[mark(round)]);
    }
    guest.store(PROBE_PTE, data_page(0) | ENTRY);
    guest.store(PROBE_PMD, PROBE_PTE | ENTRY);
    guest.set_registers(Mode::User, 0, CODE, PROBE_VA)?;
    let mut table = PROBE_PTE;
    for round in 0..=ROUNDS {
        for _ in 0..READS {
            match guest.run() {
                Stop::Ok(seen) if seen == mark(round) => {}
                Stop::Ok(_) if round > 0 => return Ok(Edits::Stale),
                Stop::TimeOut => return Ok(Edits::Unknown(TIMED_OUT.into())),
                other => return Ok(Edits::Unknown(format!("{other:?}"))),
            }
        }
        if round < ROUNDS {
            // Copy (one entry is all there is), edit, publish, punch.
            let copy = FIRST_TABLE + round * PAGE;
            guest.store(copy, data_page(round + 1) | ENTRY);
            guest.store(PROBE_PMD, copy | ENTRY);
            guest.punch(table)?;
            table = copy;
        }
    }
    Ok(Edits::Seen)
}

fn data_page(round: u64) -> u64 {
    FIRST_DATA + round * PAGE
}

#[allow(clippy::cast_possible_truncation)] // a few rounds
fn mark(round: u64) -> u8 {
    b'A' + round as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pre_fault_decides_on_new_kernels_and_the_parameter_on_old_ones() {
        assert_eq!(judge(1, None, Some(false)), Some(true));
        assert_eq!(judge(0, Some((6, 11)), Some(true)), Some(false));
        assert_eq!(judge(0, Some((6, 1)), Some(true)), Some(true));
        assert_eq!(judge(0, Some((6, 10)), None), None);
    }

    #[test]
    fn release_names_are_parsed() {
        assert_eq!(parse_version("6.12.113+deb12-cloud-amd64"), Some((6, 12)));
        assert_eq!(parse_version("5.10"), Some((5, 10)));
        assert_eq!(parse_version("odd"), None);
    }

    #[test]
    fn doubt_is_decided_by_what_the_guest_saw() {
        let tables = |two_dimensional, edits| Tables {
            pre_fault_memory: 0,
            module_parameter: None,
            two_dimensional,
            edits,
        };
        assert!(tables(None, Edits::Seen).shareable());
        assert!(tables(Some(true), Edits::Seen).shareable());
        assert!(!tables(Some(false), Edits::Seen).shareable());
        assert!(!tables(Some(true), Edits::Stale).shareable());
        assert!(!tables(None, Edits::Unknown(String::new())).shareable());
    }

    #[test]
    fn probe_gives_an_answer_where_there_is_kvm() {
        let Ok(kvm) = Kvm::new() else {
            return crate::doctor::tests::no_kvm_is_reported();
        };
        let tables = probe(&kvm);
        assert!(!matches!(tables.edits, Edits::Unknown(_)), "{tables:?}");
    }
}
