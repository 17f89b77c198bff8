//! `vmm doctor`: says what this host can do.

use std::io::Write;

use clap::Args;

use super::Failure;
use crate::doctor;
use crate::exit::ExitStatus;

const EXIT_HELP: &str = "\
Exit status:
   0  Linux guests run here and can share page tables
  20  Linux guests run here; regions are attached privately
  21  Linux guests cannot run here";

/// The options of `vmm doctor`.
#[derive(Debug, Args)]
#[command(after_help = EXIT_HELP)]
pub struct DoctorArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Probes the host and prints what was found.
pub(super) fn run(args: &DoctorArgs) -> Result<ExitStatus, Failure> {
    let report = doctor::probe();
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
    } else {
        write!(out, "{report}")?;
    }
    Ok(report.status())
}
