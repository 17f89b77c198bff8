//! The tree's own mm selftests, on a kernel without the series and on ours:
//! whatever they report, they have to report the same on both.

use std::path::Path;
use std::time::Duration;

use crate::plain::Clock;
use crate::selftests::tap::Verdict;
use crate::selftests::{Guest, Job, Run, SelftestError, Shape};

/// A program of tools/testing/selftests/mm.
#[derive(Debug, Clone, Copy)]
pub struct Program {
    /// Its name.
    pub name: &'static str,
    /// Its arguments.
    pub arguments: &'static [&'static str],
    /// Seconds that it may take.
    pub seconds: u64,
    /// Only its status says how it went.
    pub silent: bool,
}

const fn program(name: &'static str) -> Program {
    Program {
        name,
        arguments: &[],
        seconds: 180,
        silent: false,
    }
}

/// Those that run. images/kernel/build.sh builds the same.
pub const PROGRAMS: &[Program] = &[
    Program {
        seconds: 600,
        ..program("cow")
    },
    program("droppable"),
    program("madv_populate"),
    program("map_fixed_noreplace"),
    program("map_populate"),
    program("mdwe_test"),
    program("mkdirty"),
    program("mlock2-tests"),
    program("mrelease_test"),
    program("mremap_dontunmap"),
    Program {
        // The pattern is the time's else.
        arguments: &["-p", "1"],
        seconds: 600,
        ..program("mremap_test")
    },
    program("mseal_test"),
    Program {
        arguments: &["-d", "10"],
        silent: true,
        ..program("transhuge-stress")
    },
    Program {
        arguments: &["anon", "20", "8"],
        silent: true,
        ..program("uffd-stress")
    },
    Program {
        seconds: 600,
        silent: true,
        ..program("uffd-unit-tests")
    },
    Program {
        silent: true,
        ..program("virtual_address_range")
    },
];

/// Those that do not, and why.
pub const LEFT_OUT: &[(&[&str], &str)] = &[
    (
        &[
            "hugepage-mmap",
            "hugepage-mremap",
            "hugepage-shm",
            "hugepage-vmemmap",
            "hugetlb-madvise",
            "hugetlb-read-hwpoison",
            "hugetlb-soft-offline",
            "hugetlb_dio",
            "hugetlb_fault_after_madv",
            "hugetlb_madv_vs_map",
            "map_hugetlb",
            "thuge-gen",
            "write_to_hugetlbfs",
        ],
        "our kernel has no hugetlbfs",
    ),
    (
        &["pagemap_ioctl", "soft-dirty", "split_huge_page_test"],
        "our kernel lacks what they test: write protection by userfaultfd, soft-dirty bits, debugfs",
    ),
    (&["on-fault-limit"], "does nothing as root"),
    (&["ksm_tests", "migration"], "need libnuma"),
    (&["memfd_secret", "mlock-random-test"], "need libcap"),
    (&["ksm_functional_tests"], "our kernel has no KSM"),
    (
        &["gup_longterm", "gup_test", "hmm-tests"],
        "need a test driver in the kernel",
    ),
    (
        &["pkey_sighandler_tests", "protection_keys"],
        "the emulated CPU is not the one whose keys they know, and no hook is near",
    ),
    (
        &["compaction_test", "khugepaged"],
        "need more memory than these machines have",
    ),
    (
        &["va_high_addr_switch"],
        "runs only after a shell script's set-up",
    ),
    (
        &["seal_elf"],
        "seals its own program, which nothing of the series touches",
    ),
];

/// The same program on both kernels.
#[derive(Debug, Clone)]
pub struct Comparison {
    /// Without the series.
    pub vanilla: Run,
    /// With it.
    pub ours: Run,
}

