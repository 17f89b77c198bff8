//! The main job, end to end: two guests on one set of page tables.
//!
//! Every step prints what it saw and a plain verdict; the demo succeeds only
//! if each held.

mod cost;
mod pair;
mod steps;

use std::fmt::Display;
use std::io::Write as _;

use mshare_protocol::report::chain;

use crate::guests::Images;
use steps::Tables;

/// Bytes of the region that the demo shares.
pub const REGION_LEN: u64 = 256 << 20;
/// Its address in every process.
pub const REGION_START: u64 = 0x1000_0000_0000;
/// Its name.
pub const REGION: &str = "demo";
/// Processes that attach it in each guest.
pub const PROCESSES: u32 = 8;

/// A step that did not hold, or could not be made.
pub type Failed = Box<dyn std::error::Error>;

/// What came of the steps.
#[derive(Debug, Default)]
pub struct Verdicts {
    held: u32,
    failed: u32,
    not_tried: u32,
}

impl Verdicts {
    /// Runs a step and prints its verdict. The value of a step that held is
    /// returned, for the steps after it.
    pub fn step<T>(
        &mut self,
        title: &str,
        step: impl FnOnce() -> Result<(T, String), Failed>,
    ) -> Option<T> {
        match step() {
            Ok((value, saw)) => {
                self.held += 1;
                say(format_args!("  held    {title}: {saw}"));
                Some(value)
            }
            Err(error) => {
                self.failed += 1;
                say(format_args!("  FAILED  {title}: {}", chain(error.as_ref())));
                None
            }
        }
    }

    /// A step with something that an earlier step was to bring about.
    pub fn step_with<W, T>(
        &mut self,
        with: Option<&mut W>,
        title: &str,
        step: impl FnOnce(&mut W) -> Result<(T, String), Failed>,
    ) -> Option<T> {
        match with {
            Some(with) => self.step(title, || step(with)),
            None => {
                self.not_tried += 1;
                say(format_args!("  not tried  {title}"));
                None
            }
        }
    }

    fn all_held(&self) -> bool {
        self.failed + self.not_tried == 0
    }

    fn total(&self) -> String {
        let steps = self.held + self.failed + self.not_tried;
        match (self.all_held(), self.not_tried) {
            (true, _) => format!("every step held ({} of {steps})", self.held),
            (false, 0) => format!("FAILED, {} of {steps} steps did not hold", self.failed),
            (false, not_tried) => format!(
                "FAILED, {} of {steps} steps did not hold, {not_tried} were not tried",
                self.failed
            ),
        }
    }
}

/// Fails a step with a message unless `condition` is true.
pub(crate) fn ensure(condition: bool, message: impl FnOnce() -> String) -> Result<(), Failed> {
    if condition {
        Ok(())
    } else {
        Err(message().into())
    }
}

/// Prints a line at once: the demo is watched live.
pub(crate) fn say(line: impl Display) {
    let mut out = std::io::stdout().lock();
    // A reader that is gone does not change what the demo finds.
    let _ = writeln!(out, "{line}");
    let _ = out.flush();
}

/// Runs the demo; true if every step held.
#[must_use]
pub fn run(images: &Images) -> bool {
    let mut verdicts = Verdicts::default();
    say(format_args!(
        "Two guests of 2 vCPUs, one region of {} MiB, {PROCESSES} processes in each guest",
        REGION_LEN >> 20
    ));
    say("\nShared page tables:");
    let shared = steps::run(images, Tables::Shared, &mut verdicts);
    say("\nThe same with private page tables:");
    let private = steps::run(images, Tables::Private, &mut verdicts);
    if let (Some(shared), Some(private)) = (shared, private) {
        say("");
        say(cost::table(&private, &shared));
    }
    say(format_args!("\ndemo: {}", verdicts.total()));
    verdicts.all_held()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_without_what_they_need_are_not_tried_and_spoil_the_total() {
        let mut verdicts = Verdicts::default();
        let mut guest = verdicts.step("boots", || Ok((1, String::new())));
        verdicts.step_with(guest.as_mut(), "works", |_| Ok(((), String::new())));
        assert_eq!(verdicts.total(), "every step held (2 of 2)");
        let mut none = verdicts.step("fails", || Err::<((), String), _>("no".into()));
        verdicts.step_with(none.as_mut(), "waits", |()| Ok(((), String::new())));
        assert!(!verdicts.all_held());
        assert_eq!(
            verdicts.total(),
            "FAILED, 1 of 4 steps did not hold, 1 were not tried"
        );
    }
}
