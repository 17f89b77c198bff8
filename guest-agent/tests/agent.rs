//! The agent on this machine, over a unix socket. The kernel here has no
//! mshare; everything else is the same as in a guest.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "in helpers of tests, where clippy.toml does not reach"
)]

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use mshare_protocol::agent::{
    BadCall, Exec, Failure, Map, MemOp, O_RDWR, Op, OpError, Outcome, PathOp, Probe, RegionOp,
    Reply, Request, Response, Run, Spin, SpinKind, StartGroup, VERSION, Value, pattern_word,
};
use mshare_protocol::frame;

const LEN: u64 = 2 << 20;

/// An agent process, ended with the value.
struct Agent {
    child: Child,
    dir: tempfile::TempDir,
}

impl Agent {
    fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap())
    }

    fn start_in(dir: tempfile::TempDir) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_guest-agent"))
            .arg("serve")
            .arg("--listen")
            .arg(format!("unix:{}", dir.path().join("agent").display()))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert_eq!(line, "agent: ready\n");
        Self { child, dir }
    }

    fn connect(&self) -> Client {
        Client(UnixStream::connect(self.dir.path().join("agent")).unwrap())
    }

    fn file(&self) -> Map {
        Map::File {
            path: self.dir.path().join("data").display().to_string(),
            addr: 0,
            len: LEN,
            write: true,
        }
    }

    /// A client with a group `g` of `processes` that all map one file.
    fn group(&self, processes: u32) -> Client {
        let mut client = self.connect();
        for value in client.start(processes, Some(self.file())) {
            assert!(matches!(value, Ok(Value::Mapped { len: LEN, .. })));
        }
        client
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

struct Client(UnixStream);

impl Client {
    fn call(&mut self, request: &Request) -> Response {
        frame::send(&mut self.0, request).unwrap();
        frame::receive(&mut self.0).unwrap()
    }

    fn outcomes(&mut self, request: &Request) -> Vec<Result<Value, OpError>> {
        match self.call(request) {
            Ok(Reply::Outcomes(outcomes)) => outcomes.into_iter().map(|o| o.result).collect(),
            other => panic!("{other:?}"),
        }
    }

    fn start(&mut self, processes: u32, map: Option<Map>) -> Vec<Result<Value, OpError>> {
        self.outcomes(&Request::StartGroup(StartGroup {
            group: "g".into(),
            processes,
            map,
            pin: vec![0],
        }))
    }

    fn run(&mut self, process: Option<u32>, op: Op) -> Vec<Result<Value, OpError>> {
        self.outcomes(&Request::Run(Run {
            group: "g".into(),
            process,
            op,
            timeout_ms: 0,
        }))
    }

    fn one(&mut self, process: u32, op: Op) -> Result<Value, OpError> {
        self.run(Some(process), op).remove(0)
    }

    fn once(&mut self, op: Op) -> Result<Value, OpError> {
        self.outcomes(&Request::Once(op)).remove(0)
    }

    fn spin(&mut self, op: Op) -> Spin {
        match self.one(0, op) {
            Ok(Value::Spin(spin)) => spin,
            other => panic!("{other:?}"),
        }
    }

    fn probe(&mut self, offset: u64, probe: Probe) -> (i64, i32, u64) {
        match self.one(0, Op::mem(offset, MemOp::Probe(probe))) {
            Ok(Value::Probe(p)) => (p.ret, p.errno, p.extra),
            other => panic!("{other:?}"),
        }
    }

    fn exec(&mut self, argv: &[&str], timeout_ms: u32) -> Result<Reply, Failure> {
        self.call(&Request::Exec(Exec {
            argv: argv.iter().map(|&s| s.into()).collect(),
            stdin: b"hello\n".to_vec(),
            timeout_ms,
        }))
    }
}

fn errno(result: Result<Value, OpError>) -> i32 {
    match result {
        Err(OpError::Failed(failure)) => failure.errno,
        other => panic!("{other:?}"),
    }
}

#[test]
fn info_tells_version_and_absence_of_mshare() {
    let agent = Agent::start();
    let Ok(Reply::Info(info)) = agent.connect().call(&Request::Info) else {
        panic!()
    };
    assert_eq!((info.version, info.init), (VERSION, false));
    assert!(!info.mshare && !info.pool && info.cpus > 0 && info.monotonic_ns > 0);
}

#[test]
fn mshare_calls_without_kernel_support_are_enosys() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let map = Map::create("a", 1 << 40, LEN);
    assert_eq!(errno(client.once(Op::Map { slot: 0, map })), libc::ENOSYS);
    let unlink = RegionOp::Unlink { name: "a".into() };
    assert_eq!(errno(client.once(Op::Region(unlink))), libc::ENOSYS);
    for call in [BadCall::MshareName, BadCall::UnlinkName] {
        assert_eq!(errno(client.once(Op::BadCall(call))), libc::ENOSYS);
    }
    // There is no file system to open a region's file in.
    let info = RegionOp::Info { name: "a".into() };
    assert_eq!(errno(client.once(Op::Region(info))), libc::ENOENT);
    let mut outcomes = client.start(2, Some(Map::mshare("a", 0, 0, O_RDWR)));
    assert_eq!(errno(outcomes.remove(1)), libc::ENOSYS);
    assert_eq!(client.one(0, Op::Sleep { ms: 1 }), Ok(Value::Done));
}

