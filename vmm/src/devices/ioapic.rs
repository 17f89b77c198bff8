//! The I/O APIC (Intel 82093AA), which turns 24 interrupt inputs into messages
//! to the local APICs.
//!
//! The local APICs live in KVM (split irqchip), so this device does not deliver
//! interrupts itself: it tells KVM which message each input stands for, and KVM
//! sends the message when a device writes its irqfd. All devices here are
//! edge-triggered, so an input has no line to be asserted, and the end of an
//! interrupt changes nothing.

use std::fmt;
use std::sync::Arc;

use super::bus::MmioDevice;
use crate::arch::layout::{IOAPIC_PINS, LAPIC};
use crate::vstate::vm::{self, MsiMessage, MsiRoute, Vm};

const PINS: usize = IOAPIC_PINS as usize;

/// Offsets of the registers a guest reaches directly.
const REG_SELECT: u64 = 0x00;
const REG_WINDOW: u64 = 0x10;
/// Indices of the registers behind the window.
const IDX_ID: u8 = 0x00;
const IDX_VERSION: u8 = 0x01;
const IDX_ARBITRATION: u8 = 0x02;
const IDX_REDIRECTION: u8 = 0x10;
/// Version 0x20 has the EOI register; bits 16 to 23 hold the last input.
const VERSION: u32 = 0x20 | ((IOAPIC_PINS - 1) << 16);

/// Bits of a redirection entry.
const RTE_DEST_LOGICAL: u64 = 1 << 11;
const RTE_LEVEL: u64 = 1 << 15;
const RTE_MASKED: u64 = 1 << 16;
/// All but the two states of an interrupt under way, which has none here.
const RTE_WRITABLE: u64 = 0xff00_0000_0001_afff;

/// Bits of an interrupt message (Intel SDM volume 3, 11.11).
const MSI_DEST_LOGICAL: u32 = 1 << 2;
const MSI_ASSERT: u32 = 1 << 14;
const MSI_LEVEL: u32 = 1 << 15;

/// Where the I/O APIC sends its messages.
pub trait MessageSink: Send {
    /// Sets the message of each input that has one.
    ///
    /// # Errors
    ///
    /// KVM refuses.
    fn set_routes(&self, routes: &[MsiRoute]) -> Result<(), vm::Error>;
}

impl MessageSink for Arc<Vm> {
    fn set_routes(&self, routes: &[MsiRoute]) -> Result<(), vm::Error> {
        Vm::set_routes(self, routes)
    }
}

/// The message a redirection entry stands for.
fn message(entry: u64) -> MsiMessage {
    // Each field is masked to at most its width in the message.
    #[allow(clippy::cast_possible_truncation)]
    let (destination, vector_and_mode) = ((entry >> 56) as u32, (entry & 0x7ff) as u32);
    let mut address = LAPIC_BASE | (destination << 12);
    let mut data = vector_and_mode;
    if entry & RTE_DEST_LOGICAL != 0 {
        address |= MSI_DEST_LOGICAL;
    }
    if entry & RTE_LEVEL != 0 {
        data |= MSI_LEVEL | MSI_ASSERT;
    }
    MsiMessage { address, data }
}

#[allow(clippy::cast_possible_truncation)] // 0xfee0_0000
const LAPIC_BASE: u32 = LAPIC as u32;

/// The device.
pub struct IoApic {
    sink: Box<dyn MessageSink>,
    select: u8,
    id: u32,
    entries: [u64; PINS],
    routes: Vec<MsiRoute>,
}

impl fmt::Debug for IoApic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoApic")
            .field("entries", &self.entries)
            .finish_non_exhaustive()
    }
}

impl IoApic {
    /// An I/O APIC after reset: all inputs masked.
    pub fn new(sink: Box<dyn MessageSink>) -> Self {
        Self {
            sink,
            select: 0,
            id: 0,
            entries: [RTE_MASKED; PINS],
            routes: Vec::new(),
        }
    }

    /// Tells KVM about routes that changed.
    fn update_routes(&mut self) {
        let routes: Vec<_> = (0..IOAPIC_PINS)
            .zip(self.entries)
            .filter(|(_, entry)| entry & RTE_MASKED == 0)
            .map(|(gsi, entry)| MsiRoute {
                gsi,
                message: message(entry),
            })
            .collect();
        if routes == self.routes {
            return;
        }
        match self.sink.set_routes(&routes) {
            Ok(()) => self.routes = routes,
            Err(error) => log::error!("interrupts keep their old routes: {error}"),
        }
    }

    /// The input and half (0 low, 1 high) that a register index names.
    fn redirection(index: u8) -> Option<(usize, u32)> {
        let n = index.checked_sub(IDX_REDIRECTION)?;
        let pin = usize::from(n / 2);
        (pin < PINS).then_some((pin, u32::from(n % 2)))
    }

