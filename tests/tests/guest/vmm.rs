//! The VMM as a user meets it: boots, ends, devices, bad input.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use mshare_protocol::agent::Exec;
use mshare_tests::guests::{Guest, Images, Options};
use rustix::termios::{LocalModes, tcgetattr};

use crate::common::*;

const LIMIT: Duration = Duration::from_secs(60);

fn boot(options: &Options) -> (tempfile::TempDir, Guest) {
    let dir = tempfile::tempdir().unwrap();
    let guest = Guest::start(&Images::from_env().unwrap(), dir.path(), options).unwrap();
    (dir, guest)
}

#[test]
fn guest_sees_the_vcpus_it_was_given() {
    for cpus in [1, 2, 8, 32] {
        let mut options = Options::new("g").cpus(cpus);
        // In the lab one emulated CPU runs all 32.
        options.boot_limit *= 4;
        let begun = Instant::now();
        let (_dir, mut guest) = boot(&options);
        println!("{cpus} vCPUs: {:.1} s", begun.elapsed().as_secs_f64());
        assert_eq!(guest.agent.info().unwrap().cpus, cpus);
        assert_quiet(&mut guest);
    }
}

#[test]
fn guest_has_the_memory_it_was_given() {
    // Of 4 GiB one lies above the devices, in a memslot of its own.
    for (mib, ranges) in [(128, 0), (4096, 1)] {
        let mut options = Options::new("g");
        options.memory_mib = mib;
        let (_dir, mut guest) = boot(&options);
        let total = guest.agent.figures().unwrap().meminfo["MemTotal"];
        let given = u64::from(mib) << 10;
        // Linux keeps its image and 1.6 % of the rest, for its page structures.
        assert!(
            total < given && total > given - given / 32 - (48 << 10),
            "{total} KiB of {given}"
        );
        let iomem = guest.agent.read_file("/proc/iomem").unwrap();
        let iomem = String::from_utf8(iomem).unwrap();
        let high = |line: &&str| line.starts_with("100000000-") && line.ends_with("System RAM");
        assert_eq!(iomem.lines().filter(high).count(), ranges, "{iomem}");
        assert_quiet(&mut guest);
    }
}

#[test]
fn power_off_reboot_and_panic_end_with_their_status() {
    let (_dir, mut guest) = boot(&Options::new("g"));
    guest.agent.power_off().unwrap();
    assert_eq!(guest.process.wait(LIMIT).unwrap().code(), Some(0));
    let (_dir, mut guest) = boot(&Options::new("g"));
    guest.agent.reboot().unwrap();
    assert_eq!(guest.process.wait(LIMIT).unwrap().code(), Some(16));
    let (_dir, mut guest) = boot(&Options::new("g"));
    guest.agent.crash().unwrap();
    assert_eq!(guest.process.wait(LIMIT).unwrap().code(), Some(17));
    assert!(
        guest.process.output().contains("Kernel panic"),
        "{}",
        guest.process.output()
    );
}

#[test]
fn elf_kernel_boots_like_a_bzimage() {
    let mut images = Images::from_env().unwrap();
    let vmlinux = std::env::var_os("MSHARE_VMLINUX").expect("MSHARE_VMLINUX is set");
    images.kernel = vmlinux.into();
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Guest::start(&images, dir.path(), &Options::new("g")).unwrap();
    assert!(guest.agent.info().unwrap().release.starts_with("6.12"));
}

#[test]
fn disks_are_read_and_written_unless_read_only() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("rw"), vec![1; 1 << 20]).unwrap();
    std::fs::write(path("ro"), vec![2; 1 << 20]).unwrap();
    let mut options = Options::new("g");
    options.args = vec![
        "--disk".into(),
        path("rw").into(),
        "--disk".into(),
        format!("{},ro", path("ro").display()).into(),
        "--rng".into(),
    ];
    let mut guest = Guest::start(&Images::from_env().unwrap(), dir.path(), &options).unwrap();
    assert_eq!(guest.agent.read_file("/dev/vdb").unwrap()[..16], [2; 16]);
    let mut disk = guest.agent.read_file("/dev/vda").unwrap();
    assert_eq!((disk.len(), disk[4096]), (1 << 20, 1));
    disk[4096] = 9;
    guest.agent.write_file("/dev/vda", &disk).unwrap();
    assert!(guest.agent.write_file("/dev/vdb", &disk).is_err());
    let mut random = || guest.agent.read_piece("/dev/hwrng", 0, 32).unwrap();
    let (first, second) = (random(), random());
    assert_eq!((first.len(), second.len()), (32, 32));
    assert_ne!(first, second, "the host's random numbers");
    assert_ne!(first, [0; 32]);
    guest.agent.power_off().unwrap();
    assert!(guest.process.wait(LIMIT).unwrap().success());
    assert_eq!(std::fs::read(path("rw")).unwrap()[4096], 9);
    assert_eq!(std::fs::read(path("ro")).unwrap(), vec![2; 1 << 20]);
}