#[test]
fn pattern_written_by_one_process_is_verified_by_all() {
    let agent = Agent::start();
    let mut client = agent.group(3);
    let fill = MemOp::Fill {
        len: LEN / 2,
        seed: 7,
    };
    assert_eq!(client.one(1, Op::mem(4096, fill)), Ok(Value::Done));
    let verify = |seed| Op::mem(4096, MemOp::Verify { len: LEN / 2, seed });
    for value in client.run(None, verify(7)) {
        let Ok(Value::Verified(seen)) = value else {
            panic!()
        };
        assert_eq!((seen.words, seen.bad, seen.first_bad), (LEN / 16, 0, None));
    }
    let Ok(Value::Verified(seen)) = client.one(0, verify(8)) else {
        panic!()
    };
    assert_eq!((seen.bad, seen.first_bad), (LEN / 16, Some(4096)));
    let Ok(Value::Verified(seen)) = client.one(2, Op::mem(0, MemOp::VerifyZero { len: 0 })) else {
        panic!()
    };
    assert_eq!((seen.words, seen.first_bad), (LEN / 8, Some(4096)));
    let word = client.one(2, Op::mem(8192, MemOp::Load));
    assert_eq!(word, Ok(Value::Word(pattern_word(7, 8192))));
}

#[test]
fn touch_counts_accesses_and_faults_and_keeps_contents() {
    let agent = Agent::start();
    let mut client = agent.group(1);
    let store = MemOp::Store { value: 5 };
    client.one(0, Op::mem(4096, store)).unwrap();
    let touch = MemOp::Touch {
        len: 0,
        stride: 4096,
        write: true,
    };
    let Ok(Value::Touched(touched)) = client.one(0, Op::mem(0, touch)) else {
        panic!()
    };
    assert_eq!(touched.accesses, LEN / 4096);
    assert!(touched.minflt > 0 && touched.elapsed_ns > 0);
    assert_eq!(
        client.one(0, Op::mem(4096, MemOp::Load)),
        Ok(Value::Word(5))
    );
}

#[test]
fn faults_are_reported_and_survived() {
    let agent = Agent::start();
    let mut client = agent.group(1);
    let len = 4096;
    let prot = libc::PROT_READ;
    assert_eq!(client.probe(0, Probe::Mprotect { len, prot }).0, 0);
    let attempt = |write| Op::mem(8, MemOp::Try { write });
    assert_eq!(client.one(0, attempt(false)), Ok(Value::Access(None)));
    let Ok(Value::Access(Some(fault))) = client.one(0, attempt(true)) else {
        panic!()
    };
    assert_eq!((fault.signal, fault.code), (libc::SIGSEGV, 2));
    let Err(OpError::Fault(same)) = client.one(0, Op::mem(8, MemOp::Store { value: 1 })) else {
        panic!()
    };
    assert_eq!(same, fault);
    assert_eq!(client.probe(0, Probe::ForkWrite { value: 1 }).0, 128 + 11);
    // Past the end of the file.
    let truncate = Op::Path {
        path: agent.dir.path().join("data").display().to_string(),
        op: PathOp::Truncate { len: 4096 },
    };
    assert_eq!(client.one(0, truncate), Ok(Value::Ret(0)));
    let verify = MemOp::VerifyZero { len: 0 };
    let Err(OpError::Fault(fault)) = client.one(0, Op::mem(0, verify)) else {
        panic!()
    };
    assert_eq!((fault.signal, fault.code), (libc::SIGBUS, 2));
    // Outside the slot nothing is tried at all.
    let Err(OpError::Failed(_)) = client.one(0, Op::mem(LEN, MemOp::Load)) else {
        panic!()
    };
}

