use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use vmm_sys_util::eventfd::EventFd;

use crate::devices::bus::MmioDevice;
use crate::devices::virtio::test_utils::*;
use crate::devices::virtio::{
    ActivateError, Activation, ShmRegion, VirtioDevice, read_config_bytes,
};

/// What the device under the transport has seen.
#[derive(Debug, Default)]
struct Seen {
    active: Option<Activation>,
    activations: u32,
    resets: u32,
    config: [u8; 8],
    refuse: bool,
}

#[derive(Debug)]
struct Probe(Arc<Mutex<Seen>>);

impl VirtioDevice for Probe {
    fn device_type(&self) -> u32 {
        63
    }
    fn avail_features(&self) -> u64 {
        0b101
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[16, 64]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.0.lock().unwrap().config, offset, data);
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if offset == 0 && data.len() <= 8 {
            self.0.lock().unwrap().config[..data.len()].copy_from_slice(data);
        }
    }
    fn shm_regions(&self) -> Vec<ShmRegion> {
        vec![ShmRegion {
            id: 3,
            gpa: 0x40_1234_0000,
            len: 0x2_0000_0000,
        }]
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut seen = self.0.lock().unwrap();
        if seen.refuse {
            return Err(ActivateError::Queues {
                expected: 1,
                found: 2,
            });
        }
        assert!(seen.active.is_none(), "activated twice");
        seen.active = Some(activation);
        seen.activations += 1;
        Ok(())
    }
    fn reset(&mut self) {
        let mut seen = self.0.lock().unwrap();
        assert!(seen.active.take().is_some(), "reset while inactive");
        seen.resets += 1;
    }
}

fn guest() -> (Guest, Arc<Mutex<Seen>>) {
    let seen = Arc::new(Mutex::new(Seen::default()));
    (Guest::new(|_| Probe(seen.clone())), seen)
}

#[test]
fn identity_and_features_are_readable() {
    let (mut guest, _) = guest();
    assert_eq!(guest.read(0x00), 0x7472_6976);
    assert_eq!(guest.read(0x04), 2);
    assert_eq!(guest.read(0x08), 63);
    guest.write(0x14, 0);
    assert_eq!(guest.read(0x10), 0x3000_0005);
    guest.write(0x14, 1);
    assert_eq!(guest.read(0x10), 1);
    guest.write(0x14, 2);
    assert_eq!(guest.read(0x10), 0);
}

#[test]
fn queue_sizes_are_readable_and_zero_for_no_queue() {
    let (mut guest, _) = guest();
    for (queue, size) in [(0, 16), (1, 64), (2, 0), (u32::MAX, 0)] {
        guest.write(0x30, queue);
        assert_eq!(guest.read(0x34), size);
    }
}

#[test]
fn driver_ok_activates_with_the_accepted_features_and_all_queues() {
    let (mut guest, seen) = guest();
    guest.boot(0b100 | 1 << 29);
    let seen = seen.lock().unwrap();
    let active = seen.active.as_ref().unwrap();
    assert_eq!(active.features, 0b100 | 1 << 29 | 1 << 32);
    assert_eq!(active.queues.len(), 2);
    assert_eq!(active.queues[1].size(), QSIZE);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let (mut guest, _) = guest();
    guest.negotiate(0b010);
    assert_eq!(guest.read(0x70), 3);
    guest.negotiate(1 << 33);
    assert_eq!(guest.read(0x70), 3);
    // Above bit 63.
    guest.write(0x70, 0);
    guest.write(0x70, 3);
    guest.write(0x24, 2);
    guest.write(0x20, 1);
    guest.write(0x24, 1);
    guest.write(0x20, 1);
    guest.write(0x70, 0xb);
    assert_eq!(guest.read(0x70), 3);
}

#[test]
fn legacy_driver_is_refused() {
    let (mut guest, _) = guest();
    guest.write(0x70, 1);
    guest.write(0x70, 3);
    guest.write(0x70, 0xb);
    assert_eq!(guest.read(0x70), 3);
}

