//! The broker over real sockets: what clients get, and what a bad one can do.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // Helpers of tests.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use mshare_pool::admin;
use mshare_pool::broker::Broker;
use mshare_pool::client::{Client, ClientError, Event};
use mshare_pool::layout::PoolConfig;
use mshare_pool::server::{Listener, Options, Server, ServerError};
use mshare_pool::{Failure, Policy, Region, Role, wire};
use mshare_protocol::broker::{FromBroker, Hello, Request, ToBroker, VERSION};
use mshare_protocol::entry::Prot;
use mshare_protocol::frame;
use rustix::io::Errno;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

struct Pool {
    server: Option<Server>,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

fn quick() -> Options {
    Options {
        ack_limit: Duration::from_millis(300),
        io_limit: Duration::from_millis(500),
        ..Options::default()
    }
}

fn pool_with(size: u64, options: Options) -> Pool {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pool.sock");
    let listener = Listener::bind(&path).unwrap();
    let broker = Broker::new(&PoolConfig::new(size)).unwrap();
    Pool {
        server: Some(Server::start(listener, broker, options).unwrap()),
        path,
        _dir: dir,
    }
}

fn pool(size: u64) -> Pool {
    pool_with(size, Options::default())
}

fn guest(path: &Path, name: &str, policy: Policy) -> (Client, Receiver<Event>) {
    let (sender, receiver) = channel();
    let name = name.to_owned();
    let client = Client::connect(path, Role::Guest { name, policy }, move |event, _| {
        let _ = sender.send(event);
    });
    (client.unwrap(), receiver)
}

fn make(client: &Client, name: &[u8], start: u64, len: u64) -> Region {
    let id = client.create(name, 0o600, 0, 0).unwrap().id;
    client.size(id, start, len).unwrap();
    client.attach(id).unwrap()
}

fn errno<T: std::fmt::Debug>(result: Result<T, Failure>) -> Errno {
    Errno::from_raw_os_error(result.unwrap_err().errno)
}

/// Waits until `done`, at most 5 s.
fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let limit = Instant::now() + Duration::from_secs(5);
    while !done() {
        assert!(Instant::now() < limit, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn two_guests_share_a_region() {
    let pool = pool(64 * MIB);
    let (a, _) = guest(&pool.path, "a", Policy::Rw);
    let (b, _) = guest(&pool.path, "b", Policy::Ro);
    assert_eq!(a.geometry(), b.geometry());
    let region = make(&a, b"buffer cache", 16 * GIB, 4 * MIB);
    let seen = b.lookup(b"buffer cache").unwrap();
    assert_eq!(
        (seen.id, seen.start, seen.len),
        (region.id, 16 * GIB, 4 * MIB)
    );
    assert_eq!(b.attach(region.id).unwrap().attached, ["a", "b"]);
    rustix::io::pwrite(a.files().data(), b"hello", region.data_off).unwrap();
    let mut buf = [0; 5];
    rustix::io::pread(b.files().data(), &mut buf, region.data_off).unwrap();
    assert_eq!(&buf, b"hello");
    assert_eq!(b.stat(region.id).unwrap().resident, 4096);
    assert_eq!(
        errno(b.protect(region.id, 0, 4096, Prot::None)),
        Errno::ROFS
    );
    a.discard(region.id, 0, 4096).unwrap();
    assert_eq!(b.stat(region.id).unwrap().resident, 0);
    let stat = a.pool_stat().unwrap();
    assert_eq!(
        (stat.regions, stat.guests),
        (1, vec!["a".to_owned(), "b".to_owned()])
    );
    a.detach(region.id).unwrap();
    assert_eq!(b.stat(region.id).unwrap().attached, ["b"]);
}

#[test]
fn the_end_of_a_connection_detaches_at_once() {
    let pool = pool(64 * MIB);
    let (a, _) = guest(&pool.path, "a", Policy::Rw);
    let (b, _) = guest(&pool.path, "b", Policy::Rw);
    let region = make(&a, b"r", GIB, 4 * MIB);
    let unsized_id = a.create(b"unsized", 0o600, 0, 0).unwrap().id;
    b.unlink(b"r", Some(region.id)).unwrap();
    assert_eq!(b.stat(region.id).unwrap().attached, ["a"]);
    drop(a);
    eventually("the region ends", || b.stat(region.id).is_err());
    assert_eq!(errno(b.stat(unsized_id)), Errno::NOENT);
    let stat = b.pool_stat().unwrap();
    assert_eq!((stat.data_free, stat.table_bytes), (64 * MIB, 0));
}

#[test]
fn a_socket_is_private_and_goes_with_its_broker() {
    let mut pool = pool(2 * MIB);
    let mode = std::fs::metadata(&pool.path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let error = Listener::bind(&pool.path).unwrap_err();
    assert!(matches!(error, ServerError::InUse(_)), "{error}");
    pool.server = None;
    assert!(!pool.path.exists());
    // A socket that nobody serves is replaced, anything else is not.
    drop(std::os::unix::net::UnixListener::bind(&pool.path).unwrap());
    assert!(pool.path.exists());
    drop(Listener::bind(&pool.path).unwrap());
    assert!(!pool.path.exists());
    std::fs::write(&pool.path, "precious").unwrap();
    let error = Listener::bind(&pool.path).unwrap_err();
    assert!(matches!(error, ServerError::NotASocket(_)), "{error}");
    let nowhere = Listener::bind(Path::new("/nonexistent/x")).unwrap_err();
    assert!(matches!(nowhere, ServerError::Bind { .. }), "{nowhere}");
    let lock = std::fs::File::open(pool.path.parent().unwrap()).unwrap();
    lock.lock().unwrap();
    let locked = Listener::bind(&pool.path).unwrap_err();
    assert!(matches!(locked, ServerError::Locked { .. }), "{locked}");
}

#[test]
fn a_stopper_ends_the_wait() {
    let pool = pool(2 * MIB);
    let server = pool.server.as_ref().unwrap();
    let stopper = server.stopper();
    std::thread::scope(|scope| {
        scope.spawn(|| server.wait());
        stopper.stop();
    });
    let error = Client::connect(&pool.path, Role::Admin, |_, _| ()).unwrap_err();
    assert!(matches!(error, ClientError::Connect { .. }), "{error}");
}

#[test]
fn protect_waits_for_the_acknowledgement_of_private_guests_only() {
    let pool = pool(64 * MIB);
    let (a, a_events) = guest(&pool.path, "a", Policy::Rw);
    let (p, p_events) = guest(&pool.path, "p", Policy::Private);
    let region = make(&a, b"r", GIB, 4 * MIB);
    p.attach(region.id).unwrap();
    let delay = Duration::from_millis(150);
    let (acker, id) = (p.acker(), region.id);
    let told = std::thread::scope(|scope| {
        let told = scope.spawn(move || {
            let event = p_events.recv().unwrap();
            let Event::Invalidate { seq, .. } = event else {
                panic!("{event:?}")
            };
            assert_eq!(
                event,
                Event::Invalidate {
                    id,
                    offset: 4096,
                    len: 8192,
                    seq
                }
            );
            std::thread::sleep(delay);
            acker.ack(seq);
            p_events
        });
        let start = Instant::now();
        a.protect(region.id, 4096, 8192, Prot::Read).unwrap();
        assert!(start.elapsed() >= delay);
        told.join().unwrap()
    });
    // Giving rights back needs nobody.
    a.protect(region.id, 4096, 8192, Prot::ReadWrite).unwrap();
    assert!(told.try_recv().is_err() && a_events.try_recv().is_err());
}

#[test]
fn a_private_guest_can_acknowledge_its_own_request() {
    let pool = pool(64 * MIB);
    let role = Role::Guest {
        name: "p".to_owned(),
        policy: Policy::Private,
    };
    let p = Client::connect(&pool.path, role, |event, acker| {
        if let Event::Invalidate { seq, .. } = event {
            acker.ack(seq);
        }
    })
    .unwrap();
    let region = make(&p, b"r", GIB, 4 * MIB);
    let start = Instant::now();
    for prot in [Prot::Read, Prot::ReadWrite, Prot::None] {
        p.protect(region.id, 0, 4 * MIB, prot).unwrap();
    }
    assert!(start.elapsed() < Duration::from_secs(1));
}

#[test]
fn a_silent_guest_is_dropped_and_others_go_on() {
    let pool = pool_with(64 * MIB, quick());
    let (a, _) = guest(&pool.path, "a", Policy::Rw);
    let (p, p_events) = guest(&pool.path, "p", Policy::Private);
    let region = make(&a, b"r", GIB, 4 * MIB);
    p.attach(region.id).unwrap();
    let start = Instant::now();
    a.protect(region.id, 0, 4096, Prot::None).unwrap();
    let took = start.elapsed();
    assert!(
        took >= Duration::from_millis(300) && took < Duration::from_secs(2),
        "{took:?}"
    );
    assert_eq!(a.stat(region.id).unwrap().attached, ["a"]);
    let events: Vec<Event> = p_events.try_iter().collect();
    assert!(matches!(events[0], Event::Invalidate { .. }));
    match &events[1] {
        Event::Dropped(why) => assert!(why.message.contains("acknowledgement"), "{why}"),
        other => panic!("{other:?}"),
    }
    // It connects anew, without attachments, and can attach again.
    assert_eq!(errno(p.detach(region.id)), Errno::NOTCONN);
    p.attach(region.id).unwrap();
    assert_eq!(p.stat(region.id).unwrap().attached, ["a", "p"]);
}

#[test]
fn a_long_range_may_take_longer() {
    let options = Options {
        ack_per_gib: Duration::from_secs(5),
        ..quick()
    };
    let pool = pool_with(2 * GIB, options);
    let (a, _) = guest(&pool.path, "a", Policy::Rw);
    let (p, p_events) = guest(&pool.path, "p", Policy::Private);
    let region = make(&a, b"r", GIB, 2 * GIB);
    p.attach(region.id).unwrap();
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| a.protect(region.id, 0, 2 * GIB, Prot::Read));
        let Event::Invalidate { seq, .. } = p_events.recv().unwrap() else {
            panic!("no invalidation");
        };
        std::thread::sleep(4 * quick().ack_limit);
        p.ack(seq);
        asked.join().unwrap().unwrap();
    });
    assert_eq!(a.stat(region.id).unwrap().attached, ["a", "p"]);
}

#[test]
fn a_right_is_not_gone_while_a_silent_guest_keeps_its_connection() {
    let pool = pool_with(64 * MIB, quick());
    let (a, _) = guest(&pool.path, "a", Policy::Rw);
    let region = make(&a, b"r", GIB, 4 * MIB);
    let raw = hello(&pool.path, Policy::Private);
    attach(&raw, region.id);
    let protect = |prot| a.protect(region.id, 0, 4096, prot);
    // The first gives it up; the others find it given up.
    for prot in [Prot::Read, Prot::Read, Prot::None] {
        let why = protect(prot).unwrap_err();
        assert_eq!(why.errno, Errno::TIMEDOUT.raw_os_error());
        assert!(why.message.contains(": raw;"), "{why}");
    }
    protect(Prot::ReadWrite).unwrap();
    drop(raw);
    protect(Prot::Read).unwrap();
}

#[test]
fn a_protection_waits_for_what_another_has_asked_for() {
    let pool = pool(64 * MIB);
    let (a, _) = guest(&pool.path, "a", Policy::Rw);
    let (p, p_events) = guest(&pool.path, "p", Policy::Private);
    let region = make(&a, b"r", GIB, 4 * MIB);
    p.attach(region.id).unwrap();
    let admin = admin::connect(&pool.path).unwrap();
    let next = || match p_events.recv().unwrap() {
        Event::Invalidate { seq, .. } => seq,
        event => panic!("{event:?}"),
    };
    std::thread::scope(|scope| {
        let first = scope.spawn(|| a.protect(region.id, 0, 4096, Prot::Read));
        let seq = next();
        let second = scope.spawn(|| admin.protect(region.id, 0, 4096, Prot::Read));
        let other = next();
        assert!(!first.is_finished() && !second.is_finished());
        p.ack(seq);
        p.ack(other);
        first.join().unwrap().unwrap();
        second.join().unwrap().unwrap();
    });
}

#[test]
fn the_memory_of_a_dropped_client_is_not_reused_before_it_closes() {
    let pool = pool_with(64 * MIB, quick());
    let (a, _) = guest(&pool.path, "a", Policy::Rw);
    let region = make(&a, b"r", GIB, 4 * MIB);
    a.detach(region.id).unwrap();
    let mut raw = hello(&pool.path, Policy::Rw);
    attach(&raw, region.id);
    a.unlink(b"r", None).unwrap();
    raw.write_all(&[0xff; 64]).unwrap();
    assert!(matches!(
        frame::receive(&mut raw).unwrap(),
        FromBroker::Refused(_)
    ));
    assert!(a.stat(region.id).unwrap().attached.is_empty());
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(
        a.pool_stat().unwrap().data_free,
        60 * MIB,
        "still quarantined"
    );
    drop(raw);
    eventually("the range is free", || {
        a.pool_stat().unwrap().data_free == 64 * MIB
    });
}

fn hello(path: &Path, policy: Policy) -> UnixStream {
    let mut raw = UnixStream::connect(path).unwrap();
    raw.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let hello = Hello {
        version: VERSION,
        role: Role::Guest {
            name: "raw".to_owned(),
            policy,
        },
        resume: None,
    };
    frame::send(&mut raw, &ToBroker::Hello(hello)).unwrap();
    assert!(matches!(
        frame::receive(&mut raw).unwrap(),
        FromBroker::Welcome(_)
    ));
    raw
}

fn attach(raw: &UnixStream, id: u64) {
    let request = Request::Attach { id };
    frame::send(&mut &*raw, &ToBroker::Request { tag: 1, request }).unwrap();
    let reply = frame::receive(&mut &*raw).unwrap();
    assert!(matches!(reply, FromBroker::Reply { result: Ok(_), .. }));
}

fn refusal(raw: &mut UnixStream) -> Failure {
    match frame::receive(raw).unwrap() {
        FromBroker::Refused(why) => why,
        other => panic!("{other:?}"),
    }
}

fn is_closed(raw: &mut UnixStream) -> bool {
    matches!(raw.read(&mut [0; 16]), Ok(0))
}

#[test]
fn misbehaviour_hurts_the_client_itself_only() {
    let pool = pool_with(64 * MIB, quick());
    let (good, _) = guest(&pool.path, "good", Policy::Rw);
    let region = make(&good, b"r", GIB, 4 * MIB);
    let connect = || {
        let raw = UnixStream::connect(&pool.path).unwrap();
        raw.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        raw
    };
    let check = || {
        let start = Instant::now();
        good.protect(region.id, 0, 4096, Prot::Read).unwrap();
        good.protect(region.id, 0, 4096, Prot::ReadWrite).unwrap();
        assert!(
            start.elapsed() < Duration::from_millis(250),
            "{:?}",
            start.elapsed()
        );
    };
    // Before the hello: silence, wild lengths, noise, the wrong message, the
    // wrong version, half a message.
    let mut silent = connect();
    for bytes in [
        vec![0xff; 4],
        vec![0, 0, 1, 1],
        vec![3, 0, 0, 0, 9, 9, 9],
        frame::encode(&ToBroker::Ack { seq: 1 }).unwrap(),
        frame::encode(&ToBroker::Hello(Hello {
            version: 77,
            role: Role::Admin,
            resume: None,
        }))
        .unwrap(),
        vec![0, 0, 0, 0],
    ] {
        let mut raw = connect();
        raw.write_all(&bytes).unwrap();
        assert_eq!(refusal(&mut raw).errno, Errno::PROTO.raw_os_error());
        assert!(is_closed(&mut raw));
        check();
    }
    let mut half = connect();
    half.write_all(&[100, 0, 0, 0, 1]).unwrap();
    assert_eq!(refusal(&mut half).errno, Errno::PROTO.raw_os_error());
    assert_eq!(refusal(&mut silent).errno, Errno::PROTO.raw_os_error());
    check();
    // After it.
    for bytes in [
        vec![0xff; 4096],
        vec![2, 0, 0, 0, 9, 9],
        frame::encode(&ToBroker::Hello(Hello {
            version: 1,
            role: Role::Admin,
            resume: None,
        }))
        .unwrap(),
    ] {
        let mut raw = hello(&pool.path, Policy::Rw);
        raw.write_all(&bytes).unwrap();
        assert_eq!(refusal(&mut raw).errno, Errno::PROTO.raw_os_error());
        assert!(is_closed(&mut raw));
        check();
    }
    let mut half = hello(&pool.path, Policy::Rw);
    half.write_all(&[100, 0]).unwrap();
    check();
    // Acknowledgements of nothing are nothing.
    let mut raw = hello(&pool.path, Policy::Rw);
    for seq in 0..100 {
        frame::send(&mut raw, &ToBroker::Ack { seq }).unwrap();
    }
    // A flood of requests whose answers are not read.
    let flood = hello(&pool.path, Policy::Rw);
    flood.set_nonblocking(true).unwrap();
    let ask = frame::encode(&ToBroker::Request {
        tag: 0,
        request: Request::List {
            from: 0,
            max: u32::MAX,
        },
    });
    let ask = ask.unwrap();
    let end = Instant::now() + Duration::from_millis(800);
    while Instant::now() < end {
        let _ = (&flood).write(&ask);
    }
    check();
    drop((flood, half, raw));
    eventually("they are gone", || {
        good.pool_stat().unwrap().guests == ["good"]
    });
}

#[test]
fn connections_are_bounded() {
    let options = Options {
        max_connections: 3,
        ..quick()
    };
    let pool = pool_with(2 * MIB, options);
    let held: Vec<_> = (0..3).map(|_| hello(&pool.path, Policy::Ro)).collect();
    let error = Client::connect(&pool.path, Role::Admin, |_, _| ()).unwrap_err();
    match error {
        ClientError::Refused(why) => assert_eq!(why.errno, Errno::USERS.raw_os_error()),
        other => panic!("{other}"),
    }
    drop(held);
    eventually("there is room again", || {
        Client::connect(&pool.path, Role::Admin, |_, _| ()).is_ok()
    });
}

#[test]
fn admin_orders() {
    let pool = pool(64 * MIB);
    let client = admin::connect(&pool.path).unwrap();
    let region = admin::create(&client, b"r", 0o600, GIB, 4 * MIB).unwrap();
    assert!(admin::create(&client, b"other", 0o600, GIB, 4 * MIB).is_err());
    assert_eq!(
        admin::list(&client).unwrap().len(),
        1,
        "nothing half-made stays"
    );
    let data: Vec<u8> = (0..3_000_000u32)
        .map(|i| i.to_le_bytes()[0] ^ 0x5a)
        .collect();
    let at = 1_000_001;
    assert_eq!(
        admin::fill(&client, b"r", at, &mut data.as_slice()).unwrap(),
        3_000_000
    );
    let mut back = Vec::new();
    admin::read(&client, b"r", at, 3_000_000, &mut back).unwrap();
    assert!(back == data);
    let stat = admin::stat(&client, b"r").unwrap();
    assert!(stat.resident >= 3_000_000 && stat.resident <= 3_000_000 + 3 * 4096);
    assert_eq!(admin::list(&client).unwrap(), [stat]);
    for (offset, len) in [(4 * MIB + 1, 0), (4 * MIB, 1), (u64::MAX, 1), (1, u64::MAX)] {
        let error = admin::read(&client, b"r", offset, len, &mut back).unwrap_err();
        assert!(error.to_string().contains("do not fit in 'r'"), "{error}");
    }
    let error = admin::fill(&client, b"r", 4 * MIB - 10, &mut data.as_slice()).unwrap_err();
    assert!(error.to_string().contains("after 10 bytes"), "{error}");
    assert!(admin::fill(&client, b"nobody", 0, &mut data.as_slice()).is_err());
    admin::remove(&client, b"r").unwrap();
    assert!(admin::stat(&client, b"r").is_err());
    assert_eq!(admin::pool_stat(&client).unwrap().resident, 0);
    assert_eq!(region.start, GIB);
}

#[test]
fn a_region_removed_while_it_is_filled_is_freed_after_the_fill() {
    /// Has the region removed before it gives the second part.
    struct Input<'a> {
        parts: usize,
        between: &'a dyn Fn(),
    }