#[test]
fn spinner_sees_changes_and_reports_the_fault_that_ends_it() {
    let agent = Agent::start();
    let mut client = agent.group(2);
    let spin = Op::mem(0, MemOp::Spin(SpinKind::Read));
    assert_eq!(client.one(0, spin.clone()), Ok(Value::Done));
    assert!(client.one(0, spin).is_err());
    thread::sleep(Duration::from_millis(20));
    client
        .one(1, Op::mem(0, MemOp::Store { value: 9 }))
        .unwrap();
    thread::sleep(Duration::from_millis(20));
    let report = client.spin(Op::SpinStatus);
    assert!(report.running && report.iterations > 100);
    assert_eq!((report.last_value, report.changes), (9, 1));
    assert!(report.now_ns - report.last_ok_ns < 1_000_000_000);
    let prot = libc::PROT_NONE;
    client.probe(0, Probe::Mprotect { len: 4096, prot });
    thread::sleep(Duration::from_millis(50));
    let report = client.spin(Op::SpinStatus);
    assert_eq!(report.fault.unwrap().signal, libc::SIGSEGV);
    assert!(report.now_ns - report.last_ok_ns >= 40_000_000);
    assert!(!client.spin(Op::SpinStop).running);
    assert!(client.one(0, Op::SpinStop).is_err());
}

#[test]
fn writing_spinner_leaves_its_count() {
    let agent = Agent::start();
    let mut client = agent.group(1);
    client
        .one(0, Op::mem(64, MemOp::Spin(SpinKind::Write)))
        .unwrap();
    thread::sleep(Duration::from_millis(10));
    let report = client.spin(Op::SpinStop);
    let word = client.one(0, Op::mem(64, MemOp::Load));
    assert_eq!(word, Ok(Value::Word(report.iterations)));
}

#[test]
fn probes_report_what_the_kernel_returned() {
    let agent = Agent::start();
    let mut client = agent.group(1);
    let path = "/proc/self/exe".to_owned();
    client
        .one(0, Op::mem(0, MemOp::Store { value: 0 }))
        .unwrap();
    let read = client.probe(0, Probe::Pread { path, len: 4096 });
    assert_eq!(read, (4096, 0, 0));
    let word = client.one(0, Op::mem(0, MemOp::Load)).unwrap();
    assert!(matches!(word, Value::Word(w) if w.to_le_bytes().starts_with(b"\x7fELF")));
    assert_eq!(client.probe(0, Probe::VmRead { len: 64 }), (64, 0, 0x7f));
    assert_eq!(client.probe(0, Probe::VmWrite { len: 64 }).0, 64);
    let forked = client.probe(0, Probe::ForkRead);
    assert_eq!(forked, (0, 0, 0xa5a5_a5a5_a5a5_a5a5));
    assert_eq!(client.probe(0, Probe::ForkWrite { value: 3 }), (0, 0, 3));
    assert_eq!(client.probe(0, Probe::FutexWake { private: false }).0, 0);
    let wait = client.probe(0, Probe::FutexWait { private: false });
    assert_eq!(wait, (-1, libc::ETIMEDOUT, 0));
    let advice = 12345;
    let bad = client.probe(0, Probe::Madvise { len: 4096, advice });
    assert_eq!(bad, (-1, libc::EINVAL, 0));
    assert_eq!(client.probe(0, Probe::Mincore), (0, 0, 1));
    assert_eq!(client.probe(8, Probe::Mincore).1, libc::EINVAL);
    assert_eq!(client.probe(4096, Probe::MmapFixed { len: 4096 }).1, 0);
    assert_eq!(client.probe(4096, Probe::Munmap { len: 4096 }).0, 0);
    assert_eq!(
        client.one(0, Op::mem(0, MemOp::Load)),
        Ok(Value::Word(3)),
        "the rest of the mapping is unhurt"
    );
}