#[test]
fn status_steps_out_of_order_are_refused() {
    let (mut guest, seen) = guest();
    guest.write(0x70, 2);
    assert_eq!(guest.read(0x70), 0);
    guest.write(0x70, 7);
    assert_eq!(guest.read(0x70), 3);
    guest.negotiate(0);
    guest.write(0x70, 1);
    assert_eq!(guest.read(0x70), 0xb, "bits go only by a reset");
    guest.write(0x70, 0xb | 0x40);
    assert_eq!(guest.read(0x70), 0xb, "NEEDS_RESET is the device's");
    assert_eq!(seen.lock().unwrap().activations, 0);
}

#[test]
fn features_are_fixed_after_features_ok() {
    let (mut guest, seen) = guest();
    guest.negotiate(1);
    guest.write(0x24, 0);
    guest.write(0x20, 5);
    guest.set_up_queue(0);
    guest.set_up_queue(1);
    guest.write(0x70, 0xf);
    let seen = seen.lock().unwrap();
    assert_eq!(seen.active.as_ref().unwrap().features, 1 | 1 << 32);
}

#[test]
fn driver_ok_without_a_queue_needs_reset() {
    let (mut guest, seen) = guest();
    guest.negotiate(0);
    guest.set_up_queue(0);
    guest.write(0x70, 0xf);
    assert_eq!(guest.read(0x70), 0x4f);
    assert_eq!(guest.read(0x60), 2);
    assert_eq!(guest.interrupts(), 1);
    assert_eq!(seen.lock().unwrap().activations, 0);
}

#[test]
fn refused_activation_needs_reset() {
    let (mut guest, seen) = guest();
    seen.lock().unwrap().refuse = true;
    guest.negotiate(0);
    guest.set_up_queue(0);
    guest.set_up_queue(1);
    guest.write(0x70, 0xf);
    assert!(guest.needs_reset());
    guest.write(0x70, 0);
    assert_eq!(seen.lock().unwrap().resets, 0);
    seen.lock().unwrap().refuse = false;
    guest.boot(0);
}

#[test]
fn bad_queue_does_not_become_ready() {
    // (size, descriptor table, available ring, used ring)
    for (size, desc, avail, used) in [
        (0, 0x1000, 0x2000, 0x3000),
        (3, 0x1000, 0x2000, 0x3000),
        (32, 0x1000, 0x2000, 0x3000),
        (0x1_0010, 0x1000, 0x2000, 0x3000),
        (16, 0x1008, 0x2000, 0x3000),
        (16, 0x1000, 0x2001, 0x3000),
        (16, 0x1000, 0x2000, 0x3002),
        (16, 0, 0x2000, 0x3000),
        (16, 0x1000, 0, 0x3000),
        (16, 0x1000, MEM - 4, 0x3000),
        (16, 0x1000, 0x2000, HIGH - 16),
        (16, MEM - 16, 0x2000, 0x3000),
        (16, u64::MAX - 15, 0x2000, 0x3000),
    ] {
        let (mut guest, _) = guest();
        guest.negotiate(0);
        guest.write(0x30, 0);
        guest.write(0x38, size);
        for (offset, addr) in [(0x80, desc), (0x90, avail), (0xa0, used)] {
            guest.write(offset, u32::try_from(addr & 0xffff_ffff).unwrap());
            guest.write(offset + 4, u32::try_from(addr >> 32).unwrap());
        }
        guest.write(0x44, 1);
        assert_eq!(guest.read(0x44), 0, "{size} {desc:#x} {avail:#x} {used:#x}");
        assert!(guest.needs_reset());
        guest.write(0x70, 0);
        assert_eq!(guest.read(0x70), 0);
    }
}

#[test]
fn queue_in_use_cannot_be_changed() {
    let (mut guest, seen) = guest();
    guest.boot(0);
    guest.write(0x30, 0);
    guest.write(0x38, 8);
    guest.write(0x80, 0);
    assert_eq!(guest.read(0x44), 1);
    assert!(!guest.needs_reset());
    guest.write(0x44, 0);
    assert!(guest.needs_reset());
    assert!(seen.lock().unwrap().active.is_some(), "until the reset");
}

#[test]
fn reset_stops_the_device_and_clears_everything() {
    let (mut guest, seen) = guest();
    guest.boot(0);
    {
        let seen = seen.lock().unwrap();
        let interrupt = &seen.active.as_ref().unwrap().interrupt;
        interrupt.signal_used();
        interrupt.fail();
    }
    guest.write(0x70, 0);
    assert_eq!(seen.lock().unwrap().resets, 1);
    assert_eq!(guest.read(0x70), 0);
    assert_eq!(guest.read(0x60), 0);
    guest.write(0x30, 1);
    assert_eq!(guest.read(0x44), 0);
    guest.boot(0);
    assert_eq!(seen.lock().unwrap().activations, 2);
}

