//! `make bisect`: every patch of the series leaves a tree that compiles, and a
//! kernel that boots.

use std::ffi::OsStr;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use mshare_protocol::report::chain;

use super::build::{kernel_of, program, programs};
use super::{RunnerError, project};
use crate::cache;
use crate::plain::Clock;
use crate::selftests::klog::Console;
use crate::selftests::{Flavour, Guest, Job, Shape, keep};

/// Which steps to take.
#[derive(Debug, Clone, clap::Args)]
pub struct Bisect {
    /// The first patch, counted from 1
    #[arg(long, default_value_t = 1)]
    from: usize,
    /// The last patch
    #[arg(long)]
    to: Option<usize>,
}

/// Builds and boots after each patch. Returns whether all is well.
///
/// The steps have a cache of their own: the tree that the next build of the
/// whole series continues is left alone.
pub fn bisect(options: &Bisect) -> Result<bool, RunnerError> {
    let patches = patches()?;
    let last = options.to.unwrap_or(patches.len()).min(patches.len());
    if options.from == 0 || options.from > last {
        return Err(RunnerError::NotRun("no patch was selected"));
    }
    let cache = cache::dir()
        .ok_or(RunnerError::NotRun(
            "no cache folder: set MSHARE_CACHE or HOME",
        ))?
        .join("bisect");
    let agent = program(&programs()?, "guest-agent")?;
    let mut failed = 0;
    for (count, name) in patches.iter().enumerate().take(last).skip(options.from - 1) {
        let count = count + 1;
        let words = count.to_string();
        let env: [(&str, &OsStr); 2] = [
            ("MSHARE_PATCHES", words.as_ref()),
            ("MSHARE_CACHE", cache.as_os_str()),
        ];
        let told = match kernel_of(Flavour::Default.name(), &env) {
            Ok(kernel) => boot(kernel, agent.clone(), name)?,
            Err(error) => Some(chain(&error)),
        };
        failed += usize::from(told.is_some());
        let told = told.unwrap_or_else(|| "builds and boots".into());
        println!("{count:>3} of {} {name}: {told}", patches.len());
    }
    println!("{} patches, {failed} failed", last + 1 - options.from);
    Ok(failed == 0)
}

fn patches() -> Result<Vec<String>, RunnerError> {
    let dir = project().join("images/kernel/patches");
    let file = |source| RunnerError::File {
        path: dir.clone(),
        source,
    };
    let mut names = Vec::new();
    for entry in fs::read_dir(&dir).map_err(file)? {
        let name = entry.map_err(file)?.file_name();
        let name = name.to_string_lossy();
        if name.ends_with(".patch") {
            names.push(name.into_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// Boots to the agent, which runs itself as the program. Returns what is wrong.
fn boot(kernel: PathBuf, agent: PathBuf, name: &str) -> Result<Option<String>, RunnerError> {
    let guest = Guest {
        kernel,
        flavour: Flavour::Default,
        agent: agent.clone(),
    };
    let job = Job {
        label: name.into(),
        program: agent,
        arguments: vec!["figures".into()],
        env: Vec::new(),
        writes: Vec::new(),
        shape: Shape {
            cpus: 2,
            memory_mib: 512,
            append: String::new(),
            clock: Clock::Host,
            limit: Duration::from_secs(60),
        },
    };
    let booted = guest.watch(&job).map_err(RunnerError::Selftest)?.booted;
    let console = Console::new(&booted.console);
    let told = match (booted.status, console.complaints().first()) {
        (_, Some(line)) => format!("the kernel says {line}"),
        (Some(0), None) => return Ok(None),
        (status, None) => format!("it boots to status {status:?}"),
    };
    let kept = keep("bisect", name, &booted.console).map_err(RunnerError::Selftest)?;
    Ok(Some(format!("{told}; console: {}", kept.display())))
}
