//! A broker of its own: what outlives it, and what `vmm pool` shows.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread::JoinHandle;
use std::time::Duration;

use mshare_protocol::agent::{Map, Op, RegionOp, Value};
use mshare_tests::guests::{Guest, Images, Options, Process};
use vmm::agent_client::AgentError;

use crate::common::*;
use crate::removal::{device, tell_driver};

const LEN: u64 = 16 * MIB;

fn vmm_pool(images: &Images, socket: &Path, args: &[&str]) -> Output {
    Command::new(&images.vmm)
        .arg("pool")
        .args(args)
        .arg("--socket")
        .arg(socket)
        .output()
        .unwrap()
}

fn text(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// A broker in a process of its own.
fn start(images: &Images, dir: &Path, args: &[&str]) -> Process {
    let socket = dir.join("pool");
    let mut command = Command::new(&images.vmm);
    command.arg("pool").arg("--socket").arg(&socket).args(args);
    Process::start("broker", dir, command).unwrap()
}

/// A broker that answers, and what it was started with.
struct Own {
    images: Images,
    dir: tempfile::TempDir,
    socket: PathBuf,
    broker: Process,
}

impl Own {
    fn new(size: &str) -> Self {
        let images = Images::from_env().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("pool");
        let broker = start(&images, dir.path(), &["--size", size]);
        eventually("the broker answers", || {
            mshare_pool::admin::connect(&socket).is_ok()
        });
        Self {
            images,
            dir,
            socket,
            broker,
        }
    }
}

/// Has a process of `group` take the right to write the first page away, which waits
/// for the broker.
fn ask(guest: &Guest, group: &'static str) -> JoinHandle<Result<Value, AgentError>> {
    let mut agent = guest.second_agent().unwrap();
    let protect = RegionOp::Protect {
        name: "pool/r".to_owned(),
        offset: 0,
        len: PAGE,
        prot: 1,
    };
    let asked = std::thread::spawn(move || agent.run_one(group, 0, Op::Region(protect)));
    std::thread::sleep(Duration::from_millis(500));
    assert!(!asked.is_finished(), "who has answered?");
    asked
}

#[test]
fn guests_outlive_their_broker_and_the_next_one_goes_on() {
    let Own {
        images,
        dir,
        socket,
        mut broker,
    } = Own::new("1G");
    let options = |name: &str| Options::new(name).pool(&socket, "rw");
    let mut a = Guest::start(&images, dir.path(), &options("a")).unwrap();
    let mut b = Guest::start(&images, dir.path(), &options("b")).unwrap();
    a.agent
        .start_group("w", 1, Some(Map::create("pool/r", START, LEN)))
        .unwrap();
    b.agent
        .start_group("w", 1, Some(Map::attach("pool/r")))
        .unwrap();
    store(&mut a, "w", 0, 11);

    broker.kill().unwrap();

    // No guest notices, and what is asked of the broker waits.
    assert_eq!(load(&mut b, "w", 0), 11);
    store(&mut b, "w", 0, 12);
    assert_eq!(load(&mut a, "w", 0), 12);
    let asked = ask(&a, "w");

    let _second = start(&images, dir.path(), &["--recover"]);
    asked.join().unwrap().unwrap();

    assert_eq!(try_access(&mut b, "w", 0, true), Some(libc::SIGSEGV));
    assert_eq!(load(&mut b, "w", 0), 12);
    let admin = mshare_pool::admin::connect(&socket).unwrap();
    eventually("both guests are attached again", || {
        mshare_pool::admin::stat(&admin, b"r")
            .unwrap()
            .attached
            .len()
            == 2
    });
    a.agent.create("pool/s", START + GIB, LEN).unwrap();
    a.agent.stop_group("w").unwrap();
    b.agent.stop_group("w").unwrap();
    assert_quiet(&mut a);
    assert_quiet(&mut b);
}

#[test]
fn who_waits_for_a_broker_can_be_killed_and_fails_when_the_device_goes() {
    let Own {
        images,
        dir,
        socket,
        mut broker,
    } = Own::new("1G");
    let options = Options::new("a").pool(&socket, "rw");
    let mut a = Guest::start(&images, dir.path(), &options).unwrap();
    a.agent
        .start_group("w", 1, Some(Map::create("pool/r", START, LEN)))
        .unwrap();
    broker.kill().unwrap();
    let fails = ask(&a, "w");
    for _ in 0..5 {
        a.agent.start_group("killed", 1, None).unwrap();
        let killed = ask(&a, "killed");
        let ended = a.agent.kill_group("killed", None).unwrap();
        assert_eq!(ended[0].result, Ok(Value::Signalled(libc::SIGKILL)));
        killed.join().unwrap().unwrap_err();
    }
    assert!(!fails.is_finished());

    let device = device(&mut a);
    tell_driver(&mut a, "unbind", &device);
    let error = fails.join().unwrap().unwrap_err();
    assert_eq!(error.errno(), Some(libc::EIO), "{error}");
    assert_quiet(&mut a);
}

#[test]
fn second_broker_at_one_socket_is_refused_and_a_stale_socket_is_not() {
    let Own {
        images,
        dir,
        socket,
        mut broker,
    } = Own::new("4M");
    let refused = vmm_pool(&images, &socket, &["--size", "4M"]);
    assert_eq!(refused.status.code(), Some(1));
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(message.contains("already serves"), "{message}");
    broker.kill().unwrap();
    let _next = start(&images, dir.path(), &["--size", "4M"]);
    eventually("the next broker answers", || {
        mshare_pool::admin::connect(&socket).is_ok()
    });
}

#[test]
fn vmm_pool_shows_fills_reads_and_removes() {
    let pool = Pool::new();
    let mut a = pool.guest("a", "rw");
    a.agent
        .start_group("w", 1, Some(Map::create("pool/cache", START, LEN)))
        .unwrap();
    let run = |args: &[&str]| vmm_pool(&pool.images, &pool.socket(), args);
    let list = text(&run(&["ls"]));
    assert!(
        list.contains("cache") && list.contains("16 MiB") && list.contains('a'),
        "{list}"
    );

    let file = pool.dir.path().join("data");
    std::fs::write(&file, [0x77; 4096]).unwrap();
    text(&run(&[
        "fill",
        "cache",
        file.to_str().unwrap(),
        "--offset",
        "8192",
    ]));
    assert_eq!(load(&mut a, "w", 8192), 0x7777_7777_7777_7777);
    let read = run(&["read", "cache", "--offset", "8192", "--len", "4096"]);
    assert_eq!(read.stdout, [0x77; 4096]);

    text(&run(&[
        "protect", "cache", "r", "--offset", "0", "--len", "4096",
    ]));
    assert_eq!(try_access(&mut a, "w", 0, true), Some(libc::SIGSEGV));
    let stat = text(&run(&["stat", "cache"]));
    assert!(
        stat.contains("0x100000000000") && stat.contains("guests    a"),
        "{stat}"
    );
    let json = text(&run(&["stat", "--json"]));
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["regions"], 1);

    text(&run(&["rm", "cache"]));
    let gone = run(&["stat", "cache"]);
    assert_eq!(gone.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&gone.stderr).contains("cache"),
        "{gone:?}"
    );
    assert_eq!(
        load(&mut a, "w", 8192),
        0x7777_7777_7777_7777,
        "the attachment stays"
    );
}

#[test]
fn region_made_by_the_host_is_attached_by_guests() {
    let pool = Pool::new();
    mshare_pool::admin::create(&pool.admin, b"host", 0o666, START, LEN).unwrap();
    let mut a = pool.guest("a", "rw");
    let names = a.agent.list_dir("/sys/fs/mshare/pool").unwrap();
    assert_eq!(names, ["host"]);
    let map = Map::attach("pool/host");
    a.agent.once(Op::Map { slot: 0, map }).unwrap();
}
