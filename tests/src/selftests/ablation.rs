//! Runs in which one safety element of the kernel is missing and the tests
//! that stand for it have to fail. A run that passes all the same says that
//! the tests prove nothing.

use std::path::Path;

use super::list::{ENTRIES, Entry};
use super::tap::Verdict;
use super::{Flavour, Guest, Job, Run, SelftestError};

/// One element and what shows that it is missing.
#[derive(Debug, Clone, Copy)]
pub struct Ablation {
    /// `mshare_ablate=`.
    pub mask: u32,
    /// The element.
    pub element: &'static str,
    /// The entry of the list that must fail.
    pub entry: &'static str,
    /// In the names of tests that must fail: each at least once.
    pub fails: &'static [&'static str],
    /// In the kernel's complaints, where the element keeps the kernel itself
    /// from harm.
    pub complaint: Option<&'static str>,
    /// The kernel that has the switches.
    pub kernel: Flavour,
}

/// All of them. docs/testing.md has the table.
pub const ABLATIONS: &[Ablation] = &[
    Ablation {
        mask: 1,
        element: "a dropped link is flushed page by page, and as a table",
        entry: "mshare_protect",
        fails: &["no_read_after_munmap"],
        complaint: None,
        kernel: Flavour::Ablation,
    },
    Ablation {
        mask: 2,
        element: "GUP-fast looks at the link's right to write",
        entry: "mshare_rights",
        fails: &["direct_io"],
        complaint: None,
        kernel: Flavour::Ablation,
    },
    Ablation {
        mask: 8,
        element: "flushes of the region's mm reach attached processes",
        entry: "mshare_protect",
        fails: &[
            "no_write_after_protect_read",
            "no_read_after_protect_none",
            "no_old_data_after_discard",
        ],
        complaint: None,
        kernel: Flavour::Ablation,
    },
    Ablation {
        mask: 8,
        element: "the same, where an entry maps 2 MiB",
        entry: "mshare_huge",
        fails: &["protect_of_a_part", "protect_of_the_whole"],
        complaint: None,
        kernel: Flavour::Ablation,
    },
    Ablation {
        mask: 8192,
        element: "PROT_NONE removes entries, which get_user_pages() trusts",
        entry: "mshare_protect",
        fails: &["none_means_nobody"],
        complaint: None,
        kernel: Flavour::Ablation,
    },
    Ablation {
        mask: 16384,
        element: "who touches a region first is charged",
        entry: "mshare_reclaim",
        fails: &["charge", "limited"],
        complaint: None,
        kernel: Flavour::Ablation,
    },
    Ablation {
        mask: 16,
        element: "folio_walk_start() stays out of linked tables",
        entry: "mshare_walkers",
        fails: &["move_pages"],
        complaint: None,
        kernel: Flavour::Debug,
    },
    Ablation {
        mask: 65536,
        element: "reclaim for a memcg sees references to a region",
        entry: "mshare_reclaim",
        fails: &["working_set"],
        complaint: None,
        kernel: Flavour::Ablation,
    },
    Ablation {
        mask: 2048,
        element: "page walks stay out of linked tables",
        entry: "mshare_walkers",
        fails: &["smaps"],
        complaint: None,
        kernel: Flavour::Ablation,
    },
    Ablation {
        mask: 4096,
        element: "no MMU notifiers together with linked tables",
        entry: "mshare_notifier",
        fails: &["attached_first", "watched_first"],
        complaint: None,
        kernel: Flavour::Debug,
    },
    Ablation {
        mask: 131_072,
        element: "NUMA balancing stays out of linked tables",
        entry: "mshare_walkers",
        fails: &["numa_balancing"],
        complaint: None,
        kernel: Flavour::Debug,
    },
    Ablation {
        mask: 262_144,
        element: "an idle CPU forgets the mm with its first flush",
        entry: "mshare_hotplug",
        fails: &["idle"],
        complaint: None,
        kernel: Flavour::Ablation,
    },
    Ablation {
        mask: 128,
        element: "no mmap_lock of a host mm under a VMA lock",
        entry: "mshare_protect",
        fails: &[],
        complaint: Some("possible circular"),
        kernel: Flavour::Debug,
    },
];

impl Ablation {
    /// The list's entry; `None` if the list has none of that name.
    pub fn entry(&self) -> Option<&'static Entry> {
        ENTRIES.iter().find(|entry| entry.label() == self.entry)
    }

    /// The job: the entry's, without the element.
    pub fn job(&self, entry: &Entry, programs: &Path) -> Job {
        let mut job = entry.job(programs);
        job.label = format!("{}, mshare_ablate={}", job.label, self.mask);
        job.shape.append = format!("{} mshare_ablate={}", job.shape.append, self.mask);
        job
    }

    /// Runs it.
    pub fn run(&self, entry: &Entry, guest: &Guest, programs: &Path) -> Result<Run, SelftestError> {
        guest.run(&self.job(entry, programs))
    }

    /// What should have been seen and was not.
    pub fn unseen(&self, run: &Run) -> Vec<String> {
        let failed = |name: &&&str| {
            !run.report
                .tests
                .iter()
                .any(|test| test.verdict == Verdict::Failed && test.name.contains(**name))
        };
        let mut unseen: Vec<String> = self
            .fails
            .iter()
            .filter(failed)
            .map(|name| format!("no failed test '{name}' without the element"))
            .collect();
        if let Some(complaint) = self.complaint
            && !run.complaints.iter().any(|line| line.contains(complaint))
        {
            unseen.push(format!("the kernel did not say '{complaint}'"));
        }
        unseen
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::tap;
    use super::*;

    #[test]
    fn each_ablation_has_an_entry_and_something_to_see() {
        for ablation in ABLATIONS {
            assert!(ablation.entry().is_some(), "{}", ablation.entry);
            assert!(
                !ablation.fails.is_empty() || ablation.complaint.is_some(),
                "mask {} cannot fail",
                ablation.mask
            );
            assert!(ablation.mask.is_power_of_two());
        }
    }

    #[test]
    fn test_that_passes_without_the_element_is_told() {
        let ablation = Ablation {
            mask: 1,
            element: "flush",
            entry: "x",
            fails: &["munmap"],
            complaint: Some("BUG:"),
            kernel: Flavour::Ablation,
        };
        let mut run = Run {
            report: tap::read("TAP version 13\n1..1\nok 1 munmap\n".lines(), Some(0)),
            status: Some(0),
            complaints: Vec::new(),
            console: String::new(),
            retries: 0,
            took: Duration::ZERO,
        };
        assert_eq!(ablation.unseen(&run).len(), 2);
        run.report = tap::read("TAP version 13\n1..1\nnot ok 1 munmap\n".lines(), Some(1));
        run.complaints.push("BUG: here".into());
        assert_eq!(ablation.unseen(&run), [""; 0]);
    }
}
