//! `vmm agent` and `guest-agent` as a person uses them, on this machine, whose
//! kernel has no mshare. In a guest: `tests/guest/agent.rs`.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A program that cargo has put beside this one. `cargo test --workspace` has
/// built both: their packages have tests that need them.
fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let path = test.parent().unwrap().with_file_name(name);
    assert!(
        path.exists(),
        "no {path:?}: run `cargo build -p {name}` first"
    );
    path
}

/// An agent that serves a socket, ended with the value.
struct Agent {
    child: Child,
    dir: tempfile::TempDir,
}

impl Agent {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut child = Command::new(program("guest-agent"))
            .args(["serve", "--listen"])
            .arg(format!("unix:{}", dir.path().join("agent").display()))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        out.read_line(&mut line).unwrap();
        assert_eq!(line, "agent: ready\n");
        Self { child, dir }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// `vmm agent --direct` with these arguments: status, output, errors.
    fn ask(&self, args: &[&str]) -> (i32, Vec<u8>, String) {
        ask(&self.dir.path().join("agent"), args)
    }

    /// The same, of which the status and a part of what it says are known.
    fn expect(&self, args: &[&str], status: i32, words: &str) -> String {
        let (code, out, err) = self.ask(args);
        let said = format!("{}{err}", String::from_utf8_lossy(&out));
        assert_eq!(code, status, "{args:?}: {said}");
        assert!(said.contains(words), "{args:?}: {said}");
        said
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn ask(socket: &Path, args: &[&str]) -> (i32, Vec<u8>, String) {
    let output = Command::new(program("vmm"))
        .args(["agent", "--direct", "--timeout", "5", "--socket"])
        .arg(socket)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    (
        output.status.code().unwrap(),
        output.stdout,
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

#[test]
fn questions_about_the_machine_are_answered() {
    let agent = Agent::start();
    agent.expect(&["ping"], 0, "mshare    no");
    agent.expect(&["--json", "ping"], 0, "\"mshare\": false");
    agent.expect(&["figures"], 0, "PageTables");
    agent.expect(&["interrupts"], 0, "TLB");
    // Not everybody may read the kernel's log; who may gets lines of it.
    let (status, _, err) = agent.ask(&["dmesg", "-n", "3"]);
    assert!(status == 0 || err.contains("/dev/kmsg"), "{status}: {err}");
    agent.expect(&["call", "\"ListGroups\""], 0, "\"Groups\"");
    agent.expect(&["call", "{}"], 1, "not valid JSON");
    let (status, _, err) = ask(Path::new("/nonexistent/agent"), &["ping"]);
    assert_eq!(status, 1);
    assert!(err.contains("/nonexistent/agent"), "{err}");
}

#[test]
fn commands_pass_output_and_status() {
    let agent = Agent::start();
    let (status, out, err) = agent.ask(&["exec", "sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!((status, out.as_slice()), (7, b"out\n".as_slice()));
    assert_eq!(err, "err\n");
    agent.expect(&["exec", "/nonexistent"], 1, "No such file");
    agent.expect(&["exec", "--limit", "1", "sleep", "60"], 137, "too long");
    agent.expect(&["exec", "guest-agent", "figures"], 0, "MemTotal");
}

#[test]
fn files_come_whole_however_long_they_are() {
    let agent = Agent::start();
    for len in [0, 5, (2 << 20) - 1, 2 << 20, (4 << 20) + 3] {
        let data: Vec<u8> = (0..len).map(|i: u32| (i % 251).to_le_bytes()[0]).collect();
        std::fs::write(agent.path("file"), &data).unwrap();
        let (status, out, err) = agent.ask(&["cat", &agent.path("file")]);
        assert_eq!(status, 0, "{err}");
        assert!(out == data, "{} of {len} bytes", out.len());
    }
    agent.expect(&["cat", &agent.path("none")], 1, "No such file");
    agent.expect(&["ls", &agent.path("")], 0, "agent\nfile\n");
    agent.expect(&["ls", &agent.path("none")], 1, "No such file");
}

#[test]
fn calls_that_this_kernel_does_not_have_are_refused() {
    let agent = Agent::start();
    let enosys = "Function not implemented";
    let create = ["create", "r", "--address", "1G", "--len", "2M"];
    agent.expect(&[&["mshare"], create.as_slice()].concat(), 1, enosys);
    agent.expect(&["mshare", "unlink", "r"], 1, enosys);
    let protect = ["mshare", "protect", "r", "--len", "4K", "--prot", "r"];
    agent.expect(&protect, 1, "No such file");
    agent.expect(
        &["mshare", "discard", "r", "--len", "4K"],
        1,
        "No such file",
    );
    agent.expect(&["mshare", "info", "r"], 1, "No such file");
    for power in ["poweroff", "reboot", "crash"] {
        agent.expect(&[power], 1, "--allow-power");
    }
}

#[test]
fn group_works_on_memory_spins_and_ends() {
    let agent = Agent::start();
    // A region is not to be had here: a file takes its place.
    let map = format!(
        r#"{{"StartGroup": {{"group": "g", "processes": 2, "pin": [], "map":
           {{"File": {{"path": "{}", "addr": 0, "len": 65536, "write": true}}}}}}}}"#,
        agent.path("data")
    );
    agent.expect(&["call", &map], 0, "Mapped");
    agent.expect(&["group", "list"], 0, "g [");
    agent.expect(&["group", "zero", "g"], 0, "8192 words, all right");
    agent.expect(
        &["group", "fill", "g", "--process", "0", "--seed", "3"],
        0,
        "done",
    );
    agent.expect(&["group", "verify", "g", "--seed", "3"], 0, "all right");
    agent.expect(&["group", "verify", "g", "--seed", "4"], 1, "wrong");
    agent.expect(&["group", "zero", "g"], 1, "wrong");
    agent.expect(&["group", "touch", "g", "--write"], 0, "16 accesses");
    agent.expect(
        &["group", "touch", "g", "--offset", "1"],
        1,
        "multiples of 8",
    );

    agent.expect(&["group", "spin-status", "g"], 1, "no spinner");
    agent.expect(
        &["group", "spin", "write", "g", "--offset", "32K"],
        0,
        "done",
    );
    agent.expect(&["group", "spin", "read", "g"], 1, "stop it first");
    let said = agent.expect(&["group", "spin-status", "g"], 0, "spinning after");
    assert_eq!(said.matches("spinning after").count(), 2, "{said}");
    let said = agent.expect(
        &["group", "spin-stop", "g", "--process", "1"],
        0,
        "stopped after",
    );
    assert_eq!(said.lines().count(), 1, "{said}");
    // The file becomes shorter: what is mapped behind its end is gone.
    let file = std::fs::File::options()
        .write(true)
        .open(agent.path("data"));
    file.unwrap().set_len(4096).unwrap();
    let gone = || agent.ask(&["group", "spin-status", "g", "--process", "0"]);
    let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while gone().0 == 0 && std::time::Instant::now() < until {}
    agent.expect(
        &["group", "spin-stop", "g", "--process", "0"],
        1,
        "by signal 7",
    );

    agent.expect(&["group", "stop", "g"], 0, "exited with 0");
    agent.expect(&["group", "stop", "g"], 1, "no group");
    let start = ["group", "start", "h", "--region", "r", "-n", "2"];
    agent.expect(&start, 1, "Function not implemented");
    agent.expect(&["group", "kill", "h"], 0, "ended by signal 9");
    let (status, out, _) = agent.ask(&["group", "list"]);
    assert_eq!((status, out), (0, vec![]));
}
