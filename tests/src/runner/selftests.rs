//! The stages and commands that run the selftests of the kernel series.

use std::fs;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use mshare_protocol::report::chain;

use super::build::{agent, guest_kernel};
use super::tally::{Counted, Tally};
use super::{RunnerError, Stages};
use crate::selftests::ablation::{ABLATIONS, Ablation};
use crate::selftests::list::{ENTRIES, Entry, disagreements};
use crate::selftests::tap::Verdict;
use crate::selftests::{Flavour, Guest, Run, SelftestError, labelled, matrix, published};

/// How often the lack of an element may stay unseen before that is a failure.
const ABLATION_RUNS: u32 = 3;

/// What to run on what; nothing given means what the project builds.
#[derive(Debug, Clone, clap::Args)]
pub struct Selection {
    /// The flavour of the kernel
    #[arg(long, value_enum, default_value = "default")]
    flavour: Flavour,
    /// A kernel of that flavour, built elsewhere
    #[arg(long, value_name = "BZIMAGE")]
    kernel: Option<PathBuf>,
    /// A folder with the programs, built elsewhere
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,
    /// More of the kernel's command line
    #[arg(long, default_value = "")]
    append: String,
    /// Only the short form
    #[arg(long)]
    short: bool,
    /// Runs without one safety element instead, which have to fail
    #[arg(long)]
    ablations: bool,
    /// Print the whole console of each
    #[arg(long)]
    console: bool,
    /// CPUs of each machine, whatever the list says
    #[arg(long)]
    cpus: Option<u32>,
    /// Memory of each machine in MiB, whatever the list says
    #[arg(long)]
    memory: Option<u32>,
    /// Time for each program in seconds, whatever the list says
    #[arg(long)]
    seconds: Option<u64>,
    /// Arguments of each program, whatever the list says
    #[arg(long, allow_hyphen_values = true, value_delimiter = ' ')]
    arguments: Option<Vec<String>>,
    /// Only entries whose names hold one of these
    names: Vec<String>,
}

/// What the matrix does.
#[derive(Debug, Clone, clap::Args)]
pub struct Matrix {
    /// The machines of 'make test', each value of each column in one or more
    #[arg(long)]
    short: bool,
    /// Print the machines and run nothing
    #[arg(long)]
    list: bool,
    /// Seconds of stress in each machine: 180 where all programs run, 20 or 10
    /// elsewhere, if not given
    #[arg(long)]
    stress: Option<u64>,
    /// Write the table here too
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Only machines whose names hold all of these
    words: Vec<String>,
}

/// Where the series' own programs are: beside the default kernel.
pub fn programs_of(kernel: &Path) -> PathBuf {
    kernel.with_file_name("selftests")
}

/// The stages of `make test`. `kernel` builds or finds a kernel.
pub fn stages(
    stages: &mut Stages,
    default: &Path,
    kernel: impl Fn(Flavour) -> Result<PathBuf, RunnerError>,
) {
    let dir = programs_of(default);
    let guest = |flavour: Flavour| {
        let kernel = kernel(flavour)?;
        guest(kernel, flavour)
    };
    stages.run("selftests", || {
        let mut counted = agreement(&dir)?;
        counted += run_entries(&guest(Flavour::Default)?, &dir, "selftests", |_| true)?;
        Ok(counted)
    });
    stages.run("matrix, short form", || {
        let mut counted = Counted::default();
        for cell in matrix::cells(true) {
            let outcome = run_cell(&cell, &guest(cell.flavour)?, &dir, None)?;
            let tally = Tally {
                passed: outcome.passed,
                failed: outcome.faults.len() as u64,
                ignored: outcome.skipped,
            };
            counted += Counted::new(tally, labelled(&cell.to_string(), &outcome.faults));
        }
        Ok(counted)
    });
    stages.run("ablations", || run_ablations(&guest, &dir, |_| true));
}

/// A kernel with the agent of this workspace.
pub fn guest(kernel: PathBuf, flavour: Flavour) -> Result<Guest, RunnerError> {
    Ok(Guest {
        kernel,
        flavour,
        agent: agent()?,
    })
}

/// `runner selftests`. Returns whether all passed.
pub fn selected(selection: &Selection) -> bool {
    let mut stages = Stages::default();
    stages.run("selftests", || {
        let named = |label: &str| {
            selection.names.is_empty() || selection.names.iter().any(|name| label.contains(name))
        };
        let dir = match &selection.programs {
            Some(dir) => dir.clone(),
            None => programs_of(&guest_kernel(Flavour::Default.name())?),
        };
        let guest = |flavour: Flavour| {
            let kernel = match &selection.kernel {
                Some(kernel) => kernel.clone(),
                None => guest_kernel(flavour.name())?,
            };
            guest(kernel, flavour)
        };
        if selection.ablations {
            return run_ablations(&guest, &dir, named);
        }
        let mut counted = Counted::default();
        if selection.names.is_empty() {
            counted += agreement(&dir)?;
        }
        let guest = guest(selection.flavour)?;
        let extra = Extra {
            append: &selection.append,
            console: selection.console,
            cpus: selection.cpus,
            memory: selection.memory,
            seconds: selection.seconds,
            arguments: selection.arguments.as_deref(),
        };
        counted += run_list(&guest, &dir, "selected", &extra, |entry| {
            named(&entry.label()) && (entry.short || !selection.short)
        })?;
        Ok(counted)
    });
    stages.conclude()
}

