//! Guests that do not start: the reason, how soon it comes, and that nothing is
//! left behind.

// The helpers of the tests are tests as well.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};

use common::{command, kernel, within_a_second};

/// Mounts an empty file system over /dev, with a /dev/null that will do and,
/// if `kvm`, a /dev/kvm that nobody may open. For use between fork and exec.
fn hide_devices(kvm: bool, maps: &[CString; 2]) -> io::Result<()> {
    let ok = |result: libc::c_int| match result {
        -1 => Err(io::Error::last_os_error()),
        fd => Ok(fd),
    };
    let write = |path: &std::ffi::CStr, text: &std::ffi::CStr| {
        // SAFETY: the strings are valid for the calls.
        unsafe {
            let fd = ok(libc::open(path.as_ptr(), libc::O_WRONLY))?;
            let len = text.to_bytes().len();
            let written = libc::write(fd, text.as_ptr().cast(), len);
            libc::close(fd);
            if written < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    let create = |path: &std::ffi::CStr, mode: libc::mode_t| {
        // SAFETY: the string is valid for the call.
        let fd = unsafe {
            ok(libc::open(
                path.as_ptr(),
                libc::O_CREAT | libc::O_WRONLY,
                mode,
            ))?
        };
        // SAFETY: the descriptor was just made.
        ok(unsafe { libc::close(fd) })
    };
    // SAFETY: system calls only, with constant or borrowed strings.
    unsafe {
        if libc::unshare(libc::CLONE_NEWNS) != 0 {
            // Who may not do that may perhaps do it as root of a namespace.
            ok(libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS))?;
            write(c"/proc/self/setgroups", c"deny")?;
            write(c"/proc/self/uid_map", &maps[0])?;
            write(c"/proc/self/gid_map", &maps[1])?;
        }
        let none = std::ptr::null();
        let flags = libc::MS_REC | libc::MS_PRIVATE;
        ok(libc::mount(none, c"/".as_ptr(), none, flags, none.cast()))?;
        let tmpfs = c"tmpfs".as_ptr();
        ok(libc::mount(tmpfs, c"/dev".as_ptr(), tmpfs, 0, none.cast()))?;
        create(c"/dev/null", 0o666)?;
        if kvm {
            create(c"/dev/kvm", 0)?;
            // Root may open it all the same, unless exec gives it no such right.
            for capability in [1 /* DAC_OVERRIDE */, 2 /* DAC_READ_SEARCH */] {
                ok(libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0))?;
            }
        }
    }
    Ok(())
}

/// Runs `vmm` where /dev/kvm is absent or closed to it; none where this user
/// may not make such a place.
fn run_without_kvm(args: &[&str], kvm: bool) -> Option<Output> {
    let map = |id: u32| CString::new(format!("0 {id} 1")).unwrap();
    let maps = [
        map(rustix::process::geteuid().as_raw()),
        map(rustix::process::getegid().as_raw()),
    ];
    let mut command = command(args);
    // SAFETY: the function makes system calls only, and allocates nothing.
    unsafe {
        command.pre_exec(move || hide_devices(kvm, &maps));
    }
    match command.output() {
        Ok(output) => Some(output),
        Err(error) => {
            let refused = [libc::EPERM, libc::EACCES, libc::ENOSPC];
            let errno = error.raw_os_error().unwrap();
            assert!(refused.contains(&errno), "{error}");
            eprintln!("not run: no mount namespace for this user: {error}");
            None
        }
    }
}

#[test]
fn start_without_kvm_or_the_right_to_use_it_fails_at_once_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = kernel(dir.path());
    for (kvm, reason) in [
        (false, "there is no /dev/kvm: load the module"),
        (
            true,
            "no permission to open /dev/kvm: add the user to the group",
        ),
    ] {
        for (guests, lines) in [("1", &[""][..]), ("3", &["guest0 | ", "guest2 | "])] {
            let args = ["--kernel", &kernel, "--guests", guests];
            let in_time = within_a_second(|| {
                let Some(output) = run_without_kvm(&args, kvm) else {
                    return;
                };
                let text = String::from_utf8_lossy(&output.stderr);
                assert_eq!(output.status.code(), Some(1), "{text}");
                for line in lines {
                    let expected = format!("{line}vmm: this host cannot run the guest: {reason}");
                    assert!(text.contains(&expected), "no {expected:?} in: {text}");
                }
            });
            assert!(in_time, "{reason}, {guests} guests");
        }
        let Some(doctor) = run_without_kvm(&["doctor"], kvm) else {
            return;
        };
        let text = String::from_utf8_lossy(&doctor.stdout);
        assert_eq!(doctor.status.code(), Some(21), "{text}");
        let remedy = if kvm {
            "-> become a member"
        } else {
            "-> modprobe"
        };
        assert!(text.contains(remedy), "no {remedy:?} in: {text}");
    }
}

/// A start that fails.
struct Case<'a> {
    args: Vec<&'a str>,
    status: i32,
    /// What one of the lines says; the second on a host without a KVM that
    /// boots Linux, where nobody gets so far.
    texts: [&'a str; 2],
}

