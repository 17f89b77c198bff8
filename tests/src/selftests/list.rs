//! The selftests of the series: which machine each gets, and what it may skip
//! where. What is published and not here is a failure, and so is the reverse.

use std::path::Path;
use std::time::Duration;

use super::{Flavour, Job, Shape};
use crate::plain::Clock;

/// Variable that tells a program for how long to stress.
pub const STRESS_SECONDS: &str = "MSHARE_STRESS_SECONDS";

/// A skip that is no failure.
#[derive(Debug, Clone, Copy)]
pub struct Skip {
    /// In the name of the test, or in the reason.
    pub what: &'static str,
    /// On these kernels.
    pub on: &'static [Flavour],
}

/// A program and its machine.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// The program.
    pub program: &'static str,
    /// What is different from other entries of the same program.
    pub variant: &'static str,
    /// Arguments.
    pub arguments: &'static [&'static str],
    /// Variables of the environment: `NAME=VALUE`.
    pub env: &'static [&'static str],
    /// Files of the guest that are written before: `PATH=VALUE`.
    pub writes: &'static [&'static str],
    /// CPUs.
    pub cpus: u32,
    /// CPUs without which it makes no sense.
    pub min_cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// More of the kernel's command line.
    pub append: &'static str,
    /// Seconds for the program on the default kernel.
    pub seconds: u64,
    /// Kernels for which it is left to others: it measures, or needs what they
    /// lack.
    pub not_on: &'static [Flavour],
    /// What it may skip.
    pub skips: &'static [Skip],
    /// Whether the short form of a stage has it.
    pub short: bool,
    /// Whether it runs in each machine of the matrix's short form.
    pub core: bool,
    /// Whether it goes on for as long as [`STRESS_SECONDS`] says.
    pub stress: bool,
}

/// An ordinary program: 2 CPUs, 1 GiB, three minutes, nothing may be skipped.
const PLAIN: Entry = Entry {
    program: "",
    variant: "",
    arguments: &[],
    env: &[],
    writes: &[],
    cpus: 2,
    min_cpus: 1,
    memory_mib: 1024,
    append: "",
    seconds: 180,
    not_on: &[],
    skips: &[],
    short: true,
    core: false,
    stress: false,
};

/// Shared memory in huge pages where it is asked for.
const HUGE: &[&str] = &["/sys/kernel/mm/transparent_hugepage/shmem_enabled=advise"];
/// Every CPU is flushed, not only those of attached processes.
const FLUSH_ALL: &[&str] = &["/sys/module/mshare_host/parameters/flush_all=1"];
/// A disk of memory that a program can swap to.
const SWAP: &str = "ramdisk_size=262144";
/// Two nodes, on kernels that know of nodes.
const NODES: &str = "numa=fake=2";

/// Kernels without nodes, users of MMU notifiers, fault injection.
const SMALL: &[Flavour] = &[Flavour::Default, Flavour::Ablation, Flavour::Kcsan];
/// Kernels without poisoned pages.
const NO_POISON: &[Flavour] = &[
    Flavour::Default,
    Flavour::Ablation,
    Flavour::Kcsan,
    Flavour::Kasan,
];
/// Kernels that count no VMA locks, merge no pages and balance no nodes.
const NOT_DEBUG: &[Flavour] = &[
    Flavour::Default,
    Flavour::Ablation,
    Flavour::Kcsan,
    Flavour::Kasan,
];
/// Kernels whose time says nothing.
const SLOW: &[Flavour] = &[Flavour::Debug, Flavour::Kasan, Flavour::Kcsan];

const fn skip(what: &'static str, on: &'static [Flavour]) -> Skip {
    Skip { what, on }
}

const fn entry(program: &'static str) -> Entry {
    Entry { program, ..PLAIN }
}

