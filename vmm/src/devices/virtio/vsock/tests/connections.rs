//! Opening, using and ending connections.

use super::*;

#[test]
fn reserved_cids_are_refused() {
    for cid in [0, 1, 2, u64::from(u32::MAX), u64::MAX] {
        let dir = TempDir::new().unwrap();
        let host = HostSocket::bind(&dir.path().join("v")).unwrap();
        let events = crate::devices::EventLoop::new().unwrap();
        assert!(Vsock::new(cid, host, events.remote_endpoint()).is_err());
    }
}

#[test]
fn config_space_holds_the_cid() {
    let mut vm = vm();
    assert_eq!(vm.guest.read(0x100), 52);
    assert_eq!(vm.guest.read(0x104), 0);
}

#[test]
fn client_of_the_host_talks_to_the_guest() {
    let mut vm = vm();
    let (mut client, host_port) = vm.connect_in();
    client.write_all(b"ping").unwrap();
    let (header, data) = vm.receive().unwrap();
    assert_eq!((header.op.get(), &data[..]), (OP_RW, &b"ping"[..]));
    vm.send(packet(host_port, PORT, OP_RW), b"pong");
    assert_eq!(drain(&mut client), b"pong");
}

#[test]
fn client_that_nobody_serves_is_closed() {
    let mut vm = vm();
    let mut client = UnixStream::connect(vm.path()).unwrap();
    client.write_all(b"CONNECT 1000\n").unwrap();
    vm.guest.run();
    let (request, _) = vm.receive().unwrap();
    vm.send(packet(request.src_port.get(), PORT, OP_RST), &[]);
    assert!(is_closed(&mut client));
}

#[test]
fn client_with_a_bad_command_is_told_and_closed() {
    let mut vm = vm();
    let mut client = UnixStream::connect(vm.path()).unwrap();
    client.write_all(b"HELLO\n").unwrap();
    vm.guest.run();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("ERROR expected"), "{answer}");
    assert_eq!(vm.receive_op(), None);
}

#[test]
fn client_that_gives_up_early_resets_the_guest() {
    let mut vm = vm();
    let mut client = UnixStream::connect(vm.path()).unwrap();
    client.write_all(b"CONNECT 1000\n").unwrap();
    vm.guest.run();
    assert_eq!(vm.receive_op(), Some(OP_REQUEST));
    drop(client);
    vm.guest.run();
    assert_eq!(vm.receive_op(), Some(OP_RST));
}

#[test]
fn guest_talks_to_a_server_of_the_host() {
    let mut vm = vm();
    let server = vm.server();
    let mut stream = vm.connect_out(&server, 5);
    vm.send(packet(7, 5, OP_RW), b"hello");
    assert_eq!(drain(&mut stream), b"hello");
    stream.write_all(b"you").unwrap();
    assert_eq!(vm.receive().unwrap().1, b"you");
}

#[test]
fn guest_is_refused_without_a_server() {
    let mut vm = vm();
    vm.send(packet(7, 5, OP_REQUEST), &[]);
    let (header, _) = vm.receive().unwrap();
    assert_eq!(header.op.get(), OP_RST);
    assert_eq!((header.src_port.get(), header.dst_port.get()), (7, 5));
}

#[test]
fn second_request_with_the_same_ports_resets_the_connection() {
    let mut vm = vm();
    let server = vm.server();
    let mut stream = vm.connect_out(&server, 5);
    vm.send(packet(7, 5, OP_REQUEST), &[]);
    assert_eq!(vm.receive_op(), Some(OP_RST));
    assert!(is_closed(&mut stream));
}

