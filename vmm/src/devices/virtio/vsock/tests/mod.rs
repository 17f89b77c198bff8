//! A guest's driver against programs of the host, over real unix sockets.

mod connections;
mod flow;
mod robustness;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use proptest::prelude::*;
use tempfile::TempDir;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::mux::{MAX_PEERS, MAX_REPLIES};
use super::packet::*;
use super::{BUF_ALLOC, HostSocket, Vsock};
use crate::devices::virtio::test_utils::*;

const CID: u64 = 52;
const PORT: u32 = 1000;
/// Bytes of each rx and tx buffer.
const SLOT: u64 = 0x2_0000;
const RX: usize = 0;
const TX: usize = 1;

struct Vm {
    guest: Guest,
    dir: TempDir,
    /// Where the next tx packet goes.
    tx_slot: u64,
    /// The device has an rx buffer that it did not use yet.
    rx_posted: bool,
}

fn vm() -> Vm {
    let dir = TempDir::new().unwrap();
    let host = HostSocket::bind(&dir.path().join("v")).unwrap();
    let mut guest = Guest::new(|events| Vsock::new(CID, host, events).unwrap());
    guest.boot(0);
    Vm {
        guest,
        dir,
        tx_slot: 0,
        rx_posted: false,
    }
}

fn packet(host_port: u32, guest_port: u32, op: u16) -> Header {
    Header {
        src_cid: U64::new(CID),
        dst_cid: U64::new(2),
        src_port: U32::new(guest_port),
        dst_port: U32::new(host_port),
        kind: U16::new(TYPE_STREAM),
        op: U16::new(op),
        buf_alloc: U32::new(0x1_0000),
        ..Header::default()
    }
}

impl Vm {
    fn path(&self) -> PathBuf {
        self.dir.path().join("v")
    }

    /// The guest's driver sends a packet, its payload in a second descriptor.
    fn send(&mut self, mut header: Header, payload: &[u8]) {
        let addr = BUF + self.tx_slot * SLOT;
        self.tx_slot = (self.tx_slot + 1) % 8;
        header.len = U32::new(payload.len().try_into().unwrap());
        self.guest.put(addr, header.as_bytes());
        self.guest.put(addr + 0x100, payload);
        let half = payload.len() / 2;
        // Two pieces, as Linux sends data that it does not copy.
        let parts = [
            (addr, 44, 0),
            (addr + 0x100, half.try_into().unwrap(), 0),
            (
                addr + 0x100 + half as u64,
                (payload.len() - half).try_into().unwrap(),
                0,
            ),
        ];
        self.guest.queues[TX].push(if payload.is_empty() {
            &parts[..1]
        } else {
            &parts
        });
        self.guest.notify(1);
        assert!(
            self.guest.queues[TX].pop_used().is_some(),
            "packet not taken"
        );
    }

    /// The guest's driver takes one packet from the device.
    fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        if !self.rx_posted {
            self.guest.queues[RX].push(&[(HIGH, 4096, WRITE)]);
            self.rx_posted = true;
        }
        self.guest.notify(0);
        let (_, len) = self.guest.queues[RX].pop_used()?;
        self.rx_posted = false;
        let bytes = self.guest.get(HIGH, len as usize);
        let header = Header::read_from_bytes(&bytes[..44]).unwrap();
        Some((header, bytes[44..].to_vec()))
    }

    fn receive_op(&mut self) -> Option<u16> {
        self.receive().map(|(header, _)| header.op.get())
    }

    /// A program of the host connects to `PORT` of the guest.
    fn connect_in(&mut self) -> (UnixStream, u32) {
        let mut client = UnixStream::connect(self.path()).unwrap();
        client.set_nonblocking(true).unwrap();
        client.write_all(b"CONNECT 1000\n").unwrap();
        self.guest.run();
        let (request, _) = self.receive().unwrap();
        assert_eq!(request.op.get(), OP_REQUEST);
        assert_eq!(request.dst_port.get(), PORT);
        assert_eq!(request.dst_cid.get(), CID);
        assert_eq!(request.src_cid.get(), 2);
        assert_eq!(request.buf_alloc.get(), BUF_ALLOC);
        let host_port = request.src_port.get();
        self.send(packet(host_port, PORT, OP_RESPONSE), &[]);
        let mut answer = [0; 64];
        let len = client.read(&mut answer).unwrap();
        assert_eq!(answer[..len], *format!("OK {host_port}\n").as_bytes());
        (client, host_port)
    }

    /// The guest connects from `guest_port` to a server on port 7.
    fn connect_out(&mut self, server: &UnixListener, guest_port: u32) -> UnixStream {
        self.send(packet(7, guest_port, OP_REQUEST), &[]);
        assert_eq!(self.receive_op(), Some(OP_RESPONSE));
        let (stream, _) = server.accept().unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
    }

    fn server(&self) -> UnixListener {
        UnixListener::bind(self.dir.path().join("v_7")).unwrap()
    }
}

fn is_closed(stream: &mut UnixStream) -> bool {
    matches!(stream.read(&mut [0; 16]), Ok(0))
}

fn drain(stream: &mut UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    match stream.read_to_end(&mut all) {
        Ok(_) => {}
        // A stream closed with bytes unread ends so.
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
    }
    all
}
