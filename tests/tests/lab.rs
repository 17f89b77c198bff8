//! The emulated machines themselves: what goes into a lab and comes out, that
//! nothing stays behind, and plain boots. Every test boots a machine, which takes
//! some seconds.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use mshare_tests::initramfs;
use mshare_tests::lab::LabKernel;
use mshare_tests::plain::{Boot, BootError, Booted};

const LAB: &str = env!("CARGO_BIN_EXE_lab");
const PROBE: &str = env!("CARGO_BIN_EXE_lab-probe");

fn lab(options: &[&str], act: &[&str]) -> Command {
    let mut command = Command::new(LAB);
    command
        .arg("run")
        .args(options)
        .arg("--")
        .arg(PROBE)
        .args(act);
    command.stdin(Stdio::null());
    command
}

fn run(options: &[&str], act: &[&str]) -> Output {
    lab(options, act).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Processes whose parent is `parent`.
fn children(parent: u32) -> Vec<u32> {
    let is_child = |stat: &str| {
        // The name, in parentheses, may hold anything: the fields start behind.
        let mut fields = stat.rsplit_once(") ")?.1.split(' ');
        (fields.nth(1)? == parent.to_string()).then_some(())
    };
    fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid| {
            fs::read_to_string(format!("/proc/{pid}/stat"))
                .is_ok_and(|stat| is_child(&stat).is_some())
        })
        .collect()
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < until, "{what}: not within 20 s");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn status_of_the_command_is_the_status_of_the_lab() {
    let output = run(&[], &["exit", "37"]);
    assert_eq!(output.status.code(), Some(37), "{}", text(&output.stderr));
    let said = text(&output.stderr);
    assert!(said.contains("npt and tdp_mmu on"), "{said}");
}

#[test]
fn signal_that_ends_the_command_is_told_as_a_shell_does() {
    assert_eq!(
        run(&[], &["abort"]).status.code(),
        Some(128 + libc::SIGABRT)
    );
}