    impl Read for Input<'_> {
        fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
            self.parts += 1;
            match self.parts {
                1 => {}
                2 => (self.between)(),
                _ => return Ok(0),
            }
            buf.fill(7);
            Ok(buf.len())
        }
    }

    let pool = pool(64 * MIB);
    let filling = admin::connect(&pool.path).unwrap();
    let other = admin::connect(&pool.path).unwrap();
    let old = admin::create(&other, b"old", 0o600, GIB, 4 * MIB).unwrap();
    let mut input = Input {
        parts: 0,
        between: &|| {
            admin::remove(&other, b"old").unwrap();
            let new = admin::create(&other, b"new", 0o600, GIB, 4 * MIB).unwrap();
            assert_ne!(new.data_off, old.data_off, "the old range is in use");
            assert_eq!(other.pool_stat().unwrap().data_free, 56 * MIB);
        },
    };
    assert_eq!(
        admin::fill(&filling, b"old", 0, &mut input).unwrap(),
        2 * MIB
    );
    assert_eq!(admin::stat(&other, b"new").unwrap().resident, 0);
    let stat = other.pool_stat().unwrap();
    assert_eq!((stat.data_free, stat.resident), (60 * MIB, 0));
}

#[test]
fn an_admin_fails_when_the_broker_ends() {
    let mut pool = pool(2 * MIB);
    let client = admin::connect(&pool.path).unwrap();
    pool.server = None;
    assert_eq!(errno(client.pool_stat()), Errno::SHUTDOWN);
    let error = admin::connect(&pool.path).unwrap_err();
    assert!(error.to_string().contains("no broker answers"), "{error}");
}

