//! Where guests run: on this machine, or in the lab.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::RunnerError;
use super::command::{command, pass, stream};
use crate::artifacts::Artifacts;
use crate::lab::{Ended, Event, Lab};

/// Exit status of `vmm doctor`: guests can share page tables here.
const SHARED_TABLES: i32 = 0;
/// Exit status of `vmm doctor`: guests run, but cannot share page tables.
const NO_SHARED_TABLES: i32 = 20;
/// Exit status of `vmm doctor`: Linux guests cannot run here.
const NO_GUESTS: i32 = 21;

/// Where guests run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// This machine.
    Here,
    /// The lab.
    Lab,
}

/// The machine of a lab run.
#[derive(Debug, Clone, Copy)]
pub struct LabSize {
    /// CPUs, if it shall not be what the program needs.
    pub cpus: Option<u32>,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Time for a run.
    pub timeout: Duration,
}

/// Asks `vmm doctor` whether guests can share tables here; `force_lab` decides
/// without asking.
pub fn choose(vmm: &Path, force_lab: bool) -> Result<Place, RunnerError> {
    if force_lab {
        println!("guests run in the lab, as asked");
        return Ok(Place::Lab);
    }
    let status = Command::new(vmm)
        .arg("doctor")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .map_err(|source| RunnerError::Spawn {
            program: vmm.display().to_string(),
            source,
        })?;
    match status.code() {
        Some(SHARED_TABLES) => {
            println!("guests run on this machine (vmm doctor: tables can be shared)");
            Ok(Place::Here)
        }
        Some(NO_SHARED_TABLES | NO_GUESTS) => {
            println!(
                "guests run in the lab: this machine's KVM cannot share page tables \
                 ('make doctor' tells why)"
            );
            Ok(Place::Lab)
        }
        _ => Err(RunnerError::Failed(format!("vmm doctor ({status})"))),
    }
}

/// What a program in its place says and does.
#[derive(Debug)]
pub enum Said<'a> {
    /// Bytes of standard output.
    Output(&'a [u8]),
    /// Bytes of standard error.
    Errors(&'a [u8]),
    /// A line about the lab.
    Note(&'a str),
    /// All output so far is void: the run begins again, as this line says.
    Again(&'a str),
}

/// Passes on what is said, as it comes.
pub fn print(said: Said<'_>) {
    match said {
        Said::Output(bytes) | Said::Errors(bytes) => pass(bytes),
        Said::Note(line) | Said::Again(line) => println!("{line}"),
    }
}

/// A program to run where guests run.
#[derive(Debug, Clone, Copy)]
pub struct Run<'a> {
    /// Where that is.
    pub place: Place,
    /// The lab, if it is there; one CPU if nothing is said.
    pub lab: LabSize,
    /// What guests need.
    pub artifacts: &'a Artifacts,
    /// The program.
    pub program: &'a Path,
    /// Its arguments.
    pub arguments: &'a [String],
}

impl Run<'_> {
    /// Runs it. Returns its status as a shell would.
    pub fn follow(self, said: &mut dyn FnMut(Said<'_>)) -> Result<i32, RunnerError> {
        match self.place {
            Place::Here => {
                let mut command = command(&self.program.to_string_lossy(), &[]);
                command.args(self.arguments).envs(self.artifacts.env());
                let status = stream(&mut command, |line| said(Said::Output(line)))?;
                let by_signal = || 128 + status.signal().unwrap_or(0);
                Ok(status.code().unwrap_or_else(by_signal))
            }
            Place::Lab => self.in_lab(said),
        }
    }

    fn in_lab(self, said: &mut dyn FnMut(Said<'_>)) -> Result<i32, RunnerError> {
        let name = self.program.file_name().unwrap_or(self.program.as_os_str());
        let command = format!("/bin/{}", name.to_string_lossy());
        let mut argv = vec![command.clone()];
        argv.extend_from_slice(self.arguments);
        let mut lab = Lab::new(argv);
        lab.cpus = self.lab.cpus.unwrap_or(1);
        lab.memory_mib = self.lab.memory_mib;
        lab.timeout = Some(self.lab.timeout);
        lab.files.push((self.program.to_owned(), command));
        for (name, here, there) in self.artifacts.places() {
            lab.env.push((name.to_owned(), there.to_owned()));
            lab.files.push((here.to_owned(), there.to_owned()));
        }
        for name in ["RUST_BACKTRACE", "RUST_LOG"] {
            if let Ok(value) = std::env::var(name) {
                lab.env.push((name.to_owned(), value));
            }
        }
        let outcome = lab
            .run(&mut |event| match event {
                Event::Started(hello, took) => said(Said::Note(&format!(
                    "lab: Linux {}, {} CPU{}, {} MiB, npt and tdp_mmu on, up in {:.1} s",
                    hello.kernel,
                    hello.cpus,
                    if hello.cpus == 1 { "" } else { "s" },
                    self.lab.memory_mib,
                    took.as_secs_f64()
                ))),
                Event::Stdout(data) => said(Said::Output(data)),
                Event::Stderr(data) => said(Said::Errors(data)),
                Event::Note(line) => said(Said::Note(&format!("lab: {line}"))),
                Event::Console(_) => {}
                Event::Retry(count, error) => said(Said::Again(&format!(
                    "{error}\nlab: starting again, retry {count}; what it printed so far \
                     does not count"
                ))),
            })
            .map_err(RunnerError::Lab)?;
        Ok(match outcome.ended {
            Ended::Exited(code) => code,
            Ended::Signaled(signal) => 128 + signal,
        })
    }
}
