use proptest::prelude::*;

use super::Rng;
use crate::devices::virtio::test_utils::*;

fn guest() -> Guest {
    let mut guest = Guest::new(Rng::new);
    guest.boot(0);
    guest
}

#[test]
fn request_is_filled_with_random_bytes() {
    let mut guest = guest();
    let head = guest.queues[0].push(&[(BUF, 64, WRITE), (HIGH, 36, WRITE)]);
    guest.notify(0);
    assert_eq!(guest.queues[0].pop_used(), Some((head.into(), 100)));
    assert_ne!(guest.get(BUF, 64), [0; 64]);
    assert_ne!(guest.get(HIGH, 36), [0; 36]);
    assert_eq!(guest.interrupts(), 1);
}

#[test]
fn long_request_gets_a_part() {
    let mut guest = guest();
    guest.queues[0].push(&[(BUF, 0x10_0000, WRITE)]);
    guest.notify(0);
    assert_eq!(guest.queues[0].pop_used(), Some((0, 4096)));
}

#[test]
fn buffer_outside_memory_or_read_only_gets_nothing() {
    let mut guest = guest();
    guest.queues[0].push(&[(MEM - 8, 64, WRITE)]);
    guest.queues[0].push(&[(u64::MAX - 4, 64, WRITE)]);
    guest.queues[0].push(&[(BUF, 64, 0)]);
    guest.notify(0);
    for head in 0..3 {
        assert_eq!(guest.queues[0].pop_used(), Some((head, 0)));
    }
    assert!(!guest.needs_reset());
    assert_eq!(guest.get(BUF, 64), [0; 64]);
}

#[test]
fn available_index_out_of_reach_needs_a_reset_and_reset_helps() {
    let mut guest = guest();
    guest.queues[0].set_avail(QSIZE + 1);
    guest.notify(0);
    assert!(guest.needs_reset());
    assert_eq!(guest.interrupts(), 1);

    guest.boot(0);
    guest.queues[0].push(&[(BUF, 64, WRITE)]);
    guest.notify(0);
    assert_eq!(guest.queues[0].pop_used(), Some((0, 64)));
}

#[test]
fn after_reset_guest_memory_is_left_alone() {
    let mut guest = guest();
    guest.queues[0].push(&[(BUF, 64, WRITE)]);
    guest.write(0x50, 0);
    guest.write(0x70, 0);
    guest.run();
    assert_eq!(guest.get(BUF, 64), [0; 64]);
    assert_eq!(guest.queues[0].pop_used(), None);
}

#[test]
fn device_outlives_its_event_loop() {
    let mut guest = guest();
    guest.events = crate::devices::EventLoop::new().unwrap();
    guest.write(0x70, 0);
    assert_eq!(guest.read(0x70), 0);
    guest.negotiate(0);
    guest.set_up_queue(0);
    guest.write(0x70, 0xf);
    assert!(guest.needs_reset(), "no loop to work on");
}

proptest! {
    #[test]
    fn any_queue_is_survived(queue in any_queue()) {
        let mut guest = guest();
        queue.offer_to(&mut guest, 0);
        guest.boot(0);
        guest.queues[0].push(&[(BUF, 64, WRITE)]);
        guest.notify(0);
        prop_assert_eq!(guest.queues[0].pop_used(), Some((0, 64)));
    }
}
