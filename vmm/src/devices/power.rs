//! The power block: the sleep and reset registers of hardware-reduced ACPI
//! (ACPI 6.5, 4.8.3.7 and 4.8.3.6), three ports.
//!
//! | port | register      | effect                                   |
//! |------|---------------|------------------------------------------|
//! | 0    | sleep control | sleep type 5 with the enable bit: off    |
//! | 1    | sleep status  | reads as zero                            |
//! | 2    | reset         | [`RESET_VALUE`]: the guest reboots       |

use super::bus::PioDevice;
use crate::exit::{Exit, GuestExit};

/// Port of the sleep control register.
pub const SLEEP_CONTROL: u16 = 0;
/// Port of the sleep status register.
pub const SLEEP_STATUS: u16 = 1;
/// Port of the reset register.
pub const RESET: u16 = 2;
/// What a guest writes to the reset register.
pub const RESET_VALUE: u8 = 1;
/// Sleep type of S5, "soft off", which the DSDT names in `_S5`.
pub const SLEEP_TYPE_OFF: u8 = 5;

const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 7;

/// The device.
#[derive(Debug)]
pub struct Power {
    exit: Exit,
}

impl Power {
    /// A power block that reports to `exit`.
    pub fn new(exit: Exit) -> Self {
        Self { exit }
    }
}

impl PioDevice for Power {
    fn read(&mut self, _offset: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u16, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        let sleep_type = (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK;
        match offset {
            SLEEP_CONTROL if value & SLEEP_ENABLE != 0 && sleep_type == SLEEP_TYPE_OFF => {
                self.exit.report(GuestExit::PoweredOff);
            }
            RESET if value == RESET_VALUE => self.exit.report(GuestExit::Rebooted),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after_write(offset: u16, data: &[u8]) -> Option<GuestExit> {
        let exit = Exit::new().unwrap();
        Power::new(exit.clone()).write(offset, data);
        exit.reported()
    }

    #[test]
    fn sleep_type_5_with_enable_powers_off() {
        let value = SLEEP_ENABLE | (SLEEP_TYPE_OFF << SLEEP_TYPE_SHIFT);
        assert_eq!(
            after_write(SLEEP_CONTROL, &[value]),
            Some(GuestExit::PoweredOff)
        );
    }

    #[test]
    fn reset_value_reboots() {
        assert_eq!(
            after_write(RESET, &[RESET_VALUE]),
            Some(GuestExit::Rebooted)
        );
    }

    #[test]
    fn other_writes_do_nothing() {
        let off = SLEEP_TYPE_OFF << SLEEP_TYPE_SHIFT;
        for (offset, data) in [
            (SLEEP_CONTROL, &[off][..]),
            (SLEEP_CONTROL, &[SLEEP_ENABLE]),
            (SLEEP_CONTROL, &[]),
            (SLEEP_STATUS, &[SLEEP_ENABLE | off]),
            (RESET, &[0]),
        ] {
            assert_eq!(after_write(offset, data), None);
        }
    }
}
