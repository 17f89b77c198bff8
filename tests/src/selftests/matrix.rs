//! The same programs on kernels that watch themselves, in many machines:
//! flavours, page-table isolation, paging levels, CPUs, preemption models.

use std::fmt::{self, Write};
use std::path::Path;
use std::time::Duration;

use mshare_protocol::report::chain;

use super::klog::Console;
use super::list::{ENTRIES, Entry, STRESS_SECONDS};
use super::{Flavour, Guest, SelftestError, labelled};

/// A machine of the matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cell {
    /// The kernel.
    pub flavour: Flavour,
    /// Page-table isolation.
    pub pti: bool,
    /// Five-level paging, else four.
    pub la57: bool,
    /// CPUs.
    pub cpus: u32,
    /// The preemption model, where it can be chosen at boot.
    pub preempt: Option<Preempt>,
    /// What runs in it.
    pub programs: Programs,
}

/// Which of the programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Programs {
    /// All of them.
    All,
    /// Those of the short form of a stage.
    Short,
    /// The few that share, protect, fork and stress.
    Core,
}

impl Programs {
    fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Short => "short",
            Self::Core => "core",
        }
    }

    fn has(self, entry: &Entry) -> bool {
        match self {
            Self::All => true,
            Self::Short => entry.short || entry.stress,
            Self::Core => entry.core,
        }
    }

    /// For how long it is stressed if nobody says.
    pub fn stress(self) -> Duration {
        Duration::from_secs(match self {
            Self::All => 180,
            Self::Short => 20,
            Self::Core => 10,
        })
    }
}

/// `preempt=`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preempt {
    /// The kernel gives the CPU up at its own points only.
    None,
    /// Everywhere.
    Full,
}

impl Preempt {
    fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Full => "full",
        }
    }
}

/// What came of a cell.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Programs that ran.
    pub programs: u64,
    /// Tests that passed.
    pub passed: u64,
    /// Tests that this kernel cannot run.
    pub skipped: u64,
    /// What was wrong.
    pub faults: Vec<String>,
    /// How long it took.
    pub took: Duration,
}

/// The cells: a few for every change, or all. In each of them those programs run
/// whose result depends on the machine most, and more in one of each flavour, or
/// of the short form.
pub fn cells(short: bool) -> Vec<Cell> {
    let mut cells = Vec::new();
    for flavour in [Flavour::Debug, Flavour::Kasan, Flavour::Kcsan] {
        for pti in [true, false] {
            for la57 in [true, false] {
                for cpus in [1, 2, 4, 8] {
                    for preempt in preempts(flavour) {
                        let main = pti && la57 && cpus == 2 && *preempt != Some(Preempt::None);
                        cells.push(Cell {
                            flavour,
                            pti,
                            la57,
                            cpus,
                            preempt: *preempt,
                            programs: if main { Programs::All } else { Programs::Short },
                        });
                    }
                }
            }
        }
    }
    if short {
        cells.retain(Cell::in_short_form);
        for cell in &mut cells {
            let main = cell.programs == Programs::All;
            cell.programs = if main {
                Programs::Short
            } else {
                Programs::Core
            };
        }
    }
    cells
}

/// Only the debug flavour can choose.
fn preempts(flavour: Flavour) -> &'static [Option<Preempt>] {
    match flavour {
        Flavour::Debug => &[Some(Preempt::Full), Some(Preempt::None)],
        _ => &[None],
    }
}

impl Cell {
    /// The short form has each value of each column once or more, but one kernel
    /// only: building the others takes longer than running it.
    fn in_short_form(&self) -> bool {
        let key = (self.pti, self.la57, self.cpus, self.preempt);
        self.flavour == Flavour::Debug
            && [
                (true, true, 2, Some(Preempt::Full)),
                (false, false, 4, Some(Preempt::None)),
                (true, false, 1, Some(Preempt::Full)),
                (false, true, 8, Some(Preempt::None)),
            ]
            .contains(&key)
    }

    /// What the kernel is told.
    pub fn append(&self) -> String {
        let pti = if self.pti { "on" } else { "off" };
        let mut append = format!("pti={pti}");
        if !self.la57 {
            append.push_str(" no5lvl");
        }
        if let Some(preempt) = self.preempt {
            append.push_str(" preempt=");
            append.push_str(preempt.name());
        }
        append
    }