#[test]
fn groups_end_as_asked_and_their_death_is_noticed() {
    let agent = Agent::start();
    let mut client = agent.group(2);
    let again = client.call(&Request::StartGroup(StartGroup {
        group: "g".into(),
        processes: 1,
        map: None,
        pin: vec![],
    }));
    assert_eq!(again.unwrap_err().errno, libc::EEXIST);
    let (group, process) = ("g".to_owned(), Some(0));
    let killed = client.outcomes(&Request::KillGroup { group, process });
    assert_eq!(killed, [Ok(Value::Signalled(9))]);
    let outcomes = client.run(None, Op::mem(0, MemOp::Load));
    assert!(matches!(outcomes[0], Err(OpError::Gone(_))));
    assert_eq!(outcomes[1], Ok(Value::Word(0)));
    let stopped = client.outcomes(&Request::StopGroup { group: "g".into() });
    assert_eq!(stopped[1], Ok(Value::Exited(0)));
    let gone = client.call(&Request::StopGroup { group: "g".into() });
    assert_eq!(gone.unwrap_err().errno, libc::ENOENT);
}

#[test]
fn operation_over_its_time_is_killed() {
    let agent = Agent::start();
    let mut client = agent.group(1);
    let outcomes = client.outcomes(&Request::Run(Run {
        group: "g".into(),
        process: None,
        op: Op::Sleep { ms: 30_000 },
        timeout_ms: 50,
    }));
    assert!(matches!(&outcomes[0], Err(OpError::Gone(why)) if why.contains("in time")));
}

#[test]
fn figures_name_every_worker() {
    let agent = Agent::start();
    let mut client = agent.group(2);
    let Ok(Reply::Figures(figures)) = client.call(&Request::Figures) else {
        panic!()
    };
    assert!(figures.meminfo["PageTables"] > 0);
    assert_eq!(figures.processes.len(), 2);
    assert!(
        figures
            .processes
            .iter()
            .all(|p| p.vm_pte_kib > 0 && p.minflt > 0)
    );
}

#[test]
fn commands_return_status_and_output_and_are_limited() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let script = "cat; echo bad >&2; exit 3";
    let Ok(Reply::Exec(result)) = client.exec(&["sh", "-c", script], 0) else {
        panic!()
    };
    assert_eq!((result.status, result.truncated), (3, false));
    assert_eq!(
        (result.stdout.as_slice(), result.stderr.as_slice()),
        (b"hello\n".as_slice(), b"bad\n".as_slice())
    );
    let Ok(Reply::Exec(result)) = client.exec(&["sh", "-c", "sleep 30 & wait"], 50) else {
        panic!()
    };
    assert!(result.timed_out && result.status == 128 + 9);
    let Ok(Reply::Exec(result)) = client.exec(&["head", "-c", "5000000", "/dev/zero"], 0) else {
        panic!()
    };
    assert!(result.truncated && result.stdout.len() == 1 << 20);
    let missing = client.exec(&["/nonexistent"], 0);
    assert_eq!(missing.unwrap_err().errno, libc::ENOENT);
    let Ok(Reply::Exec(result)) = client.exec(&["guest-agent", "figures", "--json"], 0) else {
        panic!()
    };
    assert!(result.stdout.starts_with(b"{"));
}

#[test]
fn files_are_read_written_and_listed() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let path = agent.dir.path().join("f").display().to_string();
    let data = b"words".to_vec();
    let write = Request::WriteFile {
        path: path.clone(),
        data,
    };
    assert_eq!(client.call(&write), Ok(Reply::Done));
    for (offset, max, piece) in [(0, 4, "word"), (3, 9, "ds"), (5, 9, ""), (9, 9, "")] {
        let read = Request::ReadFile {
            path: path.clone(),
            offset,
            max,
        };
        assert_eq!(client.call(&read), Ok(Reply::Bytes(piece.into())));
    }
    let path = agent.dir.path().display().to_string();
    let names = client.call(&Request::ListDir { path });
    assert_eq!(names, Ok(Reply::Names(vec!["agent".into(), "f".into()])));
}

/// `guest-agent` with these arguments: its status and what it says.
fn by_hand(args: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_guest-agent"))
        .args(args)
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    (
        output.status.code(),
        String::from_utf8_lossy(&said).into_owned(),
    )
}

