//! A broker process is killed with SIGKILL and another takes the pool over,
//! while clients go on.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // Helpers of tests.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use mshare_pool::broker::Broker;
use mshare_pool::client::{Client, Event};
use mshare_pool::directory::MAX_RECORDS;
use mshare_pool::layout::PoolConfig;
use mshare_pool::server::{Listener, Options, Server, Start};
use mshare_pool::wire::{FdReader, receive, send_with_fds};
use mshare_pool::{Policy, Region, Role};
use mshare_protocol::broker::{Failure, FromBroker, Hello, Request, Resume, ToBroker, VERSION};
use mshare_protocol::entry::{Prot, decode_leaf, decode_table};
use mshare_protocol::frame;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const GRACE: Duration = Duration::from_millis(1500);
const SOCKET: &str = "MSHARE_TEST_BROKER_SOCKET";
const RECOVER: &str = "MSHARE_TEST_BROKER_RECOVER";

/// Not a test by itself: this binary starts itself again to be a broker.
#[test]
#[ignore = "run by the other tests as a process of its own"]
fn broker_process() {
    let Some(path) = std::env::var_os(SOCKET) else {
        return;
    };
    let listener = Listener::bind(Path::new(&path)).unwrap();
    let start = if std::env::var_os(RECOVER).is_some() {
        Start::Recover {
            max_regions: MAX_RECORDS,
        }
    } else {
        Broker::new(&PoolConfig::new(512 * MIB)).unwrap().into()
    };
    let options = Options {
        grace: GRACE,
        ..Options::default()
    };
    Server::start(listener, start, options).unwrap().wait();
}

/// A broker process; killed when dropped.
struct Process(Child);

impl Process {
    fn start(path: &Path, recover: bool) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "broker_process", "--ignored", "--nocapture"])
            .env(SOCKET, path)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        if recover {
            command.env(RECOVER, "1");
        }
        Self(command.spawn().unwrap())
    }

    fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

fn fresh(path: &Path) -> Process {
    let process = Process::start(path, false);
    let limit = Instant::now() + Duration::from_secs(10);
    while UnixStream::connect(path).is_err() {
        assert!(Instant::now() < limit, "the broker process does not start");
        std::thread::sleep(Duration::from_millis(10));
    }
    process
}

fn guest(path: &Path, name: &str, policy: Policy) -> (Client, Receiver<Event>) {
    let (sender, receiver) = channel();
    let name = name.to_owned();
    let client = Client::connect(path, Role::Guest { name, policy }, move |event, acker| {
        if let Event::Invalidate { seq, .. } = event {
            acker.ack(seq);
        }
        let _ = sender.send(event);
    });
    (client.unwrap(), receiver)
}

fn make(client: &Client, name: &[u8], start: u64, len: u64) -> Region {
    let id = client.create(name, 0o600, 0, 0).unwrap().id;
    client.size(id, start, len).unwrap();
    client.attach(id).unwrap()
}

/// What the tables say about each page, read as a guest reads them.
fn walk(client: &Client, region: &Region) -> Vec<Prot> {
    let load = |offset: u64| {
        let mut word = [0; 8];
        rustix::io::pread(client.files().tables(), &mut word, offset).unwrap();
        u64::from_le_bytes(word)
    };
    let geometry = client.geometry();
    (0..region.len / 4096)
        .map(|page| {
            let pmd = load(region.table_off + page / 512 * 8);
            let table = decode_table(pmd).unwrap().expect("every unit has a table");
            let entry = load(table - geometry.window_gpa + page % 512 * 8);
            match decode_leaf(entry).unwrap() {
                None => Prot::None,
                Some((gpa, prot)) => {
                    let want =
                        geometry.window_gpa + geometry.data_off + region.data_off + page * 4096;
                    assert_eq!(gpa, want);
                    prot
                }
            }
        })
        .collect()
}

fn wait_for(events: &Receiver<Event>, want: &Event) {
    loop {
        let event = events.recv_timeout(Duration::from_secs(10)).unwrap();
        if &event == want {
            return;
        }
        assert!(!matches!(event, Event::Dropped(_)), "{event:?}");
    }
}

