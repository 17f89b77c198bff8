//! What a broken or hostile guest, and a busy host, can do.

use super::*;

#[test]
fn packets_out_of_place_are_reset_and_resets_are_not() {
    let mut vm = vm();
    for op in [
        0,
        OP_RESPONSE,
        OP_SHUTDOWN,
        OP_RW,
        OP_CREDIT_UPDATE,
        OP_CREDIT_REQUEST,
        77,
    ] {
        vm.send(packet(9, 9, op), &[]);
        assert_eq!(vm.receive_op(), Some(OP_RST), "op {op}");
    }
    vm.send(packet(9, 9, OP_RST), &[]);
    assert_eq!(vm.receive_op(), None);
    let server = vm.server();
    for op in [0, OP_RESPONSE, 77] {
        let mut stream = vm.connect_out(&server, 5);
        vm.send(packet(7, 5, op), &[]);
        assert_eq!(vm.receive_op(), Some(OP_RST), "op {op}");
        assert!(is_closed(&mut stream));
    }
}

#[test]
fn wrong_cids_and_types_are_not_served() {
    let mut vm = vm();
    let _server = vm.server();
    let mut header = packet(7, 5, OP_REQUEST);
    header.dst_cid = U64::new(3);
    vm.send(header, &[]);
    let (reply, _) = vm.receive().unwrap();
    assert_eq!((reply.op.get(), reply.src_cid.get()), (OP_RST, 3));
    let mut header = packet(7, 5, OP_REQUEST);
    header.kind = U16::new(2);
    vm.send(header, &[]);
    let (reply, _) = vm.receive().unwrap();
    assert_eq!((reply.op.get(), reply.kind.get()), (OP_RST, 2));
    let mut header = packet(7, 5, OP_REQUEST);
    header.src_cid = U64::new(53);
    vm.send(header, &[]);
    assert_eq!(vm.receive_op(), None);
}

#[test]
fn payload_that_is_not_there_resets_the_connection() {
    let mut vm = vm();
    let server = vm.server();
    for len in [1, 0x1_0001, u32::MAX] {
        let mut stream = vm.connect_out(&server, 5);
        let mut header = packet(7, 5, OP_RW);
        header.len = U32::new(len);
        vm.guest.put(BUF, header.as_bytes());
        vm.guest.queues[TX].push(&[(BUF, 44, 0)]);
        vm.guest.notify(1);
        vm.guest.queues[TX].pop_used().unwrap();
        assert_eq!(vm.receive_op(), Some(OP_RST));
        assert!(is_closed(&mut stream));
    }
}

#[test]
fn rx_buffers_without_room_are_returned_empty() {
    let mut vm = vm();
    vm.send(packet(9, 9, OP_RW), &[]);
    for part in [(BUF, 44, WRITE), (BUF, 100, 0), (MEM - 8, 100, WRITE)] {
        vm.guest.queues[RX].push(&[part]);
        vm.guest.notify(0);
        assert_eq!(vm.guest.queues[RX].pop_used().unwrap().1, 0);
    }
    assert_eq!(vm.receive_op(), Some(OP_RST));
}

#[test]
fn many_connections_carry_their_own_data() {
    let mut vm = vm();
    let server = vm.server();
    let mut streams: Vec<_> = (0..200).map(|p| vm.connect_out(&server, p)).collect();
    for (p, stream) in (0u32..).zip(&mut streams) {
        vm.send(packet(7, p, OP_RW), &p.to_le_bytes());
        stream.write_all(&p.to_be_bytes()).unwrap();
    }
    let mut seen = 0;
    while let Some((header, data)) = vm.receive() {
        assert_eq!(data, header.dst_port.get().to_be_bytes());
        seen += 1;
    }
    assert_eq!(seen, 200);
    for (p, stream) in (0u32..).zip(&mut streams) {
        assert_eq!(drain(stream), p.to_le_bytes());
    }
}

#[test]
fn number_of_connections_is_limited() {
    let mut vm = vm();
    let mut clients = Vec::new();
    for _ in 0..MAX_PEERS {
        clients.push(UnixStream::connect(vm.path()).unwrap());
        vm.guest.run();
    }
    let mut refused = UnixStream::connect(vm.path()).unwrap();
    vm.guest.run();
    assert!(is_closed(&mut refused));
    drop(clients.pop());
    vm.guest.run();
    vm.connect_in();
}

#[test]
fn reset_closes_connections_and_the_next_driver_serves_waiting_clients() {
    let mut vm = vm();
    let (mut client, _) = vm.connect_in();
    vm.guest.write(0x70, 0);
    vm.guest.run();
    assert!(is_closed(&mut client));
    let mut waiting = UnixStream::connect(vm.path()).unwrap();
    waiting.write_all(b"CONNECT 5\n").unwrap();
    vm.guest.run();
    vm.guest.boot(0);
    let (header, _) = vm.receive().unwrap();
    assert_eq!((header.op.get(), header.dst_port.get()), (OP_REQUEST, 5));
}

#[test]
fn broken_queue_needs_reset_and_closes_connections() {
    for queue in [RX, TX] {
        let mut vm = vm();
        let (mut client, _) = vm.connect_in();
        vm.guest.queues[queue].set_avail(1000);
        client.write_all(b"x").unwrap();
        vm.guest.notify(queue.try_into().unwrap());
        assert!(vm.guest.needs_reset());
        drain(&mut client);
        vm.guest.boot(0);
        vm.tx_slot = 0;
        vm.connect_in();
    }
}

proptest! {
    #[test]
    fn any_queues_are_survived(rx in any_queue(), tx in any_queue(), events in any_queue()) {
        let mut vm = vm();
        let _server = vm.server();
        for i in 0..0x1000u64 {
            vm.guest.put(BUF + i * 16, packet(7, 5, OP_REQUEST).as_bytes());
        }
        tx.offer_to(&mut vm.guest, 1);
        rx.offer_to(&mut vm.guest, 0);
        events.offer_to(&mut vm.guest, 2);
        vm.guest.boot(0);
        vm.connect_in();
    }

    /// A guest that says anything, on a few connections, against programs that
    /// talk back: the device survives and the connection table stays whole.
    #[test]
    fn any_packets_are_survived(
        packets in prop::collection::vec(
            (0u16..9, 0u32..3, 0u32..4, 0usize..3000, any::<u32>(), any::<u32>()),
            1..100,
        ),
    ) {
        let mut vm = vm();
        let server = vm.server();
        server.set_nonblocking(true).unwrap();
        let mut streams = Vec::new();
        for (op, guest_port, flags, len, buf_alloc, fwd_cnt) in packets {
            let mut header = packet(7, guest_port, op);
            header.flags = U32::new(flags);
            header.buf_alloc = U32::new(buf_alloc);
            header.fwd_cnt = U32::new(fwd_cnt % 5000);
            vm.send(header, &vec![1; if op == OP_RW { len } else { 0 }]);
            if let Ok((stream, _)) = server.accept() {
                stream.set_nonblocking(true).unwrap();
                streams.push(stream);
            }
            for stream in &mut streams {
                drain(stream);
                let _ = stream.write(&[2; 100]);
            }
            if flags == 3 && !streams.is_empty() {
                streams.swap_remove(0);
            }
            vm.guest.run();
            while vm.receive().is_some() {}
        }
        prop_assert!(!vm.guest.needs_reset());
    }
}