/// Whether the list and what is built are the same.
fn agreement(dir: &Path) -> Result<Counted, RunnerError> {
    let listed: Vec<&str> = ENTRIES.iter().map(|entry| entry.program).collect();
    let built = published(dir).map_err(RunnerError::Selftest)?;
    let told = disagreements(&built, &listed);
    for line in &told {
        println!("{line}");
    }
    Ok(Counted::check(told.is_empty(), told.join("; ")))
}

/// What a person may ask for beyond a stage.
#[derive(Default)]
struct Extra<'a> {
    /// More of the kernel's command line.
    append: &'a str,
    /// Print the whole console of each.
    console: bool,
    /// CPUs instead of the list's.
    cpus: Option<u32>,
    /// Memory in MiB instead of the list's.
    memory: Option<u32>,
    /// Time instead of the list's.
    seconds: Option<u64>,
    /// Arguments instead of the list's.
    arguments: Option<&'a [String]>,
}

fn run_entries(
    guest: &Guest,
    dir: &Path,
    stage: &str,
    wanted: impl Fn(&Entry) -> bool,
) -> Result<Counted, RunnerError> {
    run_list(guest, dir, stage, &Extra::default(), wanted)
}

fn run_list(
    guest: &Guest,
    dir: &Path,
    stage: &str,
    extra: &Extra<'_>,
    wanted: impl Fn(&Entry) -> bool,
) -> Result<Counted, RunnerError> {
    let mut counted = Counted::default();
    for entry in ENTRIES {
        if !wanted(entry) || !entry.runs_on(guest.flavour) {
            continue;
        }
        let mut job = entry.job(dir);
        if !extra.append.is_empty() {
            job.shape.append = format!("{} {}", job.shape.append, extra.append);
        }
        job.shape.cpus = extra.cpus.unwrap_or(job.shape.cpus);
        job.shape.memory_mib = extra.memory.unwrap_or(job.shape.memory_mib);
        job.shape.limit = extra.seconds.map_or(job.shape.limit, Duration::from_secs);
        if let Some(arguments) = extra.arguments {
            job.arguments = arguments.to_vec();
        }
        begin(&job.label);
        // One that cannot run is a failure, and no reason to leave out the others.
        let run = match guest.run(&job) {
            Ok(run) => run,
            Err(error) => {
                counted += not_run(&job.label, &error);
                continue;
            }
        };
        if extra.console {
            print!("{}", run.console);
        }
        let faults = run.faults(|what| entry.may_skip(guest.flavour, what));
        told(&job.label, &run, faults.is_empty());
        if !faults.is_empty() {
            explain(&faults, stage, &job.label, &run)?;
        }
        counted += Counted::new(count(&run, &faults), labelled(&job.label, &faults));
    }
    if counted.tally == Tally::default() {
        return Err(RunnerError::NotRun("no selftest was selected"));
    }
    Ok(counted)
}

/// Passed and skipped tests as they are; a program with faults has failed at
/// least once, and once for each failed test.
fn count(run: &Run, faults: &[String]) -> Tally {
    let failed = run.report.count(Verdict::Failed);
    let skipped = run.report.count(Verdict::Skipped) + u64::from(run.report.skipped.is_some());
    Tally {
        passed: run.report.count(Verdict::Passed),
        failed: failed.max(u64::from(!faults.is_empty())),
        ignored: skipped,
    }
}

/// What none of some runs without the element shows, and the last run. A stale
/// TLB entry is gone when its CPU turns to another process: whether it is used
/// before that is chance.
fn look_for(
    ablation: &Ablation,
    entry: &Entry,
    guest: &Guest,
    dir: &Path,
) -> Result<(Vec<String>, Run), SelftestError> {
    let mut run = ablation.run(entry, guest, dir)?;
    let mut unseen = ablation.unseen(&run);
    for _ in 1..ABLATION_RUNS {
        if unseen.is_empty() {
            break;
        }
        run = ablation.run(entry, guest, dir)?;
        let now = ablation.unseen(&run);
        unseen.retain(|what| now.contains(what));
    }
    Ok((unseen, run))
}