#[test]
fn a_killed_broker_is_replaced_and_nothing_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pool.sock");
    let mut first = fresh(&path);
    let (a, a_events) = guest(&path, "a", Policy::Rw);
    let (p, p_events) = guest(&path, "p", Policy::Private);
    let kept = make(&a, b"kept", GIB, 8 * MIB);
    p.attach(kept.id).unwrap();
    let unlinked = make(&a, b"unlinked", 2 * GIB, 4 * MIB);
    a.unlink(b"unlinked", None).unwrap();
    let half = a.create(b"half", 0o600, 0, 0).unwrap();
    // A third client that does not come back.
    let (c, c_events) = guest(&path, "c", Policy::Rw);
    let lost = make(&c, b"lost", 3 * GIB, 4 * MIB);
    c.unlink(b"lost", None).unwrap();
    a.protect(kept.id, 4096, 4 * MIB, Prot::Read).unwrap();
    rustix::io::pwrite(a.files().data(), b"survives", kept.data_off).unwrap();
    let before = walk(&a, &kept);

    first.kill();
    wait_for(&a_events, &Event::Lost);
    wait_for(&c_events, &Event::Lost);
    c.close();
    drop(c);
    assert_eq!(walk(&p, &kept), before, "tables stay without a broker");
    // A call made now waits.
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| a.protect(kept.id, 0, 8 * MIB, Prot::None));
        std::thread::sleep(Duration::from_millis(300));
        assert!(!waiting.is_finished());
        let second = Process::start(&path, true);
        waiting.join().unwrap().unwrap();
        wait_for(&a_events, &Event::Resumed);
        wait_for(&p_events, &Event::Resumed);
        assert!(walk(&p, &kept).iter().all(|&prot| prot == Prot::None));

        let stat = p.stat(kept.id).unwrap();
        assert_eq!(
            (stat.attached.len(), stat.name.as_slice()),
            (2, &b"kept"[..])
        );
        assert_eq!(stat.resident, 4096);
        let mut buf = [0; 8];
        rustix::io::pread(p.files().data(), &mut buf, kept.data_off).unwrap();
        assert_eq!(&buf, b"survives");
        // What was begun goes on.
        a.size(half.id, 8 * GIB, 2 * MIB).unwrap();
        assert_eq!(a.stat(unlinked.id).unwrap().attached, ["a"]);
        a.detach(unlinked.id).unwrap();
        // What nobody holds ends once all that live have resumed.
        let limit = Instant::now() + Duration::from_secs(10);
        while a.stat(lost.id).is_ok() || a.stat(unlinked.id).is_ok() {
            assert!(Instant::now() < limit, "unlinked regions must end");
            std::thread::sleep(Duration::from_millis(50));
        }
        assert_eq!(a.pool_stat().unwrap().data_free, 502 * MIB);
        let next = a.create(b"next", 0o600, 0, 0).unwrap();
        assert!(next.id > lost.id, "ids are not used again");
        drop(second);
    });
}

/// A guest that does nothing by itself: it has `id` attached and does not
/// resume. Its end of the connection, and its descriptors.
fn idle_guest(path: &Path, policy: Policy, id: u64) -> (UnixStream, Vec<OwnedFd>) {
    let stream = UnixStream::connect(path).unwrap();
    let hello = ToBroker::Hello(Hello {
        version: VERSION,
        role: Role::Guest {
            name: "idle".to_owned(),
            policy,
        },
        resume: None,
    });
    frame::send(&mut &stream, &hello).unwrap();
    let mut reader = FdReader::new(&stream);
    let welcome = receive(&mut reader, frame::MAX_FRAME).unwrap();
    assert!(matches!(welcome, FromBroker::Welcome(_)));
    let fds = reader.into_fds();
    let request = Request::Attach { id };
    frame::send(&mut &stream, &ToBroker::Request { tag: 1, request }).unwrap();
    let reply = frame::receive(&mut &stream).unwrap();
    assert!(matches!(reply, FromBroker::Reply { result: Ok(_), .. }));
    (stream, fds)
}