#[test]
fn streams_pass_byte_for_byte_and_apart() {
    let mut child = lab(&["--stdin", "--quiet"], &["copy"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let sent: Vec<u8> = (0..=u8::MAX).cycle().take(200_000).collect();
    child.stdin.take().unwrap().write_all(&sent).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert!(output.stdout == sent, "standard output differs");
    assert_eq!(text(&output.stderr), "copied\n");
}

#[test]
fn environment_directory_and_order_of_lines_are_kept() {
    let options = ["--env", "WORD=two words", "--cwd", "/tmp/new/place"];
    let output = run(&options, &["show", "WORD", "20000"]);
    let mut wanted = String::from("/tmp/new/place\ntwo words\n");
    for line in 0..20000 {
        wanted.push_str(&format!("line {line}\n"));
    }
    assert!(text(&output.stdout) == wanted, "{}", text(&output.stderr));
}

#[test]
fn files_go_in_and_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let back = dir.path().join("back");
    let out = format!("/tmp/made:{}", back.display());
    let output = run(&["--out", &out], &["bytes", "/tmp/made"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let wanted: Vec<u8> = (0..=u8::MAX).cycle().take(100_000).collect();
    assert!(fs::read(back.join("inner/all")).unwrap() == wanted);

    let output = run(&["--out", &out], &["exit", "0"]);
    assert_eq!(output.status.code(), Some(125));
    let said = text(&output.stderr);
    assert!(said.contains("/tmp/made: No such file"), "{said}");
}

#[test]
fn command_that_is_not_there_is_told_from_one_that_fails() {
    let output = Command::new(LAB)
        .args(["run", "--", "no-such-command"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(127));
    let said = text(&output.stderr);
    assert!(said.contains("cannot start 'no-such-command'"), "{said}");
}

#[test]
fn wrong_call_is_told_from_a_command_that_fails() {
    for (options, wanted) in [
        (&["--out", "/tmp/x"], "--out /tmp/x: give LABPATH:HOST"),
        (&["--env", "X"], "--env X: give NAME=VALUE"),
        (&["--file", "/nowhere/x"], "cannot read /nowhere/x"),
        (&["--memory", "x"], "invalid value 'x'"),
    ] {
        let output = run(options, &["exit", "0"]);
        assert_eq!(output.status.code(), Some(125), "{options:?}");
        let said = text(&output.stderr);
        assert!(said.contains(wanted), "{said}");
    }
}

#[test]
fn process_left_behind_does_not_hold_the_lab_up() {
    let output = run(&["--timeout", "120"], &["orphan"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
}

#[test]
fn time_out_ends_the_lab_and_says_so() {
    let start = Instant::now();
    let output = run(&["--timeout", "12"], &["sleep", "1000"]);
    assert_eq!(output.status.code(), Some(124));
    assert!(start.elapsed() < Duration::from_secs(60));
    let said = text(&output.stderr);
    assert!(said.contains("time-out: not done after 12s"), "{said}");
}

#[test]
fn machine_that_dies_is_told_from_a_command_that_fails() {
    let output = run(&[], &["panic", "last words"]);
    assert_eq!(output.status.code(), Some(125));
    let said = text(&output.stderr);
    assert!(said.contains("the lab died; end of its console"), "{said}");
    assert!(said.contains("sysrq triggered crash"), "{said}");
    assert!(!said.contains("retry"), "{said}");
}

#[test]
fn death_by_the_emulator_is_retried_twice_and_told() {
    let fault = "Kernel panic - not syncing: corrupted stack end detected inside scheduler";
    let output = run(&[], &["panic", fault]);
    assert_eq!(output.status.code(), Some(125));
    let said = text(&output.stderr);
    assert_eq!(said.matches("starting again, retry").count(), 2, "{said}");
    assert_eq!(said.matches(fault).count(), 3, "{said}");
    let verdict = "the lab died of a fault of the emulator";
    assert!(said.contains(verdict), "{said}");
}

#[test]
fn silent_command_is_no_hung_lab() {
    let output = run(&["--silence", "12"], &["sleep", "30"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
}

#[test]
fn hung_lab_is_started_again() {
    let mut child = lab(&["--silence", "10", "--smp", "1"], &["sleep", "6"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut until = |wanted: &str| {
        said.by_ref()
            .map(|line| line.unwrap())
            .find(|line| line.contains(wanted))
            .unwrap_or_else(|| panic!("it never said '{wanted}'"));
    };
    until("npt and tdp_mmu on");
    let emulator = children(child.id())[0];
    // SAFETY: kill takes no pointers; the emulator's parent has not reaped it.
    unsafe { libc::kill(emulator.cast_signed(), libc::SIGSTOP) };
    until("the lab hung: no sign of life for 10s");
    until("starting again, retry 1");
    until("npt and tdp_mmu on");
    assert!(child.wait().unwrap().success());
    assert!(!fs::exists(format!("/proc/{emulator}")).unwrap());
}

#[test]
fn killed_lab_takes_the_emulator_with_it() {
    // Not SIGINT: a shell without job control lets what it starts in the
    // background ignore it, all of these tests too.
    for signal in [libc::SIGKILL, libc::SIGTERM] {
        let mut child = lab(&[], &["sleep", "1000"]).spawn().unwrap();
        let mut emulator = Vec::new();
        wait_until("the emulator starts", || {
            emulator = children(child.id());
            !emulator.is_empty()
        });
        // SAFETY: kill takes no pointers; the child has not been waited for.
        unsafe { libc::kill(child.id().cast_signed(), signal) };
        child.wait().unwrap();
        wait_until("the emulator ends", || {
            !fs::exists(format!("/proc/{}", emulator[0])).unwrap()
        });
    }
}

#[test]
fn guests_come_and_go_without_harm() {
    let output = run(&["--timeout", "300"], &["guests", "2", "50"]);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert_eq!(text(&output.stdout), "100 guests ran\n");
    assert!(!said.contains("starting again"), "{said}");
}

/// Boots the lab's kernel without the lab, the probe being PID 1.
fn plain(act: &str, seconds: u64) -> Result<Booted, BootError> {
    let kernel = LabKernel::find(|_| {}).unwrap();
    let packed = initramfs::build(PROBE.as_ref(), &[]).unwrap();
    let mut boot = Boot::new(kernel.image());
    boot.initramfs = Some(packed.path);
    // With one there is nobody to race with while the kernel patches itself,
    // which the emulator gets wrong now and then.
    boot.cpus = 1;
    boot.timeout = Duration::from_secs(seconds);
    // What follows the dashes becomes the arguments of PID 1.
    boot.append = format!("quiet -- {act}");
    boot.run(|_| {})
}

#[test]
fn plain_boot_tells_the_status_that_the_guest_gives() {
    let by_port = plain("tell 5", 120).unwrap();
    assert_eq!(
        (by_port.status, by_port.panicked),
        (Some(5), false),
        "{}",
        by_port.console
    );
    let by_line = plain("say \"agent: exit 7\"", 120).unwrap();
    assert_eq!(
        (by_line.status, by_line.panicked),
        (Some(7), true),
        "{}",
        by_line.console
    );
    assert!(by_line.console.contains("Attempted to kill init"));
}

#[test]
fn plain_boot_that_does_not_end_is_ended() {
    let error = plain("sleep 1000", 10).unwrap_err();
    assert!(matches!(error, BootError::TimedOut { .. }), "{error}");
}

#[test]
fn initramfs_of_the_same_inputs_is_the_same_file() {
    let files = [(PROBE.into(), "/bin/probe".to_owned())];
    let first = initramfs::build(PROBE.as_ref(), &files).unwrap();
    let before = fs::read(&first.path).unwrap();
    fs::remove_file(&first.path).unwrap();
    let second = initramfs::build(PROBE.as_ref(), &files).unwrap();
    assert_eq!((&second.path, second.up_to_date), (&first.path, false));
    assert!(
        before == fs::read(&second.path).unwrap(),
        "the bytes differ"
    );
    let third = initramfs::build(PROBE.as_ref(), &files).unwrap();
    assert!(third.up_to_date);
}