#[test]
fn notifications_reach_the_queue_they_name() {
    let (mut guest, seen) = guest();
    guest.write(0x50, 0);
    guest.boot(0);
    for queue in [1, 2, u32::MAX] {
        guest.write(0x50, queue);
    }
    let fds = guest.transport.queue_notify_fds().unwrap();
    assert_eq!(fds.iter().map(|fd| fd.0).collect::<Vec<_>>(), [0, 1]);
    fds[1].1.write(1).unwrap();
    let seen = seen.lock().unwrap();
    let queues = &seen.active.as_ref().unwrap().queues;
    assert!(queues[0].notify_fd().read().is_err());
    assert_eq!(queues[1].notify_fd().read().unwrap(), 2);
}

#[test]
fn shared_memory_region_is_found_by_id() {
    let (mut guest, _) = guest();
    guest.write(0xac, 3);
    assert_eq!(guest.read(0xb0), 0);
    assert_eq!(guest.read(0xb4), 2);
    assert_eq!(guest.read(0xb8), 0x1234_0000);
    assert_eq!(guest.read(0xbc), 0x40);
    guest.write(0xac, 0);
    for offset in [0xb0, 0xb4, 0xb8, 0xbc] {
        assert_eq!(guest.read(offset), u32::MAX);
    }
}

#[test]
fn config_space_takes_accesses_of_any_size() {
    let (mut guest, seen) = guest();
    seen.lock().unwrap().config = [1, 2, 3, 4, 5, 6, 7, 8];
    let mut data = [0xff; 8];
    guest.transport.read(0x102, &mut data[..1]);
    guest.transport.read(0x104, &mut data[2..4]);
    assert_eq!(data, [3, 0xff, 5, 6, 0xff, 0xff, 0xff, 0xff]);
    guest.transport.read(0x106, &mut data);
    assert_eq!(data, [7, 8, 0, 0, 0, 0, 0, 0]);
    guest.transport.write(0x100, &[9; 8]);
    assert_eq!(seen.lock().unwrap().config, [9; 8]);
}

#[test]
fn register_accesses_of_other_sizes_have_no_effect() {
    let (mut guest, _) = guest();
    for len in [1, 2, 8] {
        let mut data = [0xff; 8];
        guest.transport.read(0, &mut data[..len]);
        assert_eq!(data[..len], [0; 8][..len]);
        guest.transport.write(0x70, &[1; 8][..len]);
        assert_eq!(guest.read(0x70), 0);
    }
    assert_eq!(guest.read(0x02), 0);
    assert_eq!(guest.read(0xc0), 0);
}

#[test]
fn notify_eventfds_do_not_block() {
    let (guest, _) = guest();
    for (_, fd) in guest.transport.queue_notify_fds().unwrap() {
        let fd: EventFd = fd;
        assert!(fd.read().is_err());
    }
}

proptest! {
    /// Whatever a driver writes, the device is activated and reset in turn
    /// (the probe checks), every activated queue is in memory, and a proper
    /// driver can take over after a reset.
    #[test]
    fn any_register_writes_are_survived(
        accesses in prop::collection::vec(
            (
                prop_oneof![
                    8 => (0u64..0x40).prop_map(|r| r * 4),
                    1 => 0u64..0x1000,
                    1 => any::<u64>(),
                ],
                prop_oneof![4 => 0u32..20, 1 => Just(0xb), 1 => Just(0xf), 2 => any::<u32>()],
                prop_oneof![8 => Just(4usize), 1 => Just(1), 1 => Just(2), 1 => Just(8)],
                any::<bool>(),
            ),
            0..200,
        ),
        booted in any::<bool>(),
    ) {
        let (mut guest, _seen) = guest();
        if booted {
            guest.boot(0);
        }
        for (offset, value, len, write) in accesses {
            let mut data = [0; 8];
            data[..4].copy_from_slice(&value.to_le_bytes());
            if write {
                guest.transport.write(offset, &data[..len]);
            } else {
                guest.transport.read(offset, &mut data[..len]);
            }
        }
        guest.boot(0);
    }
}