#[test]
fn memory_of_a_guest_that_stays_away_is_reused_only_after_its_death() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pool.sock");
    let mut first = fresh(&path);
    let (a, a_events) = guest(&path, "a", Policy::Rw);
    let region = make(&a, b"r", GIB, 4 * MIB);
    let idle = idle_guest(&path, Policy::Rw, region.id);
    a.unlink(b"r", None).unwrap();
    a.detach(region.id).unwrap();
    first.kill();
    wait_for(&a_events, &Event::Lost);
    let _second = Process::start(&path, true);
    wait_for(&a_events, &Event::Resumed);
    let grace_is_over = Instant::now() + GRACE + Duration::from_millis(500);
    while Instant::now() < grace_is_over {
        assert!(a.stat(region.id).is_ok(), "a guest has it mapped");
        std::thread::sleep(Duration::from_millis(50));
    }
    let next = make(&a, b"next", 2 * GIB, 4 * MIB);
    assert_ne!(next.data_off, region.data_off);
    drop(idle);
    let limit = Instant::now() + Duration::from_secs(10);
    while a.stat(region.id).is_ok() {
        assert!(Instant::now() < limit, "the guest is dead");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(a.pool_stat().unwrap().data_free, 508 * MIB);
}

#[test]
fn an_acknowledgement_that_a_stopped_broker_finds_late_counts() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pool.sock");
    let broker = fresh(&path);
    let signal = |signal| {
        let pid = rustix::process::Pid::from_child(&broker.0);
        rustix::process::kill_process(pid, signal).unwrap();
    };
    let (a, _) = guest(&path, "a", Policy::Rw);
    let region = make(&a, b"r", GIB, 4 * MIB);
    let role = Role::Guest {
        name: "p".to_owned(),
        policy: Policy::Private,
    };
    let (sender, events) = channel();
    let p = Client::connect(&path, role, move |event, _| {
        let _ = sender.send(event);
    })
    .unwrap();
    p.attach(region.id).unwrap();
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| a.protect(region.id, 0, 4096, Prot::None));
        let Event::Invalidate { seq, .. } = events.recv().unwrap() else {
            panic!("not an event to acknowledge");
        };
        signal(rustix::process::Signal::STOP);
        p.ack(seq);
        // The time itself is the matter here.
        std::thread::sleep(Options::default().ack_limit + Duration::from_millis(200));
        signal(rustix::process::Signal::CONT);
        asked.join().unwrap().unwrap();
    });
    assert_eq!(p.stat(region.id).unwrap().attached, ["a", "p"]);
    assert!(events.try_recv().is_err(), "it was given up");
}

