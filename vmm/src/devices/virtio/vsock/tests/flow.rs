//! Credit, backpressure and speed.

use super::*;

#[test]
fn guest_gets_no_more_than_its_credit() {
    let mut vm = vm();
    let (mut client, host_port) = vm.connect_in();
    let mut update = packet(host_port, PORT, OP_CREDIT_UPDATE);
    update.buf_alloc = U32::new(10);
    vm.send(update, &[]);
    client.write_all(b"0123456789abc").unwrap();
    assert_eq!(vm.receive().unwrap().1, b"0123456789");
    assert_eq!(vm.receive_op(), Some(OP_CREDIT_REQUEST));
    assert_eq!(vm.receive_op(), None, "asked once");
    update.fwd_cnt = U32::new(10);
    vm.send(update, &[]);
    let (header, data) = vm.receive().unwrap();
    assert_eq!((header.op.get(), &data[..]), (OP_RW, &b"abc"[..]));
}

#[test]
fn guest_with_nonsense_credit_gets_nothing() {
    let mut vm = vm();
    let (mut client, host_port) = vm.connect_in();
    let mut update = packet(host_port, PORT, OP_CREDIT_UPDATE);
    update.fwd_cnt = U32::new(1);
    vm.send(update, &[]);
    client.write_all(b"data").unwrap();
    assert_eq!(vm.receive_op(), Some(OP_CREDIT_REQUEST));
    assert_eq!(vm.receive_op(), None);
}

#[test]
fn guest_learns_of_space_when_the_host_reads() {
    let mut vm = vm();
    let server = vm.server();
    let mut stream = vm.connect_out(&server, 5);
    let mut sent = 0u32;
    let mut told = 0u32;
    let mut received = 0usize;
    // Send only within credit; it must come to a standstill, then go on.
    for _ in 0..100 {
        while BUF_ALLOC - (sent - told) >= 0x1_0000 {
            vm.send(packet(7, 5, OP_RW), &[1; 0x1_0000]);
            sent += 0x1_0000;
            while let Some((header, _)) = vm.receive() {
                told = header.fwd_cnt.get();
            }
        }
        received += drain(&mut stream).len();
        vm.guest.run();
        while let Some((header, _)) = vm.receive() {
            assert_eq!(header.op.get(), OP_CREDIT_UPDATE);
            told = header.fwd_cnt.get();
        }
    }
    assert!(sent > 10 * BUF_ALLOC, "stalled after {sent} bytes");
    received += drain(&mut stream).len();
    assert!(received as u64 + u64::from(BUF_ALLOC) >= u64::from(sent));
}

#[test]
fn guest_that_exceeds_its_credit_is_reset() {
    let mut vm = vm();
    let server = vm.server();
    let mut stream = vm.connect_out(&server, 5);
    let mut reset = false;
    for _ in 0..64 {
        vm.send(packet(7, 5, OP_RW), &[1; 0x1_0000]);
        while let Some(op) = vm.receive_op() {
            reset |= op == OP_RST;
        }
        if reset {
            break;
        }
    }
    assert!(reset);
    assert!(drain(&mut stream).len() < 64 * 0x1_0000);
}

#[test]
fn credit_request_is_answered() {
    let mut vm = vm();
    let server = vm.server();
    let _stream = vm.connect_out(&server, 5);
    vm.send(packet(7, 5, OP_RW), b"12345");
    vm.send(packet(7, 5, OP_CREDIT_REQUEST), &[]);
    let (header, _) = vm.receive().unwrap();
    assert_eq!(header.op.get(), OP_CREDIT_UPDATE);
    assert_eq!(header.fwd_cnt.get(), 5);
    assert_eq!(header.buf_alloc.get(), BUF_ALLOC);
}

#[test]
fn guest_that_takes_no_answers_is_not_served_until_it_does() {
    let mut vm = vm();
    let header = packet(9, 9, OP_RW);
    vm.guest.put(BUF, header.as_bytes());
    let mut taken = 0;
    for _ in 0..MAX_REPLIES + 5 {
        vm.guest.queues[TX].push(&[(BUF, 44, 0)]);
        vm.guest.notify(1);
        match vm.guest.queues[TX].pop_used() {
            Some(_) => taken += 1,
            None => break,
        }
    }
    assert_eq!(taken, MAX_REPLIES);
    for _ in 0..10 {
        assert_eq!(vm.receive_op(), Some(OP_RST));
    }
    vm.guest.run();
    assert!(vm.guest.queues[TX].pop_used().is_some(), "served again");
}

/// Prints how fast data moves through the device, driver and host's program
/// included: `cargo test -p vmm --release -- --ignored --nocapture vsock_rate`.
#[test]
#[ignore = "a measurement"]
fn vsock_rate() {
    const TOTAL: u64 = 1 << 30;
    let mut vm = vm();
    let server = vm.server();
    let rate = |what, start: std::time::Instant| {
        let mib = f64::from(u32::try_from(TOTAL >> 20).unwrap());
        println!("{what}: {:.0} MiB/s", mib / start.elapsed().as_secs_f64());
    };

    let stream = vm.connect_out(&server, 5);
    stream.set_nonblocking(false).unwrap();
    let reader = std::thread::spawn(move || {
        let mut buf = vec![0; 0x4_0000];
        while (&stream).read(&mut buf).unwrap() > 0 {}
    });
    let start = std::time::Instant::now();
    let (mut sent, mut told) = (0u64, 0u32);
    while sent < TOTAL {
        let in_flight = u32::try_from(sent & 0xffff_ffff).unwrap() - told;
        if BUF_ALLOC - in_flight >= 0x1_0000 {
            vm.send(packet(7, 5, OP_RW), &[1; 0x1_0000]);
            sent += 0x1_0000;
        }
        vm.guest.run();
        while let Some((header, _)) = vm.receive() {
            told = header.fwd_cnt.get();
        }
    }
    let mut bye = packet(7, 5, OP_SHUTDOWN);
    bye.flags = U32::new(SHUTDOWN_BOTH);
    vm.send(bye, &[]);
    reader.join().unwrap();
    rate("guest to host", start);

    let mut stream = {
        vm.receive();
        vm.connect_out(&server, 6)
    };
    stream.set_nonblocking(false).unwrap();
    let writer = std::thread::spawn(move || {
        let buf = vec![1; 0x4_0000];
        for _ in 0..TOTAL / 0x4_0000 {
            stream.write_all(&buf).unwrap();
        }
    });
    let start = std::time::Instant::now();
    let (mut received, mut told) = (0u64, 0);
    while received < TOTAL {
        if let Some((_, data)) = vm.receive() {
            received += data.len() as u64;
        } else {
            vm.guest.run();
        }
        if received - told >= 0x8000 {
            told = received;
            let mut update = packet(7, 6, OP_CREDIT_UPDATE);
            update.fwd_cnt = U32::new(u32::try_from(received & 0xffff_ffff).unwrap());
            vm.send(update, &[]);
        }
    }
    writer.join().unwrap();
    rate("host to guest, 4 KiB buffers", start);
}