#[test]
fn guest_that_closes_delivers_everything_first() {
    let mut vm = vm();
    let server = vm.server();
    let mut stream = vm.connect_out(&server, 5);
    let data = vec![7; BUF_ALLOC as usize];
    let mut sent = 0;
    // More than the unix socket takes, so that some waits in the device.
    for chunk in data.chunks(0x1_0000) {
        vm.send(packet(7, 5, OP_RW), chunk);
        sent += chunk.len();
    }
    let mut bye = packet(7, 5, OP_SHUTDOWN);
    bye.flags = U32::new(SHUTDOWN_BOTH);
    vm.send(bye, &[]);
    vm.send(packet(7, 5, OP_RST), &[]);
    let mut received = 0;
    loop {
        let mut buf = [0; 4096];
        match stream.read(&mut buf) {
            Ok(0) => break,
            Ok(n) => received += n,
            Err(_) => vm.guest.run(),
        }
    }
    assert_eq!(received, sent);
}

#[test]
fn guest_that_half_closes_can_still_receive() {
    let mut vm = vm();
    let server = vm.server();
    let mut stream = vm.connect_out(&server, 5);
    let mut bye = packet(7, 5, OP_SHUTDOWN);
    bye.flags = U32::new(SHUTDOWN_SEND);
    vm.send(bye, &[]);
    assert!(is_closed(&mut stream));
    stream.write_all(b"late").unwrap();
    assert_eq!(vm.receive().unwrap().1, b"late");
    drop(stream);
    let (header, _) = vm.receive().unwrap();
    assert_eq!(header.op.get(), OP_SHUTDOWN);
    assert_eq!(header.flags.get(), SHUTDOWN_BOTH);
    vm.send(packet(7, 5, OP_RST), &[]);
    assert_eq!(vm.receive_op(), None);
}

#[test]
fn guest_that_receives_no_more_fails_the_writer_only() {
    let mut vm = vm();
    let server = vm.server();
    let mut stream = vm.connect_out(&server, 5);
    let mut bye = packet(7, 5, OP_SHUTDOWN);
    bye.flags = U32::new(SHUTDOWN_RCV);
    vm.send(bye, &[]);
    assert_eq!(
        stream.write(b"x").unwrap_err().kind(),
        ErrorKind::BrokenPipe
    );
    vm.send(packet(7, 5, OP_RW), b"still");
    assert_eq!(drain(&mut stream), b"still");
}

#[test]
fn host_that_half_closes_can_still_receive() {
    let mut vm = vm();
    let (mut client, host_port) = vm.connect_in();
    client.write_all(b"last words").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(vm.receive().unwrap().1, b"last words");
    let (header, _) = vm.receive().unwrap();
    assert_eq!(header.op.get(), OP_SHUTDOWN);
    assert_eq!(header.flags.get(), SHUTDOWN_SEND);
    vm.send(packet(host_port, PORT, OP_RW), b"answer");
    assert_eq!(drain(&mut client), b"answer");
}

#[test]
fn host_that_is_gone_resets_a_guest_that_sends() {
    let mut vm = vm();
    let (client, host_port) = vm.connect_in();
    drop(client);
    let (header, _) = vm.receive().unwrap();
    assert_eq!(header.flags.get(), SHUTDOWN_BOTH);
    vm.send(packet(host_port, PORT, OP_RW), b"x");
    assert_eq!(vm.receive_op(), Some(OP_RST));
}

#[test]
fn connections_that_end_unseen_leave_nothing_behind() {
    let mut vm = vm();
    let _server = vm.server();
    for _ in 0..100 {
        vm.send(packet(7, 5, OP_REQUEST), &[]);
        vm.send(packet(7, 5, OP_RST), &[]);
        let mut client = UnixStream::connect(vm.path()).unwrap();
        client.write_all(b"CONNECT 1000\n").unwrap();
        vm.guest.run();
        drop(client);
        vm.guest.run();
    }
    assert_eq!(vm.receive_op(), None);
}

#[test]
fn server_that_is_done_at_once_is_heard() {
    let mut vm = vm();
    let server = vm.server();
    vm.send(packet(7, 5, OP_REQUEST), &[]);
    let (mut stream, _) = server.accept().unwrap();
    stream.write_all(b"motd").unwrap();
    drop(stream);
    vm.guest.run();
    assert_eq!(vm.receive_op(), Some(OP_RESPONSE));
    assert_eq!(vm.receive().unwrap().1, b"motd");
    assert_eq!(vm.receive_op(), Some(OP_SHUTDOWN));
}