#[test]
fn a_call_that_waits_for_a_broker_ends_with_close() {
    let mut pool = pool(2 * MIB);
    let (client, events) = guest(&pool.path, "g", Policy::Rw);
    pool.server = None;
    assert_eq!(events.recv().unwrap(), Event::Lost);
    std::thread::scope(|scope| {
        let call = scope.spawn(|| errno(client.pool_stat()));
        std::thread::sleep(Duration::from_millis(150));
        assert!(!call.is_finished());
        client.close();
        assert_eq!(call.join().unwrap(), Errno::SHUTDOWN);
    });
}

/// What the client makes of a broker that says `last` and closes.
fn event_after(last: &[u8]) -> Event {
    let real = pool(64 * MIB);
    let (other, _) = guest(&real.path, "other", Policy::Rw);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pool.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let (geometry, last) = (*other.geometry(), last.to_vec());
    let broker = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _hello: ToBroker = frame::receive(&mut stream).unwrap();
        let welcome = FromBroker::Welcome(geometry);
        wire::send_with_fds(&stream, &welcome, &other.files().all()).unwrap();
        stream.write_all(&last).unwrap();
    });
    let (client, events) = guest(&path, "g", Policy::Rw);
    broker.join().unwrap();
    let event = events.recv_timeout(Duration::from_secs(5)).unwrap();
    client.close();
    event
}

