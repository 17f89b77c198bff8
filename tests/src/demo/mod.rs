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
    let shared = steps::run(images, &mut verdicts);
    say("\nThe same with private page tables:");
    let private = cost::private(images, &mut verdicts);
    if let (Some(shared), Some(private)) = (shared, private) {
        say("");
        say(cost::table(&private, &shared));
    }
    let Verdicts { held, failed } = verdicts;
    if failed == 0 {
        say(format_args!("\ndemo: every step held ({held} of {held})"));
    } else {
        say(format_args!(
            "\ndemo: FAILED, {failed} of {} steps did not hold",
            held + failed
        ));
    }
    failed == 0
}
