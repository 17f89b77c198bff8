//! The test programs that need guests, run where guests run.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::thread;

use mshare_protocol::report::chain;

use super::build::{self, Kernels};
use super::command::{self, command, pass, stream};
use super::place::{self, LabSize, Place, Run, Said};
use super::tally::{Counted, Reader, Tally};
use super::{Options, RunnerError};
use crate::artifacts::Artifacts;

/// A test program that needs guests.
#[derive(Debug)]
pub struct Program {
    /// Its name.
    pub name: &'static str,
    /// CPUs of its lab. Its Linux guests get one: the emulator loses virtual
    /// machines that move between CPUs, see `docs/testing.md`.
    cpus: u32,
    /// Whether its tests can run in several labs at a time.
    divisible: bool,
}

/// The programs: `tiny` needs KVM only, and needs vCPUs that really run at the
/// same time.
pub const PROGRAMS: [Program; 2] = [
    Program {
        name: "tiny",
        cpus: 2,
        divisible: false,
    },
    Program {
        name: "guest",
        cpus: 1,
        divisible: true,
    },
];

/// Pieces that a program's tests are cut into, for each lab that runs at a time:
/// what has to be run again when a lab dies is small, and no lab idles long.
const PIECES_PER_LAB: usize = 4;

/// Labs at a time, if this machine has the CPUs.
const MAX_LABS: usize = 4;

/// Runs the test programs; `filter` goes to them.
pub fn guests(
    options: Options,
    kernels: Kernels,
    filter: &[String],
) -> Result<Counted, RunnerError> {
    let programs = build::programs()?;
    let artifacts = build::artifacts(&programs, kernels)?;
    let mut arguments = vec!["test", "--no-run", "-p", "mshare-tests"];
    for program in &PROGRAMS {
        arguments.extend(["--test", program.name]);
    }
    let tests = command::build(&arguments)?;
    let place = place::choose(&artifacts.vmm, options.force_lab)?;
    let mut counted = Counted::default();
    for Program {
        name,
        cpus,
        divisible,
    } in &PROGRAMS
    {
        let program = build::program(&tests, name)?;
        let machine = Machine {
            place,
            lab: LabSize {
                cpus: options.lab.cpus.or(Some(*cpus)),
                ..options.lab
            },
            artifacts: &artifacts,
            program: &program,
        };
        // With a filter it is one test that somebody wants to watch.
        let labs = match place {
            Place::Lab if *divisible && filter.is_empty() => labs(),
            _ => 1,
        };
        counted += if labs > 1 {
            let names = names(&program)?;
            println!("{name}: {} tests, in {labs} labs at a time", names.len());
            machine.side_by_side(labs, &names)
        } else {
            machine.run(filter, &mut place::print)
        };
    }
    if counted.tally == Tally::default() {
        return Err(RunnerError::NotRun("no guest test was selected"));
    }
    Ok(counted)
}

/// How many labs this machine runs at a time: an emulated CPU keeps one busy.
fn labs() -> usize {
    thread::available_parallelism().map_or(1, |cpus| cpus.get().min(MAX_LABS))
}

/// The names of a program's tests.
fn names(program: &Path) -> Result<Vec<String>, RunnerError> {
    let mut list = command(&program.to_string_lossy(), &["--list", "--format", "terse"]);
    let mut names = Vec::new();
    let listed = stream(&mut list, |line| {
        let line = String::from_utf8_lossy(line);
        if let Some(name) = line.trim_end().strip_suffix(": test") {
            names.push(name.to_owned());
        }
    })?;
    if listed.success() {
        Ok(names)
    } else {
        Err(RunnerError::Failed(format!("{} --list", program.display())))
    }
}

/// A test program and where it runs.
#[derive(Debug, Clone, Copy)]
struct Machine<'a> {
    place: Place,
    lab: LabSize,
    artifacts: &'a Artifacts,
    program: &'a Path,
}