fn case<'a>(args: &[&'a str], status: i32, text: &'a str) -> Case<'a> {
    Case {
        args: args.to_vec(),
        status,
        texts: [text, text],
    }
}

/// Processes whose working directory is `dir`.
fn processes_in(dir: &Path) -> Vec<String> {
    let dir = dir.canonicalize().unwrap();
    std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| {
            let path = entry.unwrap().path();
            let cwd = std::fs::read_link(path.join("cwd")).ok()?;
            (cwd == dir).then(|| path.display().to_string())
        })
        .collect()
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Runs `vmm` in `dir`, which is also the place for its temporary files.
fn run_in(dir: &Path, args: &[&str], guests: &str) -> Output {
    let mut vmm: Command = command(&["--vsock", "cid=3,path=v{n}", "--guests", guests]);
    vmm.args(["--console", "file=console{n}"]).args(args);
    vmm.current_dir(dir).env("TMPDIR", dir);
    vmm.env_remove("XDG_RUNTIME_DIR").output().unwrap()
}

#[test]
fn failed_start_leaves_nothing_behind() {
    let files = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = files.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let good = kernel(files.path());
    let image = std::fs::read(&good).unwrap();
    let empty = file("empty", b"");
    let text = file("text", b"hello\n");
    let short = file("short", &image[..1100]);
    let elf = file("elf", b"\x7fELF\x02\x01\x01");
    let sector = file("disk", &[0; 513]);
    let large = file("large", b"");
    File::options()
        .write(true)
        .open(&large)
        .and_then(|file| file.set_len(1 << 30))
        .unwrap();
    let total = rustix::system::sysinfo().totalram >> 20;
    let more = format!("{}M", (total & !1) + 1024);
    let pool = ["--pool", "size=4M"];
    let with = |args: &[&'static str]| [&["--kernel", "unread"], args].concat();
    let mut cases = vec![
        case(&["--kernel", "/nonexistent"], 1, "No such file"),
        case(&["--kernel", &empty], 1, "is empty"),
        case(&["--kernel", &short], 1, "truncated"),
        case(&["--kernel", &elf], 1, "truncated"),
        case(&["--kernel", &text], 1, "it is text"),
        case(
            &["--kernel", &good, "--initrd", "/nonexistent"],
            1,
            "initrd",
        ),
        case(&["--kernel", &good, "--initrd", &empty], 1, "is empty"),
        case(&["--kernel", &good, "--disk", "/nonexistent,ro"], 1, "disk"),
        case(&["--kernel", &good, "--disk", &sector], 1, "513 bytes"),
        case(&["--kernel", &good, "--memory", &more], 1, "this host has"),
        case(&["--kernel", &good, "--memory", "0"], 2, "0 bytes"),
        case(&["--kernel", &good, "--memory", "3M"], 2, "2 MiB"),
        case(&["--kernel", &good, "--memory", "1000T"], 2, "255 GiB"),
        case(&["--kernel", &good, "--cpus", "0"], 2, "0 vCPUs"),
        case(&["--kernel", &good, "--cpus", "33"], 2, "33 vCPUs"),
        case(&with(&["--cmdline", "a\nb"]), 2, "line break"),
    ];
    let small = Case {
        args: vec!["--kernel", &good, "--memory", "64M", "--initrd", &large],
        status: 1,
        texts: ["the initrd", "cannot boot on this host"],
    };
    cases.push(small);
    for case in &mut cases {
        case.args.extend(pool);
    }
    cases.push(case(
        &["--kernel", &good, "--pool", "size=4K"],
        1,
        "cannot make the pool",
    ));
    for case in &cases {
        for guests in ["1", "3"] {
            let (args, dir) = (&case.args, tempfile::tempdir().unwrap());
            // Three guests may not write one disk, which is found first.
            if guests == "3" && args.contains(&sector.as_str()) {
                continue;
            }
            let output = run_in(dir.path(), args, guests);
            let text = String::from_utf8_lossy(&output.stderr);
            let what = format!("{args:?}, {guests} guests: {text}");
            assert_eq!(output.status.code(), Some(case.status), "{what}");
            assert!(case.texts.iter().any(|t| text.contains(t)), "{what}");
            assert_eq!(names(dir.path()), [""; 0], "{what}");
            assert_eq!(processes_in(dir.path()), [""; 0], "{what}");
        }
    }
}

#[test]
fn socket_of_another_process_stays_and_nothing_else() {
    let files = tempfile::tempdir().unwrap();
    let kernel = kernel(files.path());
    for (socket, pool, reason) in [
        ("v0", "size=4M", "vsock socket \"v0\" is in use"),
        ("p", "size=4M,socket=p", "already serves p"),
    ] {
        for guests in ["1", "3"] {
            let dir = tempfile::tempdir().unwrap();
            let _other = UnixListener::bind(dir.path().join(socket)).unwrap();
            let args = ["--kernel", &kernel, "--pool", pool];
            let output = run_in(dir.path(), &args, guests);
            let text = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{text}");
            assert!(text.contains(reason), "{text}");
            assert_eq!(names(dir.path()), [socket], "{text}");
            assert_eq!(processes_in(dir.path()), [""; 0], "{text}");
        }
    }
}
