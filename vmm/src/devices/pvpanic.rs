//! The panic notifier (`QEMU0001`): one port to which a Linux kernel with
//! `CONFIG_PVPANIC` writes when it panics.

use super::bus::PioDevice;
use super::complaints::Complaints;
use crate::exit::{Exit, GuestExit};

/// The guest panicked.
const PANICKED: u8 = 1 << 0;
/// The guest panicked and a crash kernel will take over.
const CRASH_LOADED: u8 = 1 << 1;

/// The device.
#[derive(Debug)]
pub struct PvPanic {
    exit: Exit,
    complaints: Complaints,
}

impl PvPanic {
    /// A notifier that reports to `exit`.
    pub fn new(exit: Exit) -> Self {
        Self {
            exit,
            complaints: Complaints::default(),
        }
    }
}

impl PioDevice for PvPanic {
    /// Says which events are understood.
    fn read(&mut self, _offset: u16, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = PANICKED | CRASH_LOADED;
        }
    }

    fn write(&mut self, _offset: u16, data: &[u8]) {
        match data.first() {
            Some(events) if events & PANICKED != 0 => self.exit.report(GuestExit::Panicked),
            Some(events) if events & CRASH_LOADED != 0 => self
                .complaints
                .warn(format_args!("the guest panicked; its crash kernel goes on")),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panic_event_ends_the_run() {
        let exit = Exit::new().unwrap();
        let mut device = PvPanic::new(exit.clone());
        device.write(0, &[CRASH_LOADED]);
        device.write(0, &[0]);
        device.write(0, &[]);
        assert_eq!((exit.reported(), device.complaints.lines()), (None, 1));
        (0..100).for_each(|_| device.write(0, &[CRASH_LOADED]));
        assert_eq!(device.complaints.lines(), 16);
        device.write(0, &[PANICKED]);
        assert_eq!(exit.reported(), Some(GuestExit::Panicked));
    }

    #[test]
    fn read_offers_both_events() {
        let mut device = PvPanic::new(Exit::new().unwrap());
        let mut data = [0xff; 2];
        device.read(0, &mut data);
        assert_eq!(data, [3, 0]);
    }
}