#[test]
fn socket_that_lives_and_files_are_not_taken_and_a_dead_socket_is() {
    let agent = Agent::start();
    let path = |name: &str| agent.dir.path().join(name);
    let serve = |name: &str| {
        let listen = format!("unix:{}", path(name).display());
        by_hand(&["serve", "--listen", &listen])
    };
    let (status, said) = serve("agent");
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains("another process does"), "{said}");
    std::fs::write(path("file"), "precious").unwrap();
    let (status, said) = serve("file");
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains("not a socket"), "{said}");
    assert_eq!(std::fs::read(path("file")).unwrap(), b"precious");
    // The first agent still answers at its socket.
    assert!(agent.connect().call(&Request::Info).is_ok());

    let dir = tempfile::tempdir().unwrap();
    drop(std::os::unix::net::UnixListener::bind(dir.path().join("agent")).unwrap());
    assert!(Agent::start_in(dir).connect().call(&Request::Info).is_ok());
}

#[test]
fn work_by_hand_spins_until_it_is_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("data").display().to_string();
    let work = |ro: &[&str], steps: &str| {
        let mut args = vec!["work", &file, "--file", "--len", "8K", "-n", "2"];
        args.extend(["--hold", "1"]);
        args.extend(ro);
        args.extend(steps.split(' '));
        by_hand(&args)
    };
    let (status, said) = work(&[], "spin-write hold status stop read");
    assert_eq!(status, Some(0), "{said}");
    let count = |words: &str| said.matches(words).count();
    assert_eq!(count("spinning after"), 2, "{said}");
    assert_eq!(count("stopped after"), 2, "{said}");
    assert_eq!(count(" after 0 accesses"), 0, "{said}");
    // Written last, so it is read by all.
    let word = std::fs::read(&file).unwrap();
    assert_ne!(word[..8], [0; 8]);
    let (status, said) = work(&[], "spin-read hold stop");
    assert_eq!(status, Some(0), "{said}");
    // Nobody may write: a fault is a finding.
    let (status, said) = work(&["--ro"], "spin-write hold stop");
    assert_eq!(status, Some(1), "{said}");
    assert_eq!(said.matches("by signal 11").count(), 2, "{said}");
}

#[test]
fn program_after_exec_has_nothing_of_the_mapping() {
    let agent = Agent::start();
    let mut client = agent.group(1);
    assert_eq!(client.probe(0, Probe::ForkRead).0, 0);
    let signal = i64::from(128 + libc::SIGSEGV);
    assert_eq!(client.probe(0, Probe::ForkExec).0, signal);
}

#[test]
fn panic_ends_a_request_only() {
    let agent = Agent::start();
    let mut client = agent.group(1);
    assert!(client.call(&Request::Panic).is_err());
    assert_eq!(client.one(0, Op::Sleep { ms: 0 }), Ok(Value::Done));
}

#[test]
fn power_is_not_switched_without_leave() {
    let agent = Agent::start();
    for request in [Request::PowerOff, Request::Reboot, Request::Crash] {
        let refused = agent.connect().call(&request);
        assert_eq!(refused.unwrap_err().errno, libc::EPERM);
    }
}

#[test]
fn workers_and_commands_leave_no_zombies() {
    let agent = Agent::start();
    let mut client = agent.connect();
    for _ in 0..20 {
        client.once(Op::Sleep { ms: 0 }).unwrap();
    }
    client.exec(&["true"], 0).unwrap();
    let parent = format!(" Z {} ", agent.child.id());
    let zombies = std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| std::fs::read_to_string(entry.unwrap().path().join("stat")).ok())
        .filter(|stat| stat.contains(&parent));
    assert_eq!(zombies.count(), 0);
}

#[test]
fn connections_work_at_the_same_time() {
    let agent = Agent::start();
    let _group = agent.group(2);
    thread::scope(|scope| {
        for process in 0..2 {
            let mut client = agent.connect();
            scope.spawn(move || {
                for _ in 0..50 {
                    let outcome = client.one(process, Op::mem(0, MemOp::Load));
                    assert_eq!(outcome, Ok(Value::Word(0)));
                }
            });
        }
    });
}

/// Outcomes are what people read too.
#[test]
fn outcome_reads_well() {
    let outcome = Outcome {
        process: 1,
        pid: 42,
        result: Ok(Value::Exited(0)),
    };
    assert_eq!(outcome.to_string(), "process 1 (pid 42): exited with 0");
}