    fn read_window(&self) -> u32 {
        match self.select {
            IDX_ID | IDX_ARBITRATION => self.id,
            IDX_VERSION => VERSION,
            index => Self::redirection(index).map_or(u32::MAX, |(pin, half)| {
                #[allow(clippy::cast_possible_truncation)] // one half is meant
                let value = (self.entries[pin] >> (32 * half)) as u32;
                value
            }),
        }
    }

    fn write_window(&mut self, value: u32) {
        if self.select == IDX_ID {
            self.id = value & 0x0f00_0000;
            return;
        }
        let Some((pin, half)) = Self::redirection(self.select) else {
            return;
        };
        let old = self.entries[pin];
        let shift = 32 * half;
        let new = (old & !(0xffff_ffff << shift)) | (u64::from(value) << shift);
        self.entries[pin] = new & RTE_WRITABLE;
        self.update_routes();
    }
}

impl MmioDevice for IoApic {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            REG_SELECT => self.select.into(),
            REG_WINDOW => self.read_window(),
            _ => 0,
        };
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 4];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        match offset {
            REG_SELECT => self.select = bytes[0],
            REG_WINDOW => self.write_window(u32::from_le_bytes(bytes)),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Log {
        routes: Vec<Vec<MsiRoute>>,
    }

    impl MessageSink for Arc<Mutex<Log>> {
        fn set_routes(&self, routes: &[MsiRoute]) -> Result<(), vm::Error> {
            self.lock().unwrap().routes.push(routes.to_vec());
            Ok(())
        }
    }

    fn ioapic() -> (IoApic, Arc<Mutex<Log>>) {
        let log = Arc::new(Mutex::new(Log::default()));
        (IoApic::new(Box::new(log.clone())), log)
    }

    fn write(ioapic: &mut IoApic, index: u8, value: u32) {
        ioapic.write(REG_SELECT, &[index, 0, 0, 0]);
        ioapic.write(REG_WINDOW, &value.to_le_bytes());
    }

    fn read(ioapic: &mut IoApic, index: u8) -> u32 {
        let mut data = [0; 4];
        ioapic.write(REG_SELECT, &[index, 0, 0, 0]);
        ioapic.read(REG_WINDOW, &mut data);
        u32::from_le_bytes(data)
    }

    const LEVEL: u32 = 1 << 15;

    #[test]
    fn after_reset_all_inputs_are_masked() {
        let (mut ioapic, log) = ioapic();
        assert_eq!(read(&mut ioapic, IDX_VERSION), 0x17_0020);
        for index in (IDX_REDIRECTION..).step_by(2).take(PINS) {
            assert_eq!(read(&mut ioapic, index), 1 << 16);
        }
        assert!(log.lock().unwrap().routes.is_empty());
    }

    #[test]
    fn unmasked_edge_input_becomes_a_route() {
        let (mut ioapic, log) = ioapic();
        // Input 4, logical destination 3, vector 0x31.
        write(&mut ioapic, IDX_REDIRECTION + 9, 0x0300_0000);
        write(&mut ioapic, IDX_REDIRECTION + 8, 0x831);
        let route = MsiRoute {
            gsi: 4,
            message: MsiMessage {
                address: 0xfee0_3004,
                data: 0x31,
            },
        };
        assert_eq!(log.lock().unwrap().routes, [vec![route]]);
    }

    #[test]
    fn writes_that_change_no_route_do_not_reach_kvm() {
        let (mut ioapic, log) = ioapic();
        for value in [0x1_0031, 0x1_0032, 0x1_8033] {
            write(&mut ioapic, IDX_REDIRECTION, value);
        }
        write(&mut ioapic, IDX_REDIRECTION + 1, 0x0500_0000);
        assert!(log.lock().unwrap().routes.is_empty());
    }

    #[test]
    fn masking_removes_the_route() {
        let (mut ioapic, log) = ioapic();
        write(&mut ioapic, IDX_REDIRECTION, 0x31);
        write(&mut ioapic, IDX_REDIRECTION, 0x1_0031);
        let log = log.lock().unwrap();
        assert_eq!((log.routes.len(), log.routes[1].len()), (2, 0));
    }

    #[test]
    fn guest_cannot_write_remote_irr() {
        let (mut ioapic, _log) = ioapic();
        write(
            &mut ioapic,
            IDX_REDIRECTION,
            0x40 | LEVEL | (1 << 14) | (1 << 12),
        );
        assert_eq!(read(&mut ioapic, IDX_REDIRECTION), 0x40 | LEVEL);
    }

    #[test]
    fn odd_accesses_change_nothing() {
        let (mut ioapic, log) = ioapic();
        write(&mut ioapic, 0xff, 0x31);
        assert_eq!(read(&mut ioapic, 0xff), u32::MAX);
        ioapic.write(0x20, &[1, 2, 3, 4]);
        ioapic.write(REG_WINDOW, &[]);
        let mut wide = [0xaa; 8];
        ioapic.read(0x20, &mut wide);
        assert_eq!(wide, [0, 0, 0, 0, 0xaa, 0xaa, 0xaa, 0xaa]);
        assert!(log.lock().unwrap().routes.is_empty());
    }
}