fn run_ablations(
    guest: &impl Fn(Flavour) -> Result<Guest, RunnerError>,
    dir: &Path,
    named: impl Fn(&str) -> bool,
) -> Result<Counted, RunnerError> {
    let mut counted = Counted::default();
    for ablation in ABLATIONS {
        let Some(entry) = ablation.entry() else {
            let why = format!("the list has no '{}'", ablation.entry);
            println!("{why}");
            counted += Counted::failure(why);
            continue;
        };
        let label = ablation.job(entry, dir).label;
        if !named(&label) {
            continue;
        }
        begin(&label);
        let guest = guest(ablation.kernel)?;
        let (unseen, run) = match look_for(ablation, entry, &guest, dir) {
            Ok(looked) => looked,
            Err(error) => {
                counted += not_run(&label, &error);
                continue;
            }
        };
        finish(&format!(
            "{label:<44} {}: {}",
            if unseen.is_empty() {
                "seen"
            } else {
                "NOT SEEN"
            },
            ablation.element
        ));
        if !unseen.is_empty() {
            explain(&unseen, "ablations", &label, &run)?;
        }
        let what = format!("{label}: {}", unseen.join("; "));
        counted += Counted::check(unseen.is_empty(), what);
    }
    if counted.tally == Tally::default() {
        return Err(RunnerError::NotRun("no ablation was selected"));
    }
    Ok(counted)
}

/// On a terminal, says what runs until it is done.
fn begin(label: &str) {
    if std::io::stdout().is_terminal() {
        print!("{label} ...");
        // The line comes again when it is done.
        let _ = std::io::stdout().flush();
    }
}

fn finish(line: &str) {
    if std::io::stdout().is_terminal() {
        print!("\r\x1b[K");
    }
    println!("{line}");
}

/// Says why a program has no result, and counts it.
fn not_run(label: &str, error: &SelftestError) -> Counted {
    let why = chain(error);
    finish(&format!("{label:<44} FAILED  {why}"));
    Counted::failure(format!("{label}: {why}"))
}

fn told(label: &str, run: &Run, good: bool) {
    let verdict = if good { "ok" } else { "FAILED" };
    let retries = match run.retries {
        0 => String::new(),
        count => format!("  (emulator's known race, retry {count})"),
    };
    finish(&format!(
        "{label:<44} {verdict:<7} {:<34} {:>5.1} s{retries}",
        run.counts(),
        run.took.as_secs_f64()
    ));
}

fn explain(faults: &[String], stage: &str, label: &str, run: &Run) -> Result<(), RunnerError> {
    run.explain(faults, stage, label, |line| println!("{line}"))
        .map_err(RunnerError::Selftest)
}

/// One machine of the matrix.
fn run_cell(
    cell: &matrix::Cell,
    guest: &Guest,
    dir: &Path,
    stress: Option<Duration>,
) -> Result<matrix::Outcome, RunnerError> {
    println!("\n{cell}");
    let stress = stress.unwrap_or(cell.programs.stress());
    cell.run(guest, dir, stress, |line| println!("{line}"))
        .map_err(RunnerError::Selftest)
}

/// `runner matrix`. Returns whether nothing was reported.
pub fn matrix(options: &Matrix) -> Result<bool, RunnerError> {
    let mut cells = matrix::cells(options.short);
    cells.retain(|cell| {
        let name = cell.to_string();
        options.words.iter().all(|word| name.contains(word))
    });
    if options.list {
        for cell in &cells {
            println!("{cell}");
        }
        return Ok(true);
    }
    if cells.is_empty() {
        return Err(RunnerError::NotRun("no machine of the matrix was selected"));
    }
    let dir = programs_of(&guest_kernel(Flavour::Default.name())?);
    let stress = options.stress.map(Duration::from_secs);
    let mut results = Vec::new();
    for cell in cells {
        let guest = guest(guest_kernel(cell.flavour.name())?, cell.flavour)?;
        let outcome = run_cell(&cell, &guest, &dir, stress)?;
        results.push((cell, outcome));
    }
    let table = matrix::table(&results);
    println!("\n{table}");
    if let Some(path) = &options.output {
        fs::write(path, &table).map_err(|source| RunnerError::File {
            path: path.clone(),
            source,
        })?;
    }
    let faults: usize = results
        .iter()
        .map(|(_, outcome)| outcome.faults.len())
        .sum();
    println!("{} machines, {faults} faults", results.len());
    Ok(faults == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::selftests::run_of;

    #[test]
    fn program_with_faults_counts_as_failed_even_if_its_tests_passed() {
        let run = Run {
            complaints: vec!["BUG: x".into()],
            ..run_of("TAP version 13\n1..1\nok 1 a\n", 0)
        };
        let faults = run.faults(|_| false);
        assert_eq!(count(&run, &faults).to_string(), "1 passed, 1 failed");
        assert_eq!(count(&run, &[]).to_string(), "1 passed, 0 failed");
    }
}
