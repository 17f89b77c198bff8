//! Selftests of the kernel series: each program is the only one in a virtual
//! machine under plain emulation, watched by the agent
//! (`guest-agent watch`), and judged by what it and the kernel say.

pub mod ablation;
pub mod klog;
pub mod list;
pub mod matrix;
pub mod tap;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::cache;
use crate::initramfs::{self, InitramfsError};
use crate::plain::{Boot, BootError, Booted, Clock};
use klog::Console;
use tap::{Report, Verdict};

/// Where the program is in the guest.
const PLACE: &str = "/selftests";
/// How often a guest that died of the emulator's known race starts again.
const RETRIES: u32 = 2;
/// Time for boot and end, for a kernel that is not slowed down.
const BOOT: Duration = Duration::from_secs(60);
/// Lines of the console that are shown where something failed.
const SHOWN: usize = 40;

/// Why a program has no result.
#[derive(Debug, thiserror::Error)]
pub enum SelftestError {
    /// The machine did not run.
    #[error("the machine did not run")]
    Boot(#[source] BootError),
    /// No initramfs.
    #[error("no initramfs")]
    Initramfs(#[source] InitramfsError),
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

/// A flavour of the guest kernel (images/kernel/build.sh).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Flavour {
    /// The series.
    Default,
    /// Safety elements can be taken out.
    Ablation,
    /// Locks, page tables, lifetimes; fault injection, NUMA, preempt=.
    Debug,
    /// Address sanitizer.
    Kasan,
    /// Data races in mm/mshare*.c.
    Kcsan,
    /// Without the series.
    Vanilla,
}

impl Flavour {
    /// As build.sh calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Ablation => "ablation",
            Self::Debug => "debug",
            Self::Kasan => "kasan",
            Self::Kcsan => "kcsan",
            Self::Vanilla => "vanilla",
        }
    }

    /// Memory of a machine that shall have this much: the checks take theirs.
    fn memory(self, mib: u32) -> u32 {
        match self {
            Self::Default | Self::Ablation | Self::Vanilla | Self::Kcsan => mib,
            Self::Debug | Self::Kasan => mib + mib / 2,
        }
    }

    /// How much longer things may take than on the default kernel.
    fn patience(self) -> u32 {
        match self {
            Self::Default | Self::Ablation | Self::Vanilla => 1,
            Self::Kcsan => 3,
            Self::Debug | Self::Kasan => 4,
        }
    }
}

/// A kernel of ours, and what runs on it.
#[derive(Debug, Clone)]
pub struct Guest {
    /// The kernel: a bzImage.
    pub kernel: PathBuf,
    /// How it was built.
    pub flavour: Flavour,
    /// The agent.
    pub agent: PathBuf,
}

/// One program in one machine.
#[derive(Debug, Clone)]
pub struct Job {
    /// What it is called here and in file names.
    pub label: String,
    /// The program on this machine.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Variables of its environment: `NAME=VALUE`.
    pub env: Vec<String>,
    /// What is written into files of the guest before: `PATH=VALUE`.
    pub writes: Vec<String>,
    /// The machine.
    pub shape: Shape,
}

/// A machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    /// CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// More of the kernel's command line.
    pub append: String,
    /// How time passes.
    pub clock: Clock,
    /// Time for the program on the default kernel.
    pub limit: Duration,
}

/// What came of a job.
#[derive(Debug, Clone)]
pub struct Run {
    /// What the program reported.
    pub report: Report,
    /// Its exit status, if it had one.
    pub status: Option<u8>,
    /// What the kernel complained about.
    pub complaints: Vec<String>,
    /// The whole console.
    pub console: String,
    /// Starts that died of the emulator's known race before this one.
    pub retries: u32,
    /// From start to end.
    pub took: Duration,
}

