//! `make hooks`: the series' cost and effect on what does not use it.

use std::path::Path;

use mshare_protocol::report::chain;

use super::RunnerError;
use super::build::guest_kernel;
use super::selftests::guest;
use crate::hooks::mm::{Comparison, LEFT_OUT, PROGRAMS, Program};
use crate::hooks::{measure, table, too_dear};
use crate::selftests::list::disagreements;
use crate::selftests::{Flavour, Guest, keep, published};

/// What `runner hooks` does.
#[derive(Debug, Clone, clap::Args)]
pub struct Hooks {
    /// Compare the results of the tree's own mm selftests instead
    #[arg(long)]
    mm: bool,
    /// A default kernel, built elsewhere
    #[arg(long, value_name = "BZIMAGE")]
    kernel: Option<std::path::PathBuf>,
    /// Only mm selftests whose names hold one of these
    names: Vec<String>,
}

/// Measures, or compares. Returns whether there is nothing to object to.
pub fn hooks(options: &Hooks) -> Result<bool, RunnerError> {
    let image = guest_kernel(Flavour::Vanilla.name())?;
    let ours = match &options.kernel {
        Some(kernel) => kernel.clone(),
        None => guest_kernel(Flavour::Default.name())?,
    };
    let vanilla = guest(image.clone(), Flavour::Vanilla)?;
    let ours = guest(ours, Flavour::Default)?;
    if options.mm {
        return compare(&vanilla, &ours, &image.with_file_name("mm"), &options.names);
    }
    let program = image.with_file_name("bench").join("hooks");
    let run = |guest: &Guest| measure(guest, &program).map_err(RunnerError::Hooks);
    let (without, with) = (run(&vanilla)?, run(&ours)?);
    println!("\n{}", table(&without, &with).map_err(RunnerError::Hooks)?);
    let dear = too_dear(&without, &with);
    for name in &dear {
        println!("too dear: {name}");
    }
    Ok(dear.is_empty())
}

fn compare(
    vanilla: &Guest,
    ours: &Guest,
    dir: &Path,
    names: &[String],
) -> Result<bool, RunnerError> {
    let wanted = |program: &&Program| {
        names.is_empty()
            || names
                .iter()
                .any(|name| program.name.contains(name.as_str()))
    };
    let listed: Vec<&str> = PROGRAMS.iter().map(|program| program.name).collect();
    let built = published(dir).map_err(RunnerError::Selftest)?;
    let mut different = 0;
    for line in disagreements(&built, &listed) {
        println!("{line}");
        different += 1;
    }
    for (names, why) in LEFT_OUT {
        println!("left out: {}: {why}", names.join(", "));
    }
    let mut compared = 0;
    for program in PROGRAMS.iter().filter(wanted) {
        let run = |guest: &Guest| program.run(guest, dir);
        let pair = run(vanilla).and_then(|vanilla| {
            let ours = run(ours)?;
            Ok(Comparison { vanilla, ours })
        });
        let pair = match pair {
            Ok(pair) => pair,
            Err(error) => {
                println!("{:<24} FAILED  {}", program.name, chain(&error));
                different += 1;
                continue;
            }
        };
        compared += 1;
        let differences = pair.differences(program.silent);
        let verdict = if differences.is_empty() {
            "same"
        } else {
            "DIFFERENT"
        };
        println!(
            "{:<24} {verdict:<10} {}, status {}, {:.0} s",
            program.name,
            pair.ours.counts(),
            pair.ours
                .status
                .map_or("none".into(), |status| status.to_string()),
            (pair.vanilla.took + pair.ours.took).as_secs_f64(),
        );
        if differences.is_empty() {
            continue;
        }
        different += 1;
        for line in differences {
            println!("    {line}");
        }
        for (name, run) in [("vanilla", &pair.vanilla), ("default", &pair.ours)] {
            let kept = keep("mm", &format!("{}-{name}", program.name), &run.console)
                .map_err(RunnerError::Selftest)?;
            println!("    console: {}", kept.display());
        }
    }
    println!("{compared} programs compared, {different} differences");
    Ok(compared > 0 && different == 0)
}
