//! The serial port COM1 (16550A), which is the guest's console.

use std::fmt;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::bus::PioDevice;

/// Registers and bits that show when the guest's driver listens.
const IER: u8 = 1;
const LCR: u8 = 3;
const MCR: u8 = 4;
const IER_RECEIVE: u8 = 1 << 0;
const LCR_DLAB: u8 = 1 << 7;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOP: u8 = 1 << 4;

/// The port's interrupt.
#[derive(Debug)]
struct Irq(EventFd);

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Wakes whoever feeds the port when it can take input.
#[derive(Debug)]
struct Wake(EventFd);

impl Wake {
    fn wake(&self) {
        if let Err(error) = self.0.write(1) {
            log::error!("console input stalls: {error}");
        }
    }
}

impl SerialEvents for Wake {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.wake();
    }
}

/// The registers.
///
/// Input is taken only once the guest has opened the port. Earlier bytes
/// would be lost: Linux empties the FIFO when it opens a port.
pub struct SerialPort {
    /// What it writes is collected and fetched after each access.
    uart: Serial<Irq, Wake, Vec<u8>>,
    /// Last values of MCR and LCR that the guest wrote.
    mcr: u8,
    lcr: u8,
    open: bool,
}

impl fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SerialPort")
            .field("open", &self.open)
            .finish_non_exhaustive()
    }
}

impl SerialPort {
    /// A port that raises `irq` and signals `wake` when it can take more
    /// input.
    pub fn new(irq: EventFd, wake: EventFd) -> Self {
        Self {
            uart: Serial::with_events(Irq(irq), Wake(wake), Vec::new()),
            mcr: 0,
            lcr: 0,
            open: false,
        }
    }

    /// Gives the guest the first bytes of `input`; returns how many it took.
    pub fn receive(&mut self, input: &[u8]) -> usize {
        if !self.open || self.uart.fifo_capacity() == 0 {
            return 0;
        }
        match self.uart.enqueue_raw_bytes(input) {
            Ok(taken) => taken,
            Err(error) => {
                log::error!("console input is lost: {error:?}");
                input.len()
            }
        }
    }

    /// Stores in a register; returns what the guest prints by it.
    fn write(&mut self, register: u8, value: u8) -> Vec<u8> {
        if let Err(error) = self.uart.write(register, value) {
            log::error!("the serial port raises no interrupt: {error:?}");
        }
        self.observe(register, value);
        std::mem::take(self.uart.writer_mut())
    }

    /// Notes the moment at which the guest's driver starts to listen.
    fn observe(&mut self, register: u8, value: u8) {
        match register {
            LCR => self.lcr = value,
            MCR => self.mcr = value,
            IER if self.lcr & LCR_DLAB == 0 => {
                let listens = value & IER_RECEIVE != 0
                    && self.mcr & MCR_OUT2 != 0
                    && self.mcr & MCR_LOOP == 0;
                if listens && !self.open {
                    self.open = true;
                    self.uart.events().wake();
                }
            }
            _ => {}
        }
    }
}

/// The device: the registers, and where the guest's output goes.
///
/// The registers have a lock of their own, which is never held while output is
/// written. A reader that does not read (`vmm ... | less`) thus stops the vCPUs
/// that print, but not whoever feeds the port.
pub struct SerialDevice {
    port: Arc<Mutex<SerialPort>>,
    out: Box<dyn Write + Send>,
    /// Said so already.
    lost_output: bool,
}

impl fmt::Debug for SerialDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SerialDevice")
            .field("port", &self.port)
            .finish_non_exhaustive()
    }
}

impl SerialDevice {
    /// Makes `port` a device that writes the guest's output to `out`.
    pub fn new(port: Arc<Mutex<SerialPort>>, out: Box<dyn Write + Send>) -> Self {
        Self {
            port,
            out,
            lost_output: false,
        }
    }

    fn port(&self) -> std::sync::MutexGuard<'_, SerialPort> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PioDevice for SerialDevice {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        if let ([byte], Ok(register)) = (data, u8::try_from(offset)) {
            *byte = self.port().uart.read(register);
        }
    }

    fn write(&mut self, offset: u16, data: &[u8]) {
        if let ([byte], Ok(register)) = (data, u8::try_from(offset)) {
            let output = self.port().write(register, *byte);
            // A reader of our output that is gone must not stop the guest.
            if let Err(error) = self.out.write_all(&output)
                && !std::mem::replace(&mut self.lost_output, true)
            {
                log::debug!("console output is lost: {error}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(data);
            Ok(data.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl SerialDevice {
        fn receive(&self, input: &[u8]) -> usize {
            self.port().receive(input)
        }
    }

    fn port() -> (SerialDevice, Sink, EventFd, EventFd) {
        let (irq, wake) = (
            EventFd::new(EFD_NONBLOCK).unwrap(),
            EventFd::new(EFD_NONBLOCK).unwrap(),
        );
        let sink = Sink::default();
        let port = SerialPort::new(irq.try_clone().unwrap(), wake.try_clone().unwrap());
        let port = SerialDevice::new(Arc::new(Mutex::new(port)), Box::new(sink.clone()));
        (port, sink, irq, wake)
    }

    fn open(port: &mut SerialDevice) {
        port.write(u16::from(MCR), &[MCR_OUT2]);
        port.write(u16::from(IER), &[IER_RECEIVE]);
    }

    #[test]
    fn output_reaches_the_writer() {
        let (mut port, sink, ..) = port();
        for byte in b"ok" {
            port.write(0, &[*byte]);
        }
        assert_eq!(*sink.0.lock().unwrap(), b"ok");
    }

    #[test]
    fn output_to_a_broken_writer_does_not_matter() {
        struct Broken;
        impl Write for Broken {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let port = Arc::new(Mutex::new(SerialPort::new(event(), event())));
        let mut port = SerialDevice::new(port, Box::new(Broken));
        port.write(0, b"x");
    }

    #[test]
    fn input_waits_until_the_guest_opens_the_port() {
        let (mut port, _, irq, wake) = port();
        assert_eq!(port.receive(b"ls\n"), 0);
        // The driver's probe of the interrupt register does not count.
        port.write(u16::from(IER), &[0xf]);
        assert_eq!(port.receive(b"ls\n"), 0);
        open(&mut port);
        assert!(wake.read().is_ok());
        assert_eq!(port.receive(b"ls\n"), 3);
        assert!(irq.read().is_ok());
        let mut byte = [0];
        port.read(0, &mut byte);
        assert_eq!(byte, *b"l");
    }

    #[test]
    fn full_port_takes_the_rest_later() {
        let (mut port, _, _, wake) = port();
        open(&mut port);
        wake.read().unwrap();
        let taken = port.receive(&[b'a'; 200]);
        assert!((1..200).contains(&taken));
        assert_eq!(port.receive(b"b"), 0);
        for _ in 0..taken {
            port.read(0, &mut [0]);
        }
        assert!(wake.read().is_ok(), "asks for more once empty");
        assert_eq!(port.receive(b"b"), 1);
    }

    #[test]
    fn accesses_of_odd_width_are_ignored() {
        let (mut port, sink, ..) = port();
        port.write(0, b"ab");
        port.write(0, b"");
        let mut data = [0xff; 4];
        port.read(0, &mut data);
        assert_eq!(data, [0xff; 4]);
        assert!(sink.0.lock().unwrap().is_empty());
    }
}