#[test]
fn a_broker_that_breaks_off_within_a_message_is_not_taken_for_dead() {
    assert_eq!(event_after(&[]), Event::Lost);
    for torn in [
        &[9][..],
        &[9, 0, 0, 0, 1],
        &[2, 0, 0, 0, 0xff, 0xff],
        &[0xff; 8],
    ] {
        let event = event_after(torn);
        assert!(matches!(event, Event::Dropped(_)), "{torn:?}: {event:?}");
    }
}

#[test]
fn a_broker_of_another_pool_is_not_taken_for_the_lost_one() {
    let mut pool = pool(2 * MIB);
    let (client, events) = guest(&pool.path, "g", Policy::Rw);
    make(&client, b"r", GIB, 2 * MIB);
    pool.server = None;
    assert_eq!(events.recv().unwrap(), Event::Lost);
    let broker = Broker::new(&PoolConfig::new(2 * MIB)).unwrap();
    let listener = Listener::bind(&pool.path).unwrap();
    pool.server = Some(Server::start(listener, broker, quick()).unwrap());
    std::thread::sleep(Duration::from_millis(500));
    assert!(
        events.try_recv().is_err(),
        "it waits, and keeps what it has"
    );
}

#[test]
fn many_clients_at_once_leave_nothing_behind() {
    let pool = pool(256 * MIB);
    std::thread::scope(|scope| {
        for n in 0..12u64 {
            let path = &pool.path;
            scope.spawn(move || {
                let policy = if n % 3 == 0 {
                    Policy::Private
                } else {
                    Policy::Rw
                };
                let role = Role::Guest {
                    name: format!("g{n}"),
                    policy,
                };
                let client = Client::connect(path, role, |event, acker| {
                    if let Event::Invalidate { seq, .. } = event {
                        acker.ack(seq);
                    }
                })
                .unwrap();
                for round in 0..25u64 {
                    // Three names for twelve clients, so that they meet.
                    let name = format!("r{}", (n + round) % 3);
                    let region = match client.create(name.as_bytes(), 0o600, 0, 0) {
                        Ok(new) => client.size(new.id, (1 + new.id) * GIB, 4 * MIB),
                        Err(_) => client.lookup(name.as_bytes()),
                    };
                    let Ok(region) = region else { continue };
                    if client.attach(region.id).is_ok() {
                        client.protect(region.id, 0, 2 * MIB, Prot::Read).unwrap();
                        client
                            .protect(region.id, 4096, 4 * MIB - 4096, Prot::ReadWrite)
                            .unwrap();
                        client.discard(region.id, 0, 4096).unwrap();
                        if round % 2 == 0 {
                            client.detach(region.id).unwrap();
                        }
                    }
                    let _ = client.unlink(name.as_bytes(), Some(region.id));
                }
            });
        }
    });
    let client = admin::connect(&pool.path).unwrap();
    for region in admin::list(&client).unwrap() {
        admin::remove(&client, &region.name).unwrap();
    }
    eventually("all is given back", || {
        let stat = client.pool_stat().unwrap();
        (stat.regions, stat.data_free, stat.table_bytes) == (0, 256 * MIB, 0)
    });
}
