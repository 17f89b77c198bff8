//! Feeds the serial port from a file of the host, on the `devices` thread.
//!
//! A terminal is always read, so that the keys that end the run work even
//! while the guest does not listen; what the guest does not take beyond
//! [`BACKLOG`] bytes is dropped, as a real line would do. A pipe or a file is
//! read only as fast as the guest takes it, so nothing is lost.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::sync::{Arc, Mutex, PoisonError};

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::serial::SerialPort;
use crate::exit::{Exit, GuestExit, StoppedBy};

/// Bytes that are read at once.
const CHUNK: usize = 64;
/// Most bytes typed ahead of the guest.
const BACKLOG: usize = 4096;

/// Ctrl-A.
const PREFIX: u8 = 1;

/// What a typed byte means.
#[derive(Debug, PartialEq, Eq)]
enum Key {
    /// These bytes go to the guest.
    Send(&'static [u8], Option<u8>),
    /// Nothing yet.
    Wait,
    /// End the run.
    Quit,
}

/// Recognises the keys that are meant for the VMM: Ctrl-A x ends the run,
/// Ctrl-A Ctrl-A sends one Ctrl-A, and Ctrl-A with any other key sends both.
#[derive(Debug, Default)]
struct Keys {
    after_prefix: bool,
}

impl Keys {
    fn key(&mut self, byte: u8) -> Key {
        match (std::mem::take(&mut self.after_prefix), byte) {
            (false, PREFIX) => {
                self.after_prefix = true;
                Key::Wait
            }
            (false, _) => Key::Send(&[], Some(byte)),
            (true, b'x' | b'X') => Key::Quit,
            (true, PREFIX) => Key::Send(&[PREFIX], None),
            (true, _) => Key::Send(&[PREFIX], Some(byte)),
        }
    }
}

/// How the source is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The event loop watches it.
    Watched,
    /// The event loop cannot watch it (a regular file): it is always ready.
    Ready,
    /// Not watched until the guest has taken what was read.
    Paused,
    /// At its end.
    Ended,
}

/// The subscriber.
#[derive(Debug)]
pub struct SerialInput {
    port: Arc<Mutex<SerialPort>>,
    wake: EventFd,
    source: File,
    state: State,
    /// Only for a terminal.
    keys: Option<Keys>,
    backlog: VecDeque<u8>,
    exit: Exit,
}

impl SerialInput {
    /// Feeds `port` from `source`. `wake` is the event that the port signals
    /// when it can take more; `is_terminal` turns the VMM's keys on.
    pub fn new(
        port: Arc<Mutex<SerialPort>>,
        wake: EventFd,
        source: File,
        is_terminal: bool,
        exit: Exit,
    ) -> Self {
        Self {
            port,
            wake,
            source,
            state: State::Paused,
            keys: is_terminal.then(Keys::default),
            backlog: VecDeque::new(),
            exit,
        }
    }