impl Run {
    /// All that is wrong with it; `may_skip` says of a test's name, or of the
    /// reason why all of the program was skipped, whether that is allowed.
    pub fn faults(&self, may_skip: impl Fn(&str) -> bool) -> Vec<String> {
        let mut faults = self.report.problems.clone();
        for test in &self.report.tests {
            match test.verdict {
                Verdict::Failed => faults.push(match &test.said {
                    Some(said) => format!("not ok: {} ({said})", test.name),
                    None => format!("not ok: {}", test.name),
                }),
                Verdict::Expected => {
                    faults.push(format!("failed, as nothing here may: {}", test.name));
                }
                Verdict::Skipped if !may_skip(&test.name) => {
                    faults.push(format!("skipped, which is not allowed: {}", test.name));
                }
                Verdict::Skipped | Verdict::Passed => {}
            }
        }
        if let Some(reason) = &self.report.skipped
            && !may_skip(reason)
        {
            faults.push(format!("skipped all, which is not allowed: {reason}"));
        }
        let kernel = self.complaints.iter();
        faults.extend(kernel.map(|line| format!("kernel: {line}")));
        faults
    }

    /// Says what was wrong, and what the console said last: all of it is kept,
    /// but on a machine that may be gone. `stage` and `label` name the file.
    pub fn explain(
        &self,
        faults: &[String],
        stage: &str,
        label: &str,
        mut say: impl FnMut(&str),
    ) -> Result<(), SelftestError> {
        for fault in faults {
            say(&format!("    {fault}"));
        }
        let lines: Vec<&str> = self.console.lines().collect();
        let last = lines.len().saturating_sub(SHOWN);
        for line in &lines[last..] {
            say(&format!("    | {line}"));
        }
        let kept = keep(stage, label, &self.console)?;
        say(&format!("    console: {}", kept.display()));
        Ok(())
    }

    /// "12 passed, 0 failed, 1 skipped".
    pub fn counts(&self) -> String {
        format!(
            "{} passed, {} failed, {} skipped",
            self.report.count(Verdict::Passed),
            self.report.count(Verdict::Failed),
            self.report.count(Verdict::Skipped) + u64::from(self.report.skipped.is_some()),
        )
    }
}

/// What a machine came to.
#[derive(Debug, Clone)]
pub struct Watched {
    /// The end and the console.
    pub booted: Booted,
    /// Whether it had to be ended from here.
    pub late: bool,
    /// Starts that died of the emulator's known race before this one.
    pub retries: u32,
}

impl Guest {
    /// Runs a program in a machine of its own and reads what it reports.
    pub fn run(&self, job: &Job) -> Result<Run, SelftestError> {
        let start = Instant::now();
        let watched = self.watch(job)?;
        let booted = watched.booted;
        let console = Console::new(&booted.console);
        let mut report = tap::read(console.program.iter().copied(), booted.status);
        if watched.late {
            report.problems.push("the machine did not end".into());
        }
        let complaints = console.complaints();
        Ok(Run {
            report,
            status: booted.status,
            complaints: complaints.into_iter().map(str::to_owned).collect(),
            retries: watched.retries,
            took: start.elapsed(),
            console: booted.console,
        })
    }

    /// Runs a program in a machine of its own.
    pub fn watch(&self, job: &Job) -> Result<Watched, SelftestError> {
        let dir = tempfile::tempdir().map_err(file(Path::new("a temporary folder")))?;
        let initramfs = dir.path().join("initramfs");
        let inside = format!("{PLACE}/{}", file_name(&job.program));
        let files = [(job.program.clone(), inside.clone())];
        initramfs::pack(&self.agent, &files, &initramfs).map_err(SelftestError::Initramfs)?;
        let patience = self.flavour.patience();
        let limit = job.shape.limit * patience;
        let mut boot = Boot::new(&self.kernel);
        boot.initramfs = Some(initramfs);
        boot.cpus = job.shape.cpus;
        boot.memory_mib = self.flavour.memory(job.shape.memory_mib);
        boot.clock = job.shape.clock;
        boot.timeout = limit + BOOT * patience;
        boot.append = append(job, &inside, limit);
        let mut retries = 0;
        loop {
            let (booted, late) = match boot.run(|_| {}) {
                Ok(booted) => (booted, false),
                Err(BootError::TimedOut { console, .. }) => {
                    let panicked = false;
                    let status = None;
                    (
                        Booted {
                            status,
                            panicked,
                            console,
                        },
                        true,
                    )
                }
                Err(error) => return Err(SelftestError::Boot(error)),
            };
            if retries < RETRIES && Console::new(&booted.console).lost_race() {
                retries += 1;
                continue;
            }
            return Ok(Watched {
                booted,
                late,
                retries,
            });
        }
    }
}