#[test]
fn vsock_carries_bulk_data_both_ways() {
    let (_dir, mut guest) = boot(&Options::new("g"));
    let data: Vec<u8> = (0..1_500_000_u32)
        .map(|i| (i % 253).to_le_bytes()[0])
        .collect();
    guest.agent.write_file("/tmp/data", &data).unwrap();
    assert!(guest.agent.read_file("/tmp/data").unwrap() == data);
}

#[test]
fn guest_connects_to_a_program_of_the_host() {
    let (dir, mut guest) = boot(&Options::new("g"));
    let mut path = guest.vsock.clone().into_os_string();
    path.push("_4242");
    let listener = std::os::unix::net::UnixListener::bind(path).unwrap();
    let echo = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut said = Vec::new();
        // Up to the end that the guest announces.
        stream.read_to_end(&mut said).unwrap();
        said.reverse();
        stream.write_all(&said).unwrap();
    });
    let mut connect = |port: &str, stdin: Vec<u8>| {
        let argv = ["guest-agent", "connect", port].map(str::to_owned).into();
        let exec = Exec {
            argv,
            stdin,
            ..Exec::default()
        };
        guest.agent.exec_with(exec).unwrap()
    };
    let mut data: Vec<u8> = (0..500_000_u32)
        .map(|i| (i % 253).to_le_bytes()[0])
        .collect();
    let result = connect("4242", data.clone());
    let said = String::from_utf8_lossy(&result.stderr);
    assert_eq!(result.status, 0, "{said}");
    data.reverse();
    assert!(result.stdout == data, "{} bytes", result.stdout.len());
    echo.join().unwrap();
    // Nobody listens there.
    let refused = connect("4243", vec![]);
    assert_eq!(refused.status, 1);
    assert_quiet(&mut guest);
    drop(dir);
}

/// A new pseudo-terminal: the person's end and the program's end.
fn pty() -> (File, OwnedFd) {
    let pair = rustix_openpty::openpty(None, None).unwrap();
    (pair.controller.into(), pair.user)
}

/// Reads from the console until `words` have come.
fn read_until(console: &mut File, words: &str) {
    let mut seen = Vec::new();
    let mut buffer = [0; 4096];
    while !String::from_utf8_lossy(&seen).contains(words) {
        let n = console.read(&mut buffer).unwrap();
        assert_ne!(n, 0, "{}", String::from_utf8_lossy(&seen));
        seen.extend_from_slice(&buffer[..n]);
    }
}

#[test]
fn console_takes_typed_input_ends_by_key_and_leaves_the_terminal_as_it_was() {
    let images = Images::from_env().unwrap();
    let (mut person, program) = pty();
    let local = || tcgetattr(&program).unwrap().local_modes;
    let before = local();
    let mut command = Command::new(&images.vmm);
    // As a login would: the terminal is the child's own.
    // SAFETY: both calls may be made between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::setsid();
            libc::ioctl(libc::STDIN_FILENO, libc::TIOCSCTTY, 0);
            Ok(())
        });
    }
    command
        .arg("--kernel")
        .arg(&images.kernel)
        .arg("--initrd")
        .arg(&images.initrd)
        .args(["--memory", "256M"])
        .stdin(program.try_clone().unwrap())
        .stdout(program.try_clone().unwrap());
    let mut child = command.spawn().unwrap();
    read_until(&mut person, "agent: ready");
    assert!(!local().contains(LocalModes::ECHO), "not in raw mode");
    person.write_all(b"typed by a person\r").unwrap();
    // The guest's terminal echoes it.
    read_until(&mut person, "typed by a person");
    person.write_all(&[1, b'x']).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(19));
    assert_eq!(local(), before);
}

