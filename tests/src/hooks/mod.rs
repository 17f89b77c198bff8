//! What processes that use no mshare pay for the hooks of the series: the same
//! operations on a kernel without it and on ours, counted in instructions.

pub mod mm;

use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use crate::plain::Clock;
use crate::selftests::klog::Console;
use crate::selftests::{Guest, Job, SelftestError, Shape};

/// The benchmark's loop, whose length is known.
const LOOP: &str = "loop";
/// Instructions of one turn of it.
const TURN: u64 = 2;
/// More than this many thousandths of what it took before is too much.
const TOO_MUCH: u64 = 1020;
/// Instructions around a measured piece: reading the counter twice.
const AROUND: u64 = 16;

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub enum HooksError {
    /// The machine did not run.
    #[error("the benchmark did not run")]
    Run(#[source] SelftestError),
    /// The benchmark ended badly.
    #[error("the benchmark ended with status {status:?}; its console:\n{console}")]
    Failed {
        /// Its status.
        status: Option<u8>,
        /// The console.
        console: String,
    },
    /// The counter is no count of instructions.
    #[error("the counter says {read} for a loop of {known} instructions")]
    Counter {
        /// What was read.
        read: u64,
        /// What was executed.
        known: u64,
    },
    /// The two kernels did not do the same.
    #[error("the kernels did not run the same operations")]
    Different,
}

/// A figure: the least that one round of an operation took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Figure {
    /// The operation.
    pub name: String,
    /// Operations in a round.
    pub count: u64,
    /// Instructions of the round.
    pub least: u64,
}

/// Runs the benchmark on a kernel.
pub fn measure(guest: &Guest, program: &Path) -> Result<Vec<Figure>, HooksError> {
    let job = Job {
        label: "hooks".into(),
        program: program.to_owned(),
        arguments: Vec::new(),
        env: Vec::new(),
        writes: Vec::new(),
        shape: Shape {
            cpus: 1,
            memory_mib: 512,
            // The same addresses in both kernels.
            append: "norandmaps".into(),
            clock: Clock::Instructions,
            limit: Duration::from_secs(600),
        },
    };
    let booted = guest.watch(&job).map_err(HooksError::Run)?.booted;
    let console = Console::new(&booted.console);
    let figures = figures(console.program.iter().copied());
    if booted.status != Some(0) || !console.complaints().is_empty() {
        return Err(HooksError::Failed {
            status: booted.status,
            console: booted.console,
        });
    }
    check_counter(&figures)?;
    Ok(figures)
}

/// The lines "hooks: NAME COUNT LEAST".
fn figures<'a>(lines: impl IntoIterator<Item = &'a str>) -> Vec<Figure> {
    let figure = |line: &str| {
        let mut words = line.strip_prefix("hooks: ")?.split_whitespace();
        Some(Figure {
            name: words.next()?.to_owned(),
            count: words.next()?.parse().ok().filter(|count| *count > 0)?,
            least: words.next()?.parse().ok()?,
        })
    };
    lines.into_iter().filter_map(figure).collect()
}

/// A loop of known length has to read as that length.
fn check_counter(figures: &[Figure]) -> Result<(), HooksError> {
    let figure = figures.iter().find(|figure| figure.name == LOOP);
    let (read, known) = figure.map_or((0, 1), |figure| (figure.least, figure.count * TURN));
    if read < known || read > known + AROUND {
        return Err(HooksError::Counter { read, known });
    }
    Ok(())
}

/// The comparison as a Markdown table.
pub fn table(vanilla: &[Figure], ours: &[Figure]) -> Result<String, HooksError> {
    let same = |(a, b): (&Figure, &Figure)| a.name == b.name && a.count == b.count;
    if vanilla.len() != ours.len() || !vanilla.iter().zip(ours).all(same) {
        return Err(HooksError::Different);
    }
    let mut text = String::from(
        "| instructions for one | without the series | with it | difference | ratio |\n\
         |---|---|---|---|---|\n",
    );
    for (without, with) in vanilla.iter().zip(ours) {
        let (a, b) = (tenths(without), tenths(with));
        // Thousandths, rounded; an operation takes an instruction at least.
        let ratio = (b * 2000 / a.max(1)).div_ceil(2);
        let sign = if b < a { "-" } else { "+" };
        let difference = a.abs_diff(b);
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "| {} | {}.{} | {}.{} | {sign}{}.{} | {}.{:03} |",
            without.name,
            a / 10,
            a % 10,
            b / 10,
            b % 10,
            difference / 10,
            difference % 10,
            ratio / 1000,
            ratio % 1000,
        );
    }
    Ok(text)
}

/// Operations that became too dear.
pub fn too_dear<'a>(vanilla: &'a [Figure], ours: &[Figure]) -> Vec<&'a str> {
    let dear = |(a, b): &(&Figure, &Figure)| tenths(b) * 1000 > tenths(a) * TOO_MUCH;
    let pairs = vanilla.iter().zip(ours).filter(dear);
    pairs.map(|(a, _)| a.name.as_str()).collect()
}

/// Tenths of an instruction for one operation.
fn tenths(figure: &Figure) -> u64 {
    figure.least * 10 / figure.count
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(name: &str, count: u64, least: u64) -> Figure {
        Figure {
            name: name.into(),
            count,
            least,
        }
    }

    #[test]
    fn figures_are_read_and_other_lines_are_not() {
        let lines = ["hooks: loop 10 20", "noise", "hooks: x 0 5", "hooks: y 1"];
        assert_eq!(figures(lines), [figure("loop", 10, 20)]);
    }

    #[test]
    fn counter_that_counts_something_else_is_refused() {
        check_counter(&[figure(LOOP, 1000, 2003)]).unwrap();
        check_counter(&[figure(LOOP, 1000, 1400)]).unwrap_err();
        check_counter(&[figure(LOOP, 1000, 2100)]).unwrap_err();
        check_counter(&[]).unwrap_err();
    }

    #[test]
    fn table_shows_difference_and_ratio() {
        let table = table(&[figure("fault", 4, 400)], &[figure("fault", 4, 410)]).unwrap();
        assert!(
            table.ends_with("| fault | 100.0 | 102.5 | +2.5 | 1.025 |\n"),
            "{table}"
        );
    }

    #[test]
    fn one_in_fifty_is_too_dear() {
        let vanilla = [figure("fault", 1, 1000), figure("fork", 1, 1000)];
        let ours = [figure("fault", 1, 1020), figure("fork", 1, 1021)];
        assert_eq!(too_dear(&vanilla, &ours), ["fork"]);
    }

    #[test]
    fn different_operations_are_not_compared() {
        table(&[figure("a", 1, 1)], &[figure("b", 1, 1)]).unwrap_err();
        table(&[figure("a", 1, 1)], &[]).unwrap_err();
    }
}