    /// Reads once; returns whether there may be more.
    fn read(&mut self) -> bool {
        let mut chunk = [0; CHUNK];
        match self.source.read(&mut chunk) {
            Ok(0) => {
                self.state = State::Ended;
                false
            }
            Ok(n) => {
                self.take(&chunk[..n]);
                true
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => true,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => false,
            Err(e) => {
                // A terminal that hung up reads as an error.
                log::debug!("console input ends: {e}");
                self.state = State::Ended;
                false
            }
        }
    }

    fn take(&mut self, bytes: &[u8]) {
        let Some(keys) = &mut self.keys else {
            self.backlog.extend(bytes);
            return;
        };
        for byte in bytes {
            match keys.key(*byte) {
                Key::Wait => {}
                Key::Quit => self.exit.report(GuestExit::Stopped(StoppedBy::Console)),
                Key::Send(..) if self.backlog.len() >= BACKLOG => {}
                Key::Send(first, second) => {
                    self.backlog.extend(first);
                    self.backlog.extend(second);
                }
            }
        }
    }

    /// Gives the guest what it takes.
    fn feed(&mut self) {
        let mut port = self.port.lock().unwrap_or_else(PoisonError::into_inner);
        while !self.backlog.is_empty() {
            let taken = port.receive(self.backlog.make_contiguous());
            if taken == 0 {
                break;
            }
            self.backlog.drain(..taken);
        }
    }

    fn watch(&mut self, ops: &mut EventOps) {
        match ops.add(Events::new(&self.source, EventSet::IN)) {
            Ok(()) => self.state = State::Watched,
            // EPERM: a regular file or /dev/null, which never blocks.
            Err(event_manager::Error::Epoll(e)) if e.errno() == libc::EPERM => {
                self.state = State::Ready;
            }
            Err(error) => {
                log::warn!("no console input: {error}");
                self.state = State::Ended;
            }
        }
    }

    fn unwatch(&mut self, ops: &mut EventOps, next: State) {
        if let Err(error) = ops.remove(Events::new(&self.source, EventSet::IN)) {
            log::warn!("console input: {error}");
        }
        self.state = next;
    }

    /// Moves bytes until the guest or the source has to be waited for.
    fn pump(&mut self, ops: &mut EventOps) {
        self.feed();
        while self.state == State::Ready && self.backlog.is_empty() && self.read() {
            self.feed();
        }
        if self.state == State::Paused && self.backlog.is_empty() {
            self.watch(ops);
            if self.state == State::Ready {
                self.pump(ops);
            }
        }
    }
}

impl MutEventSubscriber for SerialInput {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        use std::os::fd::AsRawFd;
        if events.fd() == self.wake.as_raw_fd() {
            // An empty counter only means that somebody else has read it.
            let _ = self.wake.read();
        } else if self.state == State::Watched {
            self.read();
            self.feed();
            if self.state == State::Ended {
                self.unwatch(ops, State::Ended);
            } else if self.keys.is_none() && !self.backlog.is_empty() {
                self.unwatch(ops, State::Paused);
            }
            return;
        }
        self.pump(ops);
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.wake, EventSet::IN)) {
            log::error!("no console input: {error}");
            return;
        }
        self.pump(ops);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::bus::PioDevice;
    use crate::devices::serial::SerialDevice;
    use crate::devices::{EventLoop, Subscriber};
    use event_manager::SubscriberOps;
    use std::io::{Seek, Write};
    use std::os::fd::OwnedFd;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    struct Setup {
        event_loop: EventLoop,
        device: SerialDevice,
        exit: Exit,
    }

    fn setup(source: File, terminal: bool) -> Setup {
        setup_with_output(source, terminal, Box::new(io::sink()))
    }

    fn setup_with_output(source: File, terminal: bool, out: Box<dyn Write + Send>) -> Setup {
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let wake = event();
        let port = SerialPort::new(event(), wake.try_clone().unwrap());
        let port = Arc::new(Mutex::new(port));
        let device = SerialDevice::new(port.clone(), out);
        let exit = Exit::new().unwrap();
        let input = SerialInput::new(port, wake, source, terminal, exit.clone());
        let mut event_loop = EventLoop::new().unwrap();
        let subscriber: Subscriber = Arc::new(Mutex::new(input));
        event_loop.add_subscriber(subscriber);
        Setup {
            event_loop,
            device,
            exit,
        }
    }

    impl Setup {
        fn open_port(&mut self) {
            self.device.write(4, &[8]);
            self.device.write(1, &[1]);
        }

        /// Lets the guest read until `want` bytes have come.
        fn guest_reads(&mut self, want: usize) -> Vec<u8> {
            let mut all = Vec::new();
            for _ in 0..1000 {
                self.event_loop.run_with_timeout(0).unwrap();
                let port = &mut self.device;
                let mut status = [0];
                loop {
                    port.read(5, &mut status);
                    if status[0] & 1 == 0 {
                        break;
                    }
                    let mut byte = [0];
                    port.read(0, &mut byte);
                    all.push(byte[0]);
                }
                if all.len() >= want {
                    break;
                }
            }
            all
        }
    }

    fn pipe() -> (File, File) {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let file = |fd: OwnedFd| File::from(fd);
        (file(reader), file(writer))
    }

    #[test]
    fn regular_file_arrives_whole() {
        let mut file = tempfile::tempfile().unwrap();
        let text: Vec<u8> = (0..1000_u32).map(|i| i.to_le_bytes()[0]).collect();
        file.write_all(&text).unwrap();
        file.rewind().unwrap();
        let mut setup = setup(file, false);
        setup.open_port();
        assert_eq!(setup.guest_reads(1000), text);
    }

    #[test]
    fn pipe_arrives_whole_even_if_written_before_the_guest_listens() {
        let (reader, mut writer) = pipe();
        let text: Vec<u8> = (0..5000_u32).map(|i| i.to_le_bytes()[0]).collect();
        writer.write_all(&text).unwrap();
        drop(writer);
        let mut setup = setup(reader, false);
        for _ in 0..10 {
            setup.event_loop.run_with_timeout(0).unwrap();
        }
        setup.open_port();
        assert_eq!(setup.guest_reads(5000), text);
    }

    #[test]
    fn end_of_input_leaves_the_loop_idle() {
        let (reader, writer) = pipe();
        drop(writer);
        let mut setup = setup(reader, false);
        setup.open_port();
        for _ in 0..5 {
            setup.event_loop.run_with_timeout(0).unwrap();
        }
        assert_eq!(setup.event_loop.run_with_timeout(20).unwrap(), 0);
        assert_eq!(setup.exit.reported(), None);
    }

    #[test]
    fn dev_null_is_harmless() {
        let mut setup = setup(File::open("/dev/null").unwrap(), false);
        setup.open_port();
        assert!(setup.guest_reads(1).is_empty());
    }

    #[test]
    fn quit_keys_work_while_the_guest_does_not_listen() {
        let (reader, mut writer) = pipe();
        let mut setup = setup(reader, true);
        writer.write_all(&[b'a'; 3 * BACKLOG]).unwrap();
        writer.write_all(b"\x01x").unwrap();
        for _ in 0..1000 {
            setup.event_loop.run_with_timeout(0).unwrap();
        }
        assert_eq!(
            setup.exit.reported(),
            Some(GuestExit::Stopped(StoppedBy::Console))
        );
    }

    #[test]
    fn quit_keys_work_while_a_vcpu_waits_for_the_reader_of_its_output() {
        let (reader, mut keys) = pipe();
        let (stuck, out) = pipe();
        let setup = setup_with_output(reader, true, Box::new(out));
        let (mut device, mut event_loop) = (setup.device, setup.event_loop);
        let printed = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let counter = Arc::clone(&printed);
        let vcpu = std::thread::spawn(move || {
            // More than a pipe holds.
            for _ in 0..1 << 17 {
                device.write(0, b"x");
                counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
        });
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        let waits = |what: &dyn Fn() -> bool| {
            while !what() {
                assert!(std::time::Instant::now() < deadline);
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        };
        waits(&|| rustix::io::ioctl_fionread(&stuck).unwrap() >= 1 << 16);
        // It goes into the next write, or is on its way there.
        waits(&|| printed.load(std::sync::atomic::Ordering::Relaxed) >= 1 << 16);
        std::thread::spawn(move || while event_loop.run().is_ok() {});
        keys.write_all(b"a\x01x").unwrap();
        waits(&|| setup.exit.reported().is_some());
        // The pipe breaks, and the vCPU goes on.
        drop(stuck);
        vcpu.join().unwrap();
    }

    #[test]
    fn quit_keys_in_a_pipe_are_data() {
        let (reader, mut writer) = pipe();
        writer.write_all(b"\x01x").unwrap();
        let mut setup = setup(reader, false);
        setup.open_port();
        assert_eq!(setup.guest_reads(2), b"\x01x");
        assert_eq!(setup.exit.reported(), None);
    }

    #[test]
    fn prefix_and_other_keys_are_passed_on() {
        let mut keys = Keys::default();
        assert_eq!(keys.key(b'a'), Key::Send(&[], Some(b'a')));
        assert_eq!(keys.key(PREFIX), Key::Wait);
        assert_eq!(keys.key(PREFIX), Key::Send(&[PREFIX], None));
        assert_eq!(keys.key(PREFIX), Key::Wait);
        assert_eq!(keys.key(b'b'), Key::Send(&[PREFIX], Some(b'b')));
        assert_eq!(keys.key(b'x'), Key::Send(&[], Some(b'x')));
        assert_eq!(keys.key(PREFIX), Key::Wait);
        assert_eq!(keys.key(b'X'), Key::Quit);
    }
}