/// The kernel's command line: the agent's words last, quoted as one.
fn append(job: &Job, inside: &str, limit: Duration) -> String {
    let mut words = vec![format!("guest-agent watch --limit {}", limit.as_secs())];
    words.extend(job.env.iter().map(|pair| format!("--env {pair}")));
    words.extend(job.writes.iter().map(|pair| format!("--write {pair}")));
    words.push(format!("-- {inside}"));
    words.extend(job.arguments.iter().cloned());
    format!("{} agent.exec=\"{}\"", job.shape.append, words.join(" "))
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or(path.as_os_str())
        .to_string_lossy()
        .into_owned()
}

fn file(path: &Path) -> impl FnOnce(io::Error) -> SelftestError {
    let path = path.to_owned();
    move |source| SelftestError::File { path, source }
}

/// What was wrong, with where.
pub fn labelled(label: &str, faults: &[String]) -> Vec<String> {
    let faults = faults.iter();
    faults.map(|fault| format!("{label}: {fault}")).collect()
}

/// The programs in a folder, by name.
pub fn published(dir: &Path) -> Result<Vec<String>, SelftestError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(file(dir))? {
        let entry = entry.map_err(file(dir))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// Keeps the console of a run that failed, and says where.
pub fn keep(stage: &str, label: &str, console: &str) -> Result<PathBuf, SelftestError> {
    let base = cache::dir().ok_or(SelftestError::Initramfs(InitramfsError::NoCache))?;
    let dir = base.join("consoles");
    fs::create_dir_all(&dir).map_err(file(&dir))?;
    let name = format!("{stage}-{label}.log").replace(['/', ' ', ','], "-");
    let path = dir.join(name);
    fs::write(&path, console).map_err(file(&path))?;
    Ok(path)
}

/// A run of which only its TAP and its status are known.
#[cfg(test)]
pub(crate) fn run_of(text: &str, status: u8) -> Run {
    Run {
        report: tap::read(text.lines(), Some(status)),
        status: Some(status),
        complaints: Vec::new(),
        console: String::new(),
        retries: 0,
        took: Duration::ZERO,
    }
}

#[cfg(test)]
mod tests {
    use super::{run_of as run, *};

    #[test]
    fn skip_is_a_fault_unless_the_list_allows_it() {
        let skips = run("TAP version 13\n1..2\nok 1 a\nok 2 b # SKIP no swap\n", 0);
        assert_eq!(skips.faults(|name| name.contains("no swap")), [""; 0]);
        assert_eq!(skips.faults(|_| false).len(), 1);
        let all = run("TAP version 13\n1..0 # SKIP no huge pages\n", 4);
        assert_eq!(all.faults(|_| false).len(), 1);
        assert_eq!(all.counts(), "0 passed, 0 failed, 1 skipped");
    }

    #[test]
    fn kernel_that_complains_fails_a_program_that_does_not() {
        let mut good = run("TAP version 13\n1..1\nok 1 a\n", 0);
        assert_eq!(good.faults(|_| false), [""; 0]);
        good.complaints.push("BUG: x".into());
        assert_eq!(good.faults(|_| false), ["kernel: BUG: x"]);
    }

    #[test]
    fn fault_says_where_a_test_failed() {
        let failed = run("TAP version 13\n1..1\n# a.c:3: not so: x\nnot ok 1 a\n", 1);
        assert_eq!(failed.faults(|_| false), ["not ok: a (a.c:3: not so: x)"]);
    }

    #[test]
    fn expected_failure_is_a_failure() {
        let xfail = run("TAP version 13\n1..1\nok 1 # XFAIL a\n", 0);
        assert_eq!(xfail.faults(|_| true).len(), 1);
    }

    #[test]
    fn command_line_quotes_the_agents_words() {
        let job = Job {
            label: "x".into(),
            program: "/here/prog".into(),
            arguments: vec!["-v".into()],
            env: vec!["A=1".into()],
            writes: vec!["/p=2".into()],
            shape: Shape {
                cpus: 1,
                memory_mib: 1,
                append: "pti=on".into(),
                clock: Clock::Host,
                limit: Duration::from_secs(5),
            },
        };
        assert_eq!(
            append(&job, "/selftests/prog", job.shape.limit),
            "pti=on agent.exec=\"guest-agent watch --limit 5 --env A=1 --write /p=2 \
             -- /selftests/prog -v\""
        );
    }
}
