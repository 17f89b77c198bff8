//! Counts of tests, read from what the test programs print.

use std::fmt;
use std::ops::AddAssign;

/// How many tests ended how.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Tests and checks that passed.
    pub passed: u64,
    /// Tests and checks that failed.
    pub failed: u64,
    /// Tests that their own source marks as not to be run.
    pub ignored: u64,
}

impl Tally {
    /// One check by its result.
    pub fn check(passed: bool) -> Self {
        Self {
            passed: passed.into(),
            failed: (!passed).into(),
            ignored: 0,
        }
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
    }
}

/// What came of a stage: its tests, what failed, and how often a lab had to be
/// started again for them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counted {
    /// The tests.
    pub tally: Tally,
    /// A line for each thing that failed, for the summary: where output is long,
    /// its end is what people look at, and what a CI service keeps.
    pub failures: Vec<String>,
    /// Starts of labs that the emulator's faults made void.
    pub retries: u32,
}

impl Counted {
    /// Tests, and what failed of them.
    pub fn new(tally: Tally, failures: Vec<String>) -> Self {
        Self {
            tally,
            failures,
            retries: 0,
        }
    }

    /// One test or check that failed.
    pub fn failure(what: impl Into<String>) -> Self {
        Self::new(Tally::check(false), vec![what.into()])
    }

    /// One check, and what failed if it did.
    pub fn check(passed: bool, what: impl Into<String>) -> Self {
        if passed {
            Tally::check(true).into()
        } else {
            Self::failure(what)
        }
    }
}

impl From<Tally> for Counted {
    fn from(tally: Tally) -> Self {
        Self::new(tally, Vec::new())
    }
}

impl AddAssign for Counted {
    fn add_assign(&mut self, other: Self) {
        self.tally += other.tally;
        self.failures.extend(other.failures);
        self.retries += other.retries;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)
    }
}

/// Adds up the `test result:` lines in a stream of output.
#[derive(Debug, Default)]
pub struct Reader {
    line: Vec<u8>,
    tally: Tally,
    failures: Vec<String>,
    /// What single tests of a program said that has not told its result yet.
    partial: Option<Tally>,
}

impl Reader {
    /// Takes the next bytes.
    pub fn take(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if byte == b'\n' {
                let line = std::mem::take(&mut self.line);
                self.line(&String::from_utf8_lossy(&line));
            } else {
                self.line.push(byte);
            }
        }
    }

    /// The counts. A program that failed (`success` is false) without saying
    /// which test did, or that stopped in the middle, is one failure more.
    pub fn end(mut self, success: bool) -> Counted {
        self.take(b"\n");
        if let Some(partial) = self.partial.take() {
            self.tally += partial;
            self.tally.failed += 1;
            self.failures
                .push("a program stopped in the middle of its tests".into());
        } else if !success && self.tally.failed == 0 {
            self.tally.failed += 1;
            self.failures
                .push("a program failed, but no test of it".into());
        }
        Counted::new(self.tally, self.failures)
    }

    fn line(&mut self, line: &str) {
        let line = line.trim_end();
        let announced = line
            .strip_prefix("running ")
            .and_then(|rest| rest.split_once(' '))
            .is_some_and(|(count, what)| {
                count.parse::<u64>().is_ok() && matches!(what, "test" | "tests")
            });
        if announced {
            self.partial = Some(Tally::default());
        }
        if let (Some(partial), Some(test)) = (&mut self.partial, line.strip_prefix("test ")) {
            if let Some(name) = test.strip_suffix(" ... FAILED") {
                partial.failed += 1;
                self.failures.push(name.to_owned());
            } else {
                partial.passed += u64::from(test.ends_with(" ... ok"));
            }
        }
        let Some(counts) = line.strip_prefix("test result: ") else {
            return;
        };
        self.partial = None;
        // ok. 5 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; ...
        for part in counts.split(['.', ';']) {
            let Some((count, what)) = part.trim().split_once(' ') else {
                continue;
            };
            let Ok(count) = count.parse::<u64>() else {
                continue;
            };
            match what {
                "passed" => self.tally.passed += count,
                "failed" => self.tally.failed += count,
                "ignored" => self.tally.ignored += count,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OK: &str = "running 3 tests\ntest a ... ok\n\ntest result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s\n";

    fn read(text: &str, success: bool) -> Counted {
        let mut reader = Reader::default();
        for piece in text.as_bytes().chunks(7) {
            reader.take(piece);
        }
        reader.end(success)
    }

    #[test]
    fn results_of_several_programs_are_added() {
        let failing = "running 3 tests\ntest b ... ok\ntest x::c ... FAILED\ntest d ... FAILED\n\
            test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured";
        let counted = read(&format!("{OK}{OK}{failing}"), false);
        assert_eq!(counted.tally.to_string(), "7 passed, 2 failed");
        assert_eq!(counted.tally.ignored, 2);
        assert_eq!(counted.failures, ["x::c", "d"]);
    }

    #[test]
    fn failure_without_a_failed_test_counts_as_one() {
        for text in [OK, "error: could not compile\n"] {
            let counted = read(text, false);
            assert_eq!((counted.tally.failed, counted.failures.len()), (1, 1));
        }
    }

    #[test]
    fn program_that_stops_in_the_middle_has_failed() {
        let cut = "running 3 tests\ntest a ... ok\ntest b ... ";
        let counted = read(&format!("{OK}{cut}"), true);
        assert_eq!((counted.tally.passed, counted.tally.failed), (4, 1));
        assert_eq!(counted.failures.len(), 1);
    }
}