/// All of them.
pub const ENTRIES: &[Entry] = &[
    Entry {
        // It makes a region of more than 1 GiB, and memory is accounted.
        memory_mib: 2048,
        ..entry("mshare_syscalls")
    },
    entry("mshare_rights"),
    Entry {
        seconds: 300,
        core: true,
        ..entry("mshare_protect")
    },
    Entry {
        variant: "all CPUs flushed",
        writes: FLUSH_ALL,
        cpus: 4,
        min_cpus: 2,
        seconds: 300,
        short: false,
        ..entry("mshare_protect")
    },
    entry("mshare_adopt"),
    entry("mshare_huge"),
    Entry {
        variant: "huge pages on request",
        writes: HUGE,
        short: false,
        ..entry("mshare_huge")
    },
    Entry {
        skips: &[skip("vma_locks", NOT_DEBUG)],
        ..entry("mshare_info")
    },
    Entry {
        core: true,
        ..entry("mshare_lifetime")
    },
    Entry {
        skips: &[
            skip("hwpoison", NO_POISON),
            skip("soft_offline", NO_POISON),
            skip("ksm", NOT_DEBUG),
        ],
        ..entry("mshare_mapping")
    },
    Entry {
        core: true,
        ..entry("mshare_process")
    },
    entry("mshare_futex"),
    entry("mshare_gup"),
    Entry {
        append: NODES,
        skips: &[
            skip("numa_maps", SMALL),
            skip("move_pages", SMALL),
            skip("mempolicy", SMALL),
            skip("nodes", SMALL),
            skip("numa_balancing", NOT_DEBUG),
            skip("policy", SMALL),
        ],
        ..entry("mshare_walkers")
    },
    Entry {
        skips: &[
            skip("attached_first", SMALL),
            skip("watched_first", SMALL),
            skip("race", SMALL),
        ],
        ..entry("mshare_notifier")
    },
    Entry {
        cpus: 4,
        min_cpus: 2,
        append: NODES,
        seconds: 300,
        skips: &[skip("nodes", SMALL)],
        ..entry("mshare_hotplug")
    },
    Entry {
        append: SWAP,
        seconds: 600,
        ..entry("mshare_reclaim")
    },
    Entry {
        // With it the kernel writes to the program's memory whenever it was
        // preempted, and what it gets if an allocation fails there is SIGSEGV.
        env: &["GLIBC_TUNABLES=glibc.pthread.rseq=0"],
        not_on: SMALL,
        seconds: 600,
        ..entry("mshare_faultinject")
    },
    Entry {
        env: &["MSHARE_STRESS_SECONDS=20"],
        memory_mib: 2048,
        core: true,
        stress: true,
        ..entry("mshare_stress")
    },
    Entry {
        arguments: &["-p", "8", "-m", "64"],
        not_on: SLOW,
        seconds: 900,
        short: false,
        ..entry("mshare_figures")
    },
    Entry {
        arguments: &["-r", "20"],
        not_on: SLOW,
        cpus: 4,
        min_cpus: 2,
        short: false,
        ..entry("mshare_latency")
    },
];

impl Entry {
    /// What it is called.
    pub fn label(&self) -> String {
        if self.variant.is_empty() {
            return self.program.to_owned();
        }
        format!("{}, {}", self.program, self.variant)
    }

    /// As a job for the program in this folder.
    pub fn job(&self, programs: &Path) -> Job {
        let own = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
        Job {
            label: self.label(),
            program: programs.join(self.program),
            arguments: own(self.arguments),
            env: own(self.env),
            writes: own(self.writes),
            shape: Shape {
                cpus: self.cpus,
                memory_mib: self.memory_mib,
                append: self.append.to_owned(),
                clock: Clock::Host,
                limit: Duration::from_secs(self.seconds),
            },
        }
    }

    /// Whether a skip is allowed on this kernel.
    pub fn may_skip(&self, flavour: Flavour, what: &str) -> bool {
        self.skips
            .iter()
            .any(|skip| skip.on.contains(&flavour) && what.contains(skip.what))
    }

    /// Whether it runs on this kernel.
    pub fn runs_on(&self, flavour: Flavour) -> bool {
        !self.not_on.contains(&flavour)
    }
}

/// Programs that are published but not listed, and listed but not published.
pub fn disagreements(published: &[String], listed: &[&str]) -> Vec<String> {
    let unlisted = published
        .iter()
        .filter(|name| !listed.contains(&name.as_str()))
        .map(|name| format!("{name} is built, but no list says how to run it"));
    let mut missing: Vec<String> = listed
        .iter()
        .filter(|name| !published.iter().any(|known| known == *name))
        .map(|name| format!("{name} is listed, but has not been built"))
        .collect();
    missing.dedup();
    unlisted.chain(missing).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn labels_are_unique_and_short_forms_exist() {
        let labels: BTreeSet<_> = ENTRIES.iter().map(Entry::label).collect();
        assert_eq!(labels.len(), ENTRIES.len());
        assert!(ENTRIES.iter().any(|entry| entry.short));
    }

    #[test]
    fn no_entry_breaks_the_command_line() {
        for entry in ENTRIES {
            let words = entry.arguments.iter().chain(entry.env).chain(entry.writes);
            for word in words {
                assert!(!word.contains([' ', '"']), "{}: {word}", entry.label());
            }
            assert!(!entry.append.contains('"'), "{}", entry.label());
        }
    }

    #[test]
    fn unlisted_and_missing_programs_are_told() {
        let published = ["a".to_owned(), "b".to_owned()];
        assert_eq!(disagreements(&published, &["a", "b", "b"]), [""; 0]);
        let told = disagreements(&published, &["a", "c", "c"]);
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(told[0].starts_with("b ") && told[1].starts_with("c "));
    }

    #[test]
    fn skip_is_allowed_by_kernel_and_by_name() {
        let entry = Entry {
            skips: &[Skip {
                what: "fault injection",
                on: &[Flavour::Default],
            }],
            ..PLAIN
        };
        assert!(entry.may_skip(Flavour::Default, "x: no fault injection"));
        assert!(!entry.may_skip(Flavour::Debug, "x: no fault injection"));
        assert!(!entry.may_skip(Flavour::Default, "x: no memory"));
    }
}
