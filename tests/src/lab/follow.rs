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

/// Code that the lab's kernel patches while another CPU runs it: always the
/// emulator's fault.
const PATCHED_CODE: &str = "Oops: int3";
/// How else its kernel dies of the emulator, see `docs/testing.md`; but in KVM
/// also of a mistake in KVM that our guests have found.
const KERNEL_FAULTS: [&str; 4] = [
    "Oops: ",
    "stack guard page was hit",
    "corrupted stack end detected",
    "PANIC: double fault",
];
/// In names of functions: of KVM, its modules, and of what it is told by.
const OF_KVM: [&str; 5] = ["kvm", "svm_", "tdp_", "mmu_notifier", "[irqbypass"];
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
            emulator: is_of_emulator(&text),
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

/// Whether a console shows a fault that only the emulator can cause: one outside
/// of KVM, which nothing in the lab provokes.
fn is_of_emulator(console: &str) -> bool {
    if console.contains(PATCHED_CODE) {
        return true;
    }
    let fault = KERNEL_FAULTS
        .iter()
        .filter_map(|fault| console.find(fault))
        .min();
    // The line itself is not a part of the stack.
    fault.is_some_and(|at| !console[at..].lines().skip(1).any(is_frame_of_kvm))
}

/// Whether a line names a function of KVM, as the instruction that failed or as
/// one of its callers: `kvm_vcpu_ioctl+0x1b/0x2a [kvm]`. Those with a question
/// mark are remains of earlier calls.
fn is_frame_of_kvm(line: &str) -> bool {
    let mut words = line.split_whitespace().peekable();
    while let Some(word) = words.next() {
        let is_function = word
            .split_once("+0x")
            .is_some_and(|(_, place)| place.contains("/0x"));
        if !is_function {
            if word == "?" {
                return false;
            }
            continue;
        }
        let module = words.peek().copied().unwrap_or_default();
        return OF_KVM
            .iter()
            .any(|part| word.contains(part) || module.contains(part));
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(head: &str, rip: &str, frames: &[&str]) -> String {
        let mut text = format!(
            "[    3.1] kvm_amd: TSC scaling supported\n\
             [   41.2] BUG: unable to handle page fault for address: ffffc90000f2fe58\n\
             [   41.2] {head}\n\
             [   41.2] CPU: 0 PID: 93 Comm: vcpu0 Not tainted 6.12.90-cloud-amd64 #1\n\
             [   41.2] RIP: 0010:{rip}\n\
             [   41.2] Call Trace:\n[   41.2]  <TASK>\n"
        );
        for frame in frames {
            text += &format!("[   41.2]  {frame}\n");
        }
        text + "[   41.2] Modules linked in: kvm_amd kvm irqbypass\n\
                [   41.2] Kernel panic - not syncing: Fatal exception\n"
    }

    #[test]
    fn fault_outside_of_kvm_is_the_emulators() {
        let head = "Oops: 0002 [#1] PREEMPT SMP NOPTI";
        let frames = [
            "? kvm_vcpu_ioctl+0x1b0/0x7a0 [kvm]",
            "schedule+0x27/0xd0",
            "do_syscall_64+0x82/0x190",
        ];
        let text = trace(head, "__schedule+0x3b6/0x14b0", &frames);
        assert!(is_of_emulator(&text), "{text}");
        assert!(is_of_emulator("x\nPANIC: double fault, error_code: 0x0\n"));
        assert!(!is_of_emulator(
            "Kernel panic - not syncing: sysrq triggered crash\n"
        ));
    }

    #[test]
    fn fault_in_kvm_or_below_it_is_not_the_emulators() {
        let head = "Oops: 0000 [#1] PREEMPT SMP NOPTI";
        let plain = "memset+0xb/0x20";
        for (rip, frame) in [
            ("tdp_mmu_zap_leafs+0x8a/0x1f0 [kvm]", plain),
            (plain, "kvm_mmu_unmap_gfn_range+0x44/0x90 [kvm]"),
            (plain, "svm_vcpu_run+0x2a1/0x8d0 [kvm_amd]"),
            (plain, "__mmu_notifier_invalidate_range_start+0x71/0x1c0"),
            (plain, "handle_exit+0x11/0x20 [kvm_amd]"),
        ] {
            let text = trace(head, rip, &["zap_pte_range+0x1/0x2", frame]);
            assert!(!is_of_emulator(&text), "{text}");
            let text = trace("stack guard page was hit at 0x1", rip, &[frame]);
            assert!(!is_of_emulator(&text), "{text}");
        }
    }

    #[test]
    fn breakpoint_of_patched_code_is_the_emulators_wherever_it_is() {
        let rip = "kvm_arch_vcpu_ioctl_run+0x3b6/0x14b0 [kvm]";
        assert!(is_of_emulator(&trace(
            "Oops: int3: 0000 [#1] SMP",
            rip,
            &[]
        )));
    }
}
