//! Follows one start of the machine to its end.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::Instant;

use super::outputs::Outputs;
use super::wire::Frame;
use super::{BOOT_PATIENCE, Ended, Event, Lab, LabError};

/// How the lab's own kernel dies of the emulator: a fault of its own, which no
/// process in it and no guest can cause. The first is code that it patches while
/// another CPU runs it; `docs/testing.md` has what is known of the others.
const EMULATOR_FAULTS: [&str; 4] = [
    "Oops: ",
    "stack guard page was hit",
    "corrupted stack end detected",
    "PANIC: double fault",
];
/// Console bytes kept for messages.
const CONSOLE_KEPT: usize = 64 * 1024;

/// What the reading threads pass on.
pub enum Input {
    /// A message of the init.
    Frame(Frame),
    /// Console bytes, and what the emulator says.
    Console(Vec<u8>),
    /// A frame that makes no sense.
    Garbled(io::Error),
}

/// Reads the port.
pub fn spawn_frames(mut port: impl Read + Send + 'static, send: Sender<Input>) {
    thread::spawn(move || {
        loop {
            let input = match Frame::read(&mut port) {
                Ok(Some(frame)) => Input::Frame(frame),
                Ok(None) => break,
                // The emulator died in the middle of a frame.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => break,
                Err(error) => Input::Garbled(error),
            };
            let last = matches!(input, Input::Garbled(_));
            if send.send(input).is_err() || last {
                break;
            }
        }
    });
}

/// Reads the console, or the emulator's messages.
pub fn spawn_console(mut from: impl Read + Send + 'static, send: Sender<Input>) {
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(len) = from.read(&mut buffer) {
            if len == 0 || send.send(Input::Console(buffer[..len].to_vec())).is_err() {
                break;
            }
        }
    });
}

/// Copies our standard input to the port.
pub fn pass_stdin(port: &UnixStream) {
    let mut stdin = io::stdin().lock();
    let mut buffer = [0; 4096];
    loop {
        // An error ends the input as its end does.
        let len = stdin.read(&mut buffer).unwrap_or(0);
        if Frame::Stdin(buffer[..len].to_vec()).write(port).is_err() || len == 0 {
            break;
        }
    }
}

/// One start of the machine, being followed.
pub struct Run<'a> {
    lab: &'a Lab,
    start: Instant,
    /// When something was last heard of the machine, once it is up.
    heard: Option<Instant>,
    console: VecDeque<u8>,
    outputs: Outputs<'a>,
    sink: &'a mut dyn FnMut(Event<'_>),
}

impl<'a> Run<'a> {
    /// A machine that was started at `start`.
    pub fn new(lab: &'a Lab, start: Instant, sink: &'a mut dyn FnMut(Event<'_>)) -> Self {
        Self {
            lab,
            start,
            heard: None,
            console: VecDeque::new(),
            outputs: Outputs::new(&lab.outputs),
            sink,
        }
    }

    /// Reads to the end of the command, of the time or of the machine.
    pub fn follow(
        &mut self,
        receive: &Receiver<Input>,
        deadline: Option<Instant>,
    ) -> Result<Ended, LabError> {
        loop {
            // A machine that is up gives signs of life, see `Frame::Alive`.
            let silent = match self.heard {
                Some(heard) => heard + self.lab.silence,
                None => self.start + BOOT_PATIENCE,
            };
            let until = deadline.map_or(silent, |deadline| deadline.min(silent));
            match receive.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(Input::Console(data)) => self.console(&data),
                Ok(Input::Garbled(error)) => return Err(LabError::Broken(error.to_string())),
                Ok(Input::Frame(frame)) => {
                    if let Some(ended) = self.frame(frame)? {
                        return Ok(ended);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return Err(self.died()),
                Err(RecvTimeoutError::Timeout) => {
                    let over = deadline.is_some_and(|deadline| Instant::now() >= deadline);
                    return Err(match (self.lab.timeout, self.heard) {
                        (Some(timeout), _) if over => LabError::TimedOut(timeout),
                        (_, Some(_)) => LabError::Hung {
                            silence: self.lab.silence,
                            console: self.console_end(),
                        },
                        (_, None) => LabError::NoBoot(self.console_end()),
                    });
                }
            }
            if let Some(heard) = &mut self.heard {
                *heard = Instant::now();
            }
        }
    }

    fn frame(&mut self, frame: Frame) -> Result<Option<Ended>, LabError> {
        match frame {
            Frame::Hello(hello) => {
                self.heard = Some(Instant::now());
                if !(hello.npt && hello.tdp_mmu) {
                    return Err(LabError::NoNestedPaging {
                        npt: hello.npt,
                        tdp_mmu: hello.tdp_mmu,
                    });
                }
                (self.sink)(Event::Started(&hello, self.start.elapsed()));
            }
            Frame::Stdout(data) => (self.sink)(Event::Stdout(&data)),
            Frame::Stderr(data) => (self.sink)(Event::Stderr(&data)),
            Frame::Entry(entry) => self.outputs.entry(&entry)?,
            Frame::Data(data) => self.outputs.data(&data)?,
            Frame::OutputFailed(message) => self.outputs.failed(message),
            Frame::NotStarted(errno, message) => {
                let command = self.lab.argv[0].clone();
                return Err(LabError::NotStarted {
                    command,
                    errno,
                    message,
                });
            }
            Frame::Broken(message) => return Err(LabError::Broken(message)),
            Frame::Ended(ended) => {
                self.outputs.finish()?;
                return Ok(Some(ended));
            }
            Frame::Alive => {}
            Frame::Stdin(_) => return Err(LabError::Broken("standard input came back".into())),
        }
        Ok(None)
    }

    fn console(&mut self, data: &[u8]) {
        self.console.extend(data);
        let excess = self.console.len().saturating_sub(CONSOLE_KEPT);
        self.console.drain(..excess);
        (self.sink)(Event::Console(data));
    }

    fn died(&mut self) -> LabError {
        let text = String::from_utf8_lossy(self.console.make_contiguous()).into_owned();
        LabError::Died {
            emulator: EMULATOR_FAULTS.iter().any(|fault| text.contains(fault)),
            console: self.console_end(),
        }
    }

    /// What the console says about the end: from the first complaint of the
    /// kernel on, else its last lines.
    fn console_end(&mut self) -> String {
        const LINES: usize = 30;
        let text = String::from_utf8_lossy(self.console.make_contiguous()).into_owned();
        let lines: Vec<&str> = text
            .lines()
            .filter(|line| !line.contains("warning: TCG doesn't support"))
            .collect();
        let complaint = lines.iter().position(|line| {
            ["BUG:", "Oops", "Kernel panic", "sysrq:"]
                .iter()
                .any(|word| line.contains(word))
        });
        let from = complaint.unwrap_or(lines.len().saturating_sub(LINES));
        let to = lines.len().min(from + LINES);
        lines[from..to].join("\n")
    }
}
