//! The program as a user meets it: messages and exit statuses of the `vmm`
//! binary, as far as they do not depend on what the host can run.

// The helpers of the tests are tests as well.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

fn vmm(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vmm"))
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// Runs `vmm`; checks the status and that the message holds each text.
fn fails(args: &[&str], status: i32, texts: &[&str]) {
    let output = vmm(args);
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{args:?}: {message}");
    for text in texts {
        assert!(
            message.contains(text),
            "{args:?}: no {text:?} in: {message}"
        );
    }
}

#[test]
fn help_lists_the_exit_statuses_and_keys() {
    let output = vmm(&["--help"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success());
    for expected in ["--kernel", "16  the guest rebooted", "Ctrl-A x"] {
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn wrong_command_lines_are_usage_errors() {
    fails(&[], 2, &["--kernel"]);
    fails(&["--kernel"], 2, &["--kernel"]);
    fails(&["--nonsense"], 2, &["--nonsense"]);
    fails(&["--kernel", "k", "--memory", "lots"], 2, &["lots", "512M"]);
    fails(&["--kernel", "k", "--disk", ""], 2, &["PATH"]);
    fails(
        &["--kernel", "k", "--vsock", "3"],
        2,
        &["cid=N,path=SOCKET"],
    );
    fails(&["--kernel", "k", "--console", "x"], 2, &["stdio"]);
}

#[test]
fn impossible_guests_are_usage_errors() {
    fails(
        &["--kernel", "k", "--cpus", "0"],
        2,
        &["0 vCPUs", "1 to 32"],
    );
    fails(
        &["--kernel", "k", "--cpus", "33"],
        2,
        &["33 vCPUs", "1 to 32"],
    );
    fails(&["--kernel", "k", "--memory", "0"], 2, &["0 bytes"]);
    fails(&["--kernel", "k", "--memory", "3M"], 2, &["2 MiB"]);
    fails(&["--kernel", "k", "--memory", "1000T"], 2, &["255 GiB"]);
}

#[test]
fn bad_files_are_named() {
    fails(
        &["--kernel", "/nonexistent"],
        1,
        &["/nonexistent", "No such file"],
    );
    fails(&["--kernel", "/proc/self"], 1, &["/proc/self", "directory"]);
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let empty = file("empty", b"");
    fails(&["--kernel", &empty], 1, &[&empty, "is empty"]);
    let text = file("text", b"hello\n");
    fails(&["--kernel", &text], 1, &[&text, "it is text"]);
    let elf = file("elf", b"\x7fELF\x02\x01\x01");
    fails(&["--kernel", &elf], 1, &[&elf, "truncated"]);
}

/// A kernel that passes every check.
fn kernel(dir: &Path) -> String {
    let mut image = vec![0_u8; 2048];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1f4, &64_u32.to_le_bytes());
    put(0x1fe, &0xaa55_u16.to_le_bytes());
    put(0x202, b"HdrS");
    put(0x206, &0x020f_u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x236, &1_u16.to_le_bytes());
    put(0x258, &0x100_0000_u64.to_le_bytes());
    put(0x260, &0x20_0000_u32.to_le_bytes());
    let path = dir.join("bzImage");
    std::fs::write(&path, image).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn run_ends_within_a_second_or_so_where_guests_cannot_run() {
    if vmm(&["doctor"]).status.code() != Some(21) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let start = Instant::now();
    fails(
        &["--kernel", &kernel(dir.path())],
        1,
        &["this host cannot run the guest"],
    );
    assert!(start.elapsed() < Duration::from_millis(1500));
}

#[test]
fn doctor_gives_verdicts_as_text_and_json() {
    let text = vmm(&["doctor"]);
    assert!(matches!(text.status.code(), Some(0 | 20 | 21)));
    let lines = String::from_utf8_lossy(&text.stdout).into_owned();
    let last = lines.lines().last().unwrap();
    assert!(last.contains("can boot Linux guests: "), "{last}");
    assert!(lines.lines().count() <= 25, "one screen: {lines}");
    let json = vmm(&["doctor", "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert!(report["can_boot_linux"].is_boolean());
    assert!(report["shared_tables"].is_boolean());
    assert_eq!(json.status.code(), text.status.code());
}