    /// The entries it runs.
    pub fn entries(&self) -> impl Iterator<Item = &'static Entry> {
        let cell = *self;
        ENTRIES.iter().filter(move |entry| {
            cell.programs.has(entry) && entry.runs_on(cell.flavour) && entry.min_cpus <= cell.cpus
        })
    }

    /// Where a guest is not what the cell says.
    pub fn differences(&self, console: &Console<'_>) -> Vec<String> {
        let mut differences = Vec::new();
        for (flag, expected) in [("pti", self.pti), ("la57", self.la57)] {
            if console.has_flag(flag) != expected {
                differences.push(format!("the guest's flag {flag} is not {expected}"));
            }
        }
        let online = match self.cpus {
            1 => "0".to_owned(),
            cpus => format!("0-{}", cpus - 1),
        };
        let setting = console.setting.unwrap_or("nothing");
        if setting.split(' ').next() != Some(online.as_str()) {
            differences.push(format!("CPUs {online} expected, the guest has {setting}"));
        }
        if let Some(preempt) = self.preempt {
            let said = format!("Dynamic Preempt: {}", preempt.name());
            if !console.kernel_said(&said) {
                differences.push(format!("the kernel did not say '{said}'"));
            }
        }
        differences
    }

    /// Runs its programs, those that stress for this long.
    pub fn run(
        &self,
        guest: &Guest,
        programs: &Path,
        stress: Duration,
        mut say: impl FnMut(&str),
    ) -> Result<Outcome, SelftestError> {
        let mut outcome = Outcome::default();
        for entry in self.entries() {
            let mut job = entry.job(programs);
            job.shape.cpus = self.cpus;
            job.shape.append = format!("{} {}", job.shape.append, self.append());
            if entry.stress {
                job.env
                    .push(format!("{STRESS_SECONDS}={}", stress.as_secs()));
                job.shape.limit += stress;
            }
            outcome.programs += 1;
            // One that cannot run is a fault, and no reason to end a run of hours.
            let run = match guest.run(&job) {
                Ok(run) => run,
                Err(error) => {
                    let fault = format!("{}: {}", job.label, chain(&error));
                    say(&fault);
                    outcome.faults.push(fault);
                    continue;
                }
            };
            let mut faults = run.faults(|what| entry.may_skip(self.flavour, what));
            faults.extend(self.differences(&Console::new(&run.console)));
            say(&format!(
                "{:<28} {}, {:.0} s",
                job.label,
                run.counts(),
                run.took.as_secs_f64()
            ));
            if !faults.is_empty() {
                let label = format!("{self} {}", job.label);
                run.explain(&faults, "matrix", &label, &mut say)?;
            }
            outcome.passed += run.report.count(super::tap::Verdict::Passed);
            outcome.skipped += run.report.count(super::tap::Verdict::Skipped);
            outcome.took += run.took;
            outcome.faults.extend(labelled(&job.label, &faults));
        }
        if outcome.programs == 0 {
            outcome.faults.push("no program runs in this cell".into());
        }
        Ok(outcome)
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} pti={} {}-level {} CPU{} preempt={} {}",
            self.flavour.name(),
            if self.pti { "on" } else { "off" },
            if self.la57 { 5 } else { 4 },
            self.cpus,
            if self.cpus == 1 { "" } else { "s" },
            self.preempt.map_or("-", Preempt::name),
            self.programs.name(),
        )
    }
}

/// The result as a Markdown table.
pub fn table(results: &[(Cell, Outcome)]) -> String {
    let mut text = String::from(
        "| kernel | pti | levels | CPUs | preempt | programs | passed | skipped | faults | s |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
    );
    for (cell, outcome) in results {
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            cell.flavour.name(),
            if cell.pti { "on" } else { "off" },
            if cell.la57 { 5 } else { 4 },
            cell.cpus,
            cell.preempt.map_or("-", Preempt::name),
            outcome.programs,
            outcome.passed,
            outcome.skipped,
            outcome.faults.len(),
            outcome.took.as_secs(),
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_form_shows_every_value_of_every_column() {
        let (short, all) = (cells(true), cells(false));
        assert_eq!((short.len(), all.len()), (4, 64));
        let shown = |value: fn(&Cell) -> String| {
            let of = |cells: &[Cell]| {
                let mut values: Vec<_> = cells.iter().map(value).collect();
                values.sort();
                values.dedup();
                values
            };
            (of(&short), of(&all))
        };
        for value in [
            |cell: &Cell| cell.pti.to_string(),
            |cell: &Cell| cell.la57.to_string(),
            |cell: &Cell| cell.cpus.to_string(),
        ] {
            let (short, all) = shown(value);
            assert_eq!(short, all);
        }
    }

    #[test]
    fn each_flavour_has_one_cell_with_all_programs() {
        for flavour in [Flavour::Debug, Flavour::Kasan, Flavour::Kcsan] {
            let all = cells(false);
            let main = all
                .iter()
                .filter(|cell| cell.programs == Programs::All && cell.flavour == flavour);
            assert_eq!(main.count(), 1);
        }
    }

    #[test]
    fn short_form_has_one_cell_with_more_than_the_core() {
        let more = cells(true)
            .into_iter()
            .filter(|cell| cell.programs != Programs::Core);
        assert_eq!(more.count(), 1);
        for cell in cells(true) {
            assert!(cell.entries().count() >= 3, "{cell}");
        }
    }

    #[test]
    fn guest_that_is_set_up_otherwise_is_told() {
        let cell = Cell {
            flavour: Flavour::Debug,
            pti: true,
            la57: false,
            cpus: 4,
            preempt: Some(Preempt::Full),
            programs: Programs::Short,
        };
        assert_eq!(cell.append(), "pti=on no5lvl preempt=full");
        let good = "[    1.000000] Dynamic Preempt: full\nguest: cpus 0-3 flags pti smep\n";
        assert_eq!(cell.differences(&Console::new(good)), [""; 0]);
        let bad = "guest: cpus 0-1 flags la57\n";
        assert_eq!(cell.differences(&Console::new(bad)).len(), 4);
        assert_eq!(cell.differences(&Console::new("")).len(), 3);
    }

    #[test]
    fn table_has_a_line_per_cell() {
        let results: Vec<_> = cells(true)
            .into_iter()
            .map(|cell| (cell, Outcome::default()))
            .collect();
        assert_eq!(table(&results).lines().count(), results.len() + 2);
    }
}