impl Machine<'_> {
    /// Runs the tests that `arguments` select, one after the other.
    fn run(self, arguments: &[String], say: &mut dyn FnMut(Said<'_>)) -> Counted {
        let mut all = vec!["--test-threads=1".to_owned()];
        all.extend_from_slice(arguments);
        let run = Run {
            place: self.place,
            lab: self.lab,
            artifacts: self.artifacts,
            program: self.program,
            arguments: &all,
        };
        let mut reader = Reader::default();
        let mut retries = 0;
        let ended = run.follow(&mut |said| {
            match said {
                Said::Output(bytes) => reader.take(bytes),
                Said::Again(_) => {
                    reader = Reader::default();
                    retries += 1;
                }
                Said::Errors(_) | Said::Note(_) => {}
            }
            say(said);
        });
        // What was counted before a lab died counts, and its death is a failure.
        let counted = match ended {
            Ok(status) => reader.end(status == 0),
            Err(error) => {
                say(Said::Note(&chain(&error)));
                reader.end(false)
            }
        };
        Counted { retries, ..counted }
    }

    /// Runs the tests of these names in `labs` labs at a time.
    fn side_by_side(self, labs: usize, names: &[String]) -> Counted {
        let pieces = Mutex::new(pieces(names, labs * PIECES_PER_LAB));
        let next = || {
            let mut pieces = pieces.lock().unwrap_or_else(PoisonError::into_inner);
            pieces.pop_front()
        };
        let work = |number: usize| {
            let mut counted = Counted::default();
            let mut lines = Lines::new(format!("[lab {number}] "), pass);
            while let Some(piece) = next() {
                let mut arguments = vec!["--exact".to_owned()];
                arguments.extend_from_slice(&piece);
                let done = self.run(&arguments, &mut |said| lines.say(said));
                counted += expected(done, piece.len());
                lines.end();
            }
            counted
        };
        thread::scope(|scope| {
            let workers: Vec<_> = (1..=labs)
                .map(|number| scope.spawn(move || work(number)))
                .collect();
            let mut counted = Counted::default();
            for worker in workers {
                let done = worker.join();
                counted += done.unwrap_or_else(|_| Counted::failure("a thread died"));
            }
            counted
        })
    }
}

/// A piece's result; tests of it that said nothing at all are a failure.
fn expected(mut counted: Counted, tests: usize) -> Counted {
    let tally = counted.tally;
    let heard = tally.passed + tally.failed + tally.ignored;
    if tally.failed == 0 && heard != tests as u64 {
        counted += Counted::failure(format!("{heard} of {tests} tests were run"));
    }
    counted
}

/// Cuts a list into at most `count` pieces. Neighbours go to different ones, as
/// tests of one module take alike long.
fn pieces(names: &[String], count: usize) -> VecDeque<Vec<String>> {
    let mut pieces = vec![Vec::new(); count.min(names.len())];
    let count = pieces.len().max(1);
    for (index, name) in names.iter().enumerate() {
        pieces[index % count].push(name.clone());
    }
    pieces.into()
}

/// Passes whole lines on, each with a prefix, so that several sources can share
/// a terminal.
struct Lines<F> {
    prefix: String,
    output: Vec<u8>,
    errors: Vec<u8>,
    pass: F,
}

impl<F: FnMut(&[u8])> Lines<F> {
    fn new(prefix: String, pass: F) -> Self {
        Self {
            prefix,
            output: Vec::new(),
            errors: Vec::new(),
            pass,
        }
    }

    fn say(&mut self, said: Said<'_>) {
        match said {
            Said::Output(bytes) => self.output.extend_from_slice(bytes),
            Said::Errors(bytes) => self.errors.extend_from_slice(bytes),
            Said::Note(text) | Said::Again(text) => {
                self.end();
                self.output.extend_from_slice(text.as_bytes());
                self.output.push(b'\n');
            }
        }
        for kept in [&mut self.output, &mut self.errors] {
            let whole = kept.iter().rposition(|&byte| byte == b'\n');
            let lines: Vec<u8> = kept.drain(..whole.map_or(0, |end| end + 1)).collect();
            for line in lines.split_inclusive(|&byte| byte == b'\n') {
                if line != b"\n" {
                    (self.pass)(&[self.prefix.as_bytes(), line].concat());
                }
            }
        }
    }

    /// Passes on what has no newline yet.
    fn end(&mut self) {
        for kept in [&mut self.output, &mut self.errors] {
            if !kept.is_empty() {
                kept.push(b'\n');
                (self.pass)(&[self.prefix.as_bytes(), kept].concat());
                kept.clear();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_hold_every_test_once() {
        let names: Vec<String> = (0..11).map(|number| number.to_string()).collect();
        for count in [1, 4, 11, 20] {
            let pieces = pieces(&names, count);
            assert_eq!(pieces.len(), count.min(11));
            let mut all: Vec<_> = pieces.into_iter().flatten().collect();
            all.sort_by_key(|name| name.parse::<u32>().unwrap());
            assert_eq!(all, names);
        }
        assert!(pieces(&[], 4).is_empty());
    }

    #[test]
    fn tests_that_are_missing_are_a_failure() {
        let tally = Tally {
            passed: 2,
            failed: 0,
            ignored: 1,
        };
        assert_eq!(expected(tally.into(), 3).tally.failed, 0);
        assert_eq!(expected(tally.into(), 4).tally.failed, 1);
    }

    #[test]
    fn lines_come_whole_and_with_their_prefix() {
        let mut seen = Vec::new();
        let mut lines = Lines::new("1 ".into(), |line: &[u8]| seen.extend_from_slice(line));
        lines.say(Said::Output(b"test a ... "));
        lines.say(Said::Errors(b"warning\n"));
        lines.say(Said::Output(b"ok\n\ntest b"));
        lines.say(Said::Note("gone"));
        assert_eq!(
            String::from_utf8(seen).unwrap(),
            "1 warning\n1 test a ... ok\n1 test b\n1 gone\n"
        );
    }
}