impl Program {
    /// Runs it on one kernel.
    pub fn run(&self, guest: &Guest, programs: &Path) -> Result<Run, SelftestError> {
        guest.run(&Job {
            label: format!("mm/{}", self.name),
            program: programs.join(self.name),
            arguments: self.arguments.iter().map(|&word| word.to_owned()).collect(),
            env: Vec::new(),
            writes: Vec::new(),
            shape: Shape {
                cpus: 2,
                // mremap_test maps 2 GiB.
                memory_mib: 5120,
                // At random addresses, some tests find others in their way.
                append: "norandmaps".into(),
                clock: Clock::Host,
                limit: Duration::from_secs(self.seconds),
            },
        })
    }
}

impl Comparison {
    /// What is not the same, and what no kernel may say.
    pub fn differences(&self, silent: bool) -> Vec<String> {
        let mut differences = Vec::new();
        if !silent && self.vanilla.report.count(Verdict::Passed) == 0 {
            differences.push("no test passed without the series: that proves nothing".into());
        }
        if self.vanilla.status != self.ours.status {
            differences.push(format!(
                "status {:?} without the series, {:?} with it",
                self.vanilla.status, self.ours.status
            ));
        }
        let (before, after) = (results(&self.vanilla), results(&self.ours));
        if before.len() != after.len() {
            differences.push(format!(
                "{} tests without the series, {} with it",
                before.len(),
                after.len()
            ));
        }
        for (before, after) in before.iter().zip(&after) {
            if before != after {
                differences.push(format!("{before:?} without the series, {after:?} with it"));
            }
        }
        let complaints = self.ours.complaints.iter();
        differences.extend(
            complaints
                .filter(|line| !self.vanilla.complaints.contains(line))
                .map(|line| format!("kernel: {line}")),
        );
        // A program that died early on both would prove nothing.
        if self.ours.status.is_none_or(|status| status > 4) {
            differences.push(format!("it ended with status {:?}", self.ours.status));
        }
        differences
    }
}

/// Names and verdicts; addresses differ from run to run.
fn results(run: &Run) -> Vec<(String, Verdict)> {
    let tests = run.report.tests.iter();
    tests
        .map(|test| (without_addresses(&test.name), test.verdict))
        .collect()
}

/// "at 0x7f12 of" as "at 0x of".
fn without_addresses(text: &str) -> String {
    let mut pieces = text.split("0x");
    let mut out = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        out.push_str("0x");
        out.push_str(piece.trim_start_matches(|c: char| c.is_ascii_hexdigit()));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::selftests::run_of as run;

    #[test]
    fn same_results_at_other_addresses_are_the_same() {
        let pair = Comparison {
            vanilla: run("TAP version 13\n1..2\nnot ok 1 at 0x7f12 of\nok 2 b\n", 1),
            ours: run("TAP version 13\n1..2\nnot ok 1 at 0xabc of\nok 2 b\n", 1),
        };
        assert_eq!(pair.differences(false), [""; 0]);
    }

    #[test]
    fn other_verdict_status_or_report_is_a_difference() {
        let vanilla = run("TAP version 13\n1..1\nok 1 a\n", 0);
        let mut pair = Comparison {
            ours: run("TAP version 13\n1..1\nnot ok 1 a\n", 1),
            vanilla: vanilla.clone(),
        };
        assert_eq!(pair.differences(false).len(), 2);
        pair.ours = vanilla;
        assert_eq!(pair.differences(false), [""; 0]);
        pair.ours.complaints.push("BUG: x".into());
        assert_eq!(pair.differences(false).len(), 1);
    }

    #[test]
    fn program_that_dies_on_both_proves_nothing() {
        let died = run("TAP version 13\n", 139);
        let pair = Comparison {
            vanilla: died.clone(),
            ours: died,
        };
        assert_eq!(pair.differences(true).len(), 1);
        assert_eq!(pair.differences(false).len(), 2);
    }

    #[test]
    fn no_program_is_both_run_and_left_out() {
        for (names, _) in LEFT_OUT {
            for name in *names {
                assert!(
                    PROGRAMS.iter().all(|program| program.name != *name),
                    "{name}"
                );
            }
        }
    }
}
