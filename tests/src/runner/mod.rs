//! The runner behind the Makefile: builds what is missing, runs the checks and
//! tests, or a program that needs guests, here or in the lab.

mod bisect;
mod build;
mod command;
mod guests;
mod hooks;
mod place;
mod selftests;
mod tally;

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::artifacts::Artifacts;
use crate::hooks::HooksError;
use crate::initramfs::InitramfsError;
use crate::lab::{KernelError, LabError};
use crate::selftests::{Flavour, SelftestError};
use mshare_protocol::report::chain;

use build::Background;
use command::{cargo, pass, stream};
use guests::guests;
use tally::{Counted, Reader};

pub use bisect::{Bisect, bisect};
pub use hooks::{Hooks, hooks};
pub use place::LabSize;
pub use selftests::{Matrix, Selection, matrix, selected as selftests};
pub use tally::Tally;

/// What went wrong on the way to a result.
#[derive(Debug, thiserror::Error)]
pub enum RunnerError {
    /// A program cannot be started.
    #[error("cannot run {program}")]
    Spawn {
        /// The program.
        program: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A program failed, and has said why.
    #[error("{0} failed")]
    Failed(String),
    /// A stage lacks what it needs.
    #[error("not run: {0}")]
    NotRun(&'static str),
    /// A program is not part of the workspace.
    #[error("the workspace has no program '{0}'")]
    NoProgram(String),
    /// No kernel for the lab.
    #[error("the lab has no kernel")]
    LabKernel(#[source] KernelError),
    /// The lab failed.
    #[error(transparent)]
    Lab(LabError),
    /// No initramfs.
    #[error("the guests have no initramfs")]
    Initramfs(#[source] InitramfsError),
    /// A selftest could not run.
    #[error("a selftest could not run")]
    Selftest(#[source] SelftestError),
    /// The hooks' cost could not be measured.
    #[error("the cost of the hooks is not known")]
    Hooks(#[source] HooksError),
    /// A file or folder cannot be used.
    #[error("cannot use {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// How to run.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Use the lab even where guests could run here.
    pub force_lab: bool,
    /// The lab's machine.
    pub lab: LabSize,
}

/// The folder of the workspace.
fn project() -> &'static Path {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests)
}

/// Results so far, by stage.
#[derive(Debug, Default)]
struct Stages {
    done: Vec<(&'static str, Counted, Duration)>,
}

impl Stages {
    /// Runs a stage. An error is one failure.
    fn run<T: Into<Counted>>(
        &mut self,
        name: &'static str,
        stage: impl FnOnce() -> Result<T, RunnerError>,
    ) {
        println!("\n--- {name}");
        let start = Instant::now();
        let counted = match stage() {
            Ok(counted) => counted.into(),
            Err(error) => {
                let reason = chain(&error);
                println!("{name}: {reason}");
                // The rest of it is above.
                Counted::failure(reason.lines().next().unwrap_or(&reason))
            }
        };
        self.done.push((name, counted, start.elapsed()));
    }

    /// Notes that a stage could not run: one failure.
    fn cannot(&mut self, name: &'static str, reason: &'static str) {
        self.run(name, || Err::<Tally, _>(RunnerError::NotRun(reason)));
    }

    /// Prints the summary: the stages, and what failed in them. The last line is
    /// the total.
    fn conclude(&self) -> bool {
        println!("\n--- summary");
        let mut total = Tally::default();
        for (name, counted, took) in &self.done {
            let Counted { tally, retries, .. } = counted;
            total += *tally;
            let verdict = if tally.failed == 0 { "ok" } else { "FAILED" };
            print!(
                "{name:<24} {verdict:<7} {tally:<24} {:>5} s",
                took.as_secs()
            );
            if tally.ignored > 0 {
                print!("  ({} ignored)", tally.ignored);
            }
            if *retries > 0 {
                print!("  (labs started again: {retries})");
            }
            println!();
        }
        for (name, counted, _) in &self.done {
            for what in &counted.failures {
                println!("FAILED  {name}: {what}");
            }
        }
        println!("{total}");
        total.failed == 0
    }
}

/// All checks and tests; `quick` leaves out what starts machines. Returns
/// whether everything passed.
pub fn test(options: Options, quick: bool) -> bool {
    let mut stages = Stages::default();
    let background = (!quick).then(|| Background::start(&[Flavour::Ablation, Flavour::Debug]));
    stages.run("format", || check(&["fmt", "--all", "--", "--check"]));
    stages.run("lint", lint);
    stages.run("unit tests", || {
        let mut all = tests(&["test", "--workspace", "--all-features"])?;
        // The editor without its ablations, as it serves.
        all += tests(&["test", "-p", "mshare-pool"])?;
        Ok(all)
    });
    if let Some(background) = background {
        machines(&mut stages, options, background);
    }
    stages.conclude()
}

/// The stages that start machines.
fn machines(stages: &mut Stages, options: Options, background: Background) {
    println!("\nwaiting for the guest kernels and the lab's kernel");
    let (kernels, lab) = background.finish();
    let mut guest_kernels = None;
    stages.run("guest kernels", || {
        guest_kernels = Some(kernels?);
        Ok(Tally::check(true))
    });
    stages.run("lab", || {
        lab?;
        tests(&[
            "test",
            "-p",
            "mshare-tests",
            "--test",
            "lab",
            "--",
            "--test-threads=1",
        ])
    });
    match &guest_kernels {
        Some(kernels) => selftests::stages(stages, &kernels.default, |flavour| {
            kernels
                .of(flavour)
                .ok_or(RunnerError::NotRun("there is no such kernel"))
        }),
        None => stages.cannot("selftests", "there is no guest kernel"),
    }
    match guest_kernels {
        Some(kernels) => stages.run("guests", || guests(options, kernels, &[])),
        None => stages.cannot("guests", "there is no guest kernel"),
    }
}

/// The guest tests only, `filter` being arguments of the test program. Returns
/// whether they passed.
pub fn guest_tests(options: Options, filter: &[String]) -> bool {
    let mut stages = Stages::default();
    stages.run("guests", || {
        let (kernels, lab) = Background::start(&[Flavour::Ablation]).finish();
        lab?;
        guests(options, kernels?, filter)
    });
    stages.conclude()
}

/// Runs a program of the workspace where guests run, and returns its status.
pub fn tool(options: Options, name: &str, arguments: &[String]) -> Result<i32, RunnerError> {
    let background = Background::start(&[]);
    let programs = build::programs();
    let (kernels, lab) = background.finish();
    lab?;
    let programs = programs?;
    let program = build::program(&programs, name)?;
    let artifacts = build::artifacts(&programs, kernels?)?;
    let place = place::choose(&artifacts.vmm, options.force_lab)?;
    println!();
    let run = place::Run {
        place,
        lab: options.lab,
        artifacts: &artifacts,
        program: &program,
        arguments,
    };
    run.follow(&mut place::print)
}

/// Builds everything and says where it is.
pub fn build_all() -> Result<Artifacts, RunnerError> {
    let background = Background::start(&[]);
    let programs = build::programs();
    let (kernels, lab) = background.finish();
    lab?;
    build::artifacts(&programs?, kernels?)
}

fn check(arguments: &[&str]) -> Result<Counted, RunnerError> {
    let status = stream(&mut cargo(arguments), pass)?;
    let what = format!("cargo {}", arguments.join(" "));
    Ok(Counted::check(status.success(), what))
}

/// Clippy on everything; targets that are left out of a plain `cargo test` are
/// left out by `--all-targets` too and have to be named.
fn lint() -> Result<Counted, RunnerError> {
    let mut counted = Counted::default();
    let mut named = vec!["-p", "mshare-tests", "--test", "lab"];
    for program in &guests::PROGRAMS {
        named.extend(["--test", program.name]);
    }
    for targets in [vec!["--workspace", "--all-targets"], named] {
        let mut arguments = vec!["clippy"];
        arguments.extend(targets);
        arguments.extend(["--all-features", "--", "-D", "warnings"]);
        counted += check(&arguments)?;
    }
    // As they serve: the pool without ablations, the protocol as a kernel or a
    // guest without a standard library would take it.
    for narrow in [
        &["-p", "vmm", "-p", "mshare-pool"][..],
        &["-p", "mshare-protocol", "--no-default-features"],
    ] {
        counted += check(&[&["clippy"], narrow, &["--", "-D", "warnings"]].concat())?;
    }
    Ok(counted)
}

/// Runs tests by cargo and counts them.
fn tests(arguments: &[&str]) -> Result<Counted, RunnerError> {
    let mut reader = Reader::default();
    // A failing program does not keep the others from running.
    let mut arguments = arguments.to_vec();
    arguments.insert(1, "--no-fail-fast");
    let status = stream(&mut cargo(&arguments), |line| {
        pass(line);
        reader.take(line);
    })?;
    Ok(reader.end(status.success()))
}