#[test]
fn several_guests_under_one_command_end_with_it() {
    let images = Images::from_env().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let vsock = |n: u32| dir.path().join(format!("g{n}.vsock"));
    let mut command = Command::new(&images.vmm);
    command
        .arg("--kernel")
        .arg(&images.kernel)
        .arg("--initrd")
        .arg(&images.initrd)
        .args(["--guests", "3", "--memory", "128M"])
        .args(["--pool", "size=64M,policy=rw:private:none", "--vsock"])
        .arg(format!(
            "cid=3,path={}",
            dir.path().join("g{n}.vsock").display()
        ));
    let mut supervisor =
        mshare_tests::guests::Process::start("supervisor", dir.path(), command).unwrap();
    for n in 0..3 {
        let mut agent = supervisor.agent(&vsock(n), LIMIT).unwrap();
        assert_eq!(agent.info().unwrap().pool, n < 2, "guest {n}");
    }
    let pid = rustix::process::Pid::from_raw(i32::try_from(supervisor.pid()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let status = supervisor.wait(LIMIT).unwrap();
    assert_eq!(status.code(), Some(19), "{}", supervisor.output());
    assert!(
        supervisor.output().contains("guest2 | "),
        "{}",
        supervisor.output()
    );
}

/// Processes whose working directory is `dir`.
fn processes_in(dir: &Path) -> Vec<String> {
    let processes = std::fs::read_dir("/proc").unwrap();
    processes
        .filter_map(|entry| {
            let path = entry.unwrap().path();
            let cwd = std::fs::read_link(path.join("cwd")).ok()?;
            (cwd == dir).then(|| path.display().to_string())
        })
        .collect()
}

#[test]
fn what_cannot_boot_is_said_and_nothing_is_left_behind() {
    let images = Images::from_env().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("empty"), b"").unwrap();
    std::fs::write(path("text"), b"#!/bin/sh\n".repeat(500)).unwrap();
    let kernel = std::fs::read(&images.kernel).unwrap();
    std::fs::write(path("truncated"), &kernel[..kernel.len() / 2]).unwrap();
    std::fs::write(path("initrd"), vec![0; 200 << 20]).unwrap();
    let good = images.kernel.display().to_string();
    let p = |name: &str| path(name).display().to_string();
    for (args, status, words) in [
        (vec!["--kernel", &p("missing")], 1, "missing"),
        (vec!["--kernel", &p("empty")], 1, "empty"),
        (vec!["--kernel", &p("text")], 1, "text"),
        (vec!["--kernel", &p("truncated")], 1, "truncated"),
        (
            vec![
                "--kernel",
                &good,
                "--initrd",
                &p("initrd"),
                "--memory",
                "128M",
            ],
            1,
            "initrd",
        ),
        (vec!["--kernel", &good, "--memory", "0"], 2, "memory"),
        (vec!["--kernel", &good, "--memory", "3M"], 2, "2 MiB"),
        (vec!["--kernel", &good, "--memory", "200G"], 1, "memory"),
        (vec!["--kernel", &good, "--cpus", "0"], 2, "1 to 32"),
        (vec!["--kernel", &good, "--cpus", "33"], 2, "1 to 32"),
        (vec!["--kernel", &good, "--pool", &p("nobody")], 1, "nobody"),
        (vec!["--kernel", &good, "--pool", "size=1M"], 1, "too small"),
        (
            vec![
                "--kernel",
                &good,
                "--guests",
                "2",
                "--vsock",
                "cid=3,path=/tmp/x",
            ],
            2,
            "{n}",
        ),
    ] {
        // Also the place of its temporary files.
        let cwd = tempfile::tempdir().unwrap();
        let mut command = Command::new(&images.vmm);
        if !args.contains(&"--vsock") {
            command.args(["--vsock", "cid=3,path=v{n}"]);
        }
        let output = command
            .args(["--console", "file=console{n}"])
            .args(&args)
            .current_dir(cwd.path())
            .env("TMPDIR", cwd.path())
            .env_remove("XDG_RUNTIME_DIR")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(status), "{args:?}: {said}");
        assert!(said.contains(words), "{args:?}: {said}");
        let left: Vec<_> = std::fs::read_dir(cwd.path()).unwrap().collect();
        assert!(left.is_empty(), "{args:?} leaves {left:?}");
        assert_eq!(processes_in(cwd.path()), [""; 0], "{args:?}");
    }
}

#[test]
fn vsock_socket_in_use_is_refused() {
    let (dir, _guest) = boot(&Options::new("g"));
    let images = Images::from_env().unwrap();
    let vsock = mshare_tests::guests::vsock_path(dir.path(), "g");
    let output = Command::new(&images.vmm)
        .arg("--kernel")
        .arg(&images.kernel)
        .arg("--vsock")
        .arg(format!("cid=4,path={}", vsock.display()))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("g.vsock"), "{said}");
}