#[test]
fn brokers_killed_again_and_again_under_load() {
    const KILLS: usize = 12;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pool.sock");
    let mut broker = fresh(&path);
    let stop = AtomicBool::new(false);
    let rounds = AtomicUsize::new(0);
    let (watcher, _) = guest(&path, "watcher", Policy::Ro);
    std::thread::scope(|scope| {
        for n in 0..3u64 {
            let (path, stop, rounds) = (&path, &stop, &rounds);
            scope.spawn(move || {
                let policy = [Policy::Rw, Policy::Private, Policy::Rw][usize::try_from(n).unwrap()];
                let (client, events) = guest(path, &format!("g{n}"), policy);
                let name = format!("r{n}");
                let start = (n + 1) * GIB;
                let mut last = 0;
                while !stop.load(Ordering::Relaxed) {
                    // Each step must succeed, however often the broker dies.
                    let region = make(&client, name.as_bytes(), start, 6 * MIB);
                    assert!(region.id > last);
                    last = region.id;
                    let mut model = vec![Prot::ReadWrite; 1536];
                    for (at, pages, prot) in [
                        (0u64, 1536u64, Prot::Read),
                        (100, 1000, Prot::None),
                        (500, 1000, Prot::ReadWrite),
                        (1, 1, Prot::Read),
                    ] {
                        client
                            .protect(region.id, at * 4096, pages * 4096, prot)
                            .unwrap();
                        let range =
                            usize::try_from(at).unwrap()..usize::try_from(at + pages).unwrap();
                        model[range].fill(prot);
                        assert_eq!(walk(&client, &region), model);
                    }
                    client.discard(region.id, 0, 4096).unwrap();
                    client.unlink(name.as_bytes(), Some(region.id)).unwrap();
                    client.detach(region.id).unwrap();
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
                assert!(!events.try_iter().any(|e| matches!(e, Event::Dropped(_))));
            });
        }
        for kill in 0..KILLS {
            std::thread::sleep(Duration::from_millis(90 + 37 * (kill as u64 % 5)));
            broker.kill();
            broker = Process::start(&path, true);
            let done = rounds.load(Ordering::Relaxed);
            let limit = Instant::now() + Duration::from_secs(20);
            while rounds.load(Ordering::Relaxed) < done + 2 {
                assert!(Instant::now() < limit, "no progress after kill {kill}");
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    // The last recovery may not have settled.
    let limit = Instant::now() + Duration::from_secs(10);
    loop {
        let stat = watcher.pool_stat().unwrap();
        if (stat.regions, stat.table_bytes, stat.data_free) == (0, 0, 512 * MIB) {
            break;
        }
        assert!(Instant::now() < limit, "leaked: {stat:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
    println!("{} rounds, {KILLS} kills", rounds.load(Ordering::Relaxed));
}

/// A broker that waits for those who had the pool before, in this process.
fn recovering(path: &Path) -> Server {
    let start = Start::Recover {
        max_regions: MAX_RECORDS,
    };
    let listener = Listener::bind(path).unwrap();
    Server::start(listener, start, Options::default()).unwrap()
}

/// Why the broker refuses who says hello with this.
fn refusal(
    stream: &UnixStream,
    role: Role,
    resume: Option<Resume>,
    fds: &[BorrowedFd<'_>],
) -> Failure {
    let hello = ToBroker::Hello(Hello {
        version: VERSION,
        role,
        resume,
    });
    send_with_fds(stream, &hello, fds).unwrap();
    match frame::receive(&mut &*stream).unwrap() {
        FromBroker::Refused(why) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_recovering_broker_takes_nothing_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pool.sock");
    let _server = recovering(&path);
    let refused = |resume, fds: &[BorrowedFd<'_>]| {
        let stream = UnixStream::connect(&path).unwrap();
        refusal(&stream, Role::Admin, resume, fds).message
    };
    let resume = || {
        Some(Resume {
            uuid: [9; 16],
            attached: vec![],
            created: vec![],
        })
    };
    assert!(refused(None, &[]).contains("recovering"));
    assert!(refused(resume(), &[]).contains("0 descriptors"));
    let file = tempfile::tempfile().unwrap();
    let fd = file.as_fd();
    assert!(refused(resume(), &[fd, fd, fd]).contains("seal"));
    // Right kind of files, but no directory in them; then another pool's.
    let config = PoolConfig::new(2 * MIB);
    let empty = mshare_pool::memory::PoolFiles::create(&config.geometry([9; 16]).unwrap()).unwrap();
    assert!(refused(resume(), &empty.all()).contains("not that of a pool"));
    let other = Broker::new(&config).unwrap();
    let message = refused(resume(), &other.files().all());
    assert!(message.contains("not those of the pool"), "{message}");
}

/// A client that was accepted before the stop says hello after it. The pool is the
/// next broker's: two of them must not write it.
#[test]
fn a_broker_that_has_stopped_recovers_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pool.sock");
    let mut first = fresh(&path);
    let (client, _events) = guest(&path, "g", Policy::Rw);
    let region = make(&client, b"r", GIB, 2 * MIB);
    first.kill();
    let second = recovering(&path);
    client.stat(region.id).unwrap();
    let late = UnixStream::connect(&path).unwrap();
    // Until it is accepted.
    std::thread::sleep(Duration::from_millis(200));

    second.stopper().stop();

    let resume = Resume {
        uuid: client.geometry().uuid,
        attached: Vec::new(),
        created: Vec::new(),
    };
    let role = Role::Guest {
        name: "late".to_owned(),
        policy: Policy::Rw,
    };
    let why = refusal(&late, role, Some(resume), &client.files().all());
    assert_eq!(why.errno, libc::EAGAIN, "{why}");
    client.close();
}
