//! PID 1 of the lab: sets the machine up, runs one command and reports.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use rustix::mount::{MountFlags, mount};
use rustix::process::{WaitOptions, WaitStatus, wait};
use rustix::system::{RebootCommand, finit_module, reboot, sethostname, uname};

use super::wire::{BEAT, Ended, Entry, Frame, Hello, JOB, Job, PORT};

/// How long the port of the host may take to appear.
const PORT_PATIENCE: Duration = Duration::from_secs(10);
/// Bytes read from a pipe or file at once.
const CHUNK: usize = 32 * 1024;

#[derive(Debug, thiserror::Error)]
enum InitError {
    #[error("cannot mount {0}: {1}")]
    Mount(&'static str, rustix::io::Errno),
    #[error("cannot read the job: {0}")]
    Job(io::Error),
    #[error("no virtio-serial port named {PORT}")]
    NoPort,
    #[error("cannot load module {0}: {1}")]
    Module(String, io::Error),
    #[error("cannot keep an idle guest on /dev/kvm: {0}")]
    Kvm(kvm_ioctls::Error),
    #[error("{0}: {1}")]
    Setup(&'static str, io::Error),
}

/// Becomes the lab's init when this process is PID 1 of a lab, and never
/// returns then. Any static binary that calls this first in `main` can be
/// packed as a lab's `/init`; the `lab` binary packs itself.
pub fn run_if_init() {
    if std::process::id() != 1 || !Path::new(JOB).exists() {
        return;
    }
    if let Err(error) = run() {
        // Standard error is the console here.
        eprintln!("lab-init: {error}");
    }
    // The host ends the machine once it has read the last frame. This is for a
    // host that is gone, and for errors before there was a port.
    thread::sleep(Duration::from_secs(2));
    let _ = reboot(RebootCommand::PowerOff);
    loop {
        thread::park();
    }
}

fn run() -> Result<(), InitError> {
    mounts()?;
    let port = Arc::new(Port::open()?);
    let done = serve(&port);
    if let Err(error) = &done {
        let _ = port.send(&Frame::Broken(error.to_string()));
    }
    done
}

/// The channel to the host.
struct Port {
    file: File,
    /// The driver takes a long frame in pieces; this keeps a frame together.
    sending: Mutex<()>,
}

impl Port {
    /// Opens the port by its name; devices are probed while init already runs.
    fn open() -> Result<Self, InitError> {
        let until = Instant::now() + PORT_PATIENCE;
        while Instant::now() < until {
            let ports = fs::read_dir("/sys/class/virtio-ports");
            for entry in ports.into_iter().flatten().flatten() {
                let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
                if name.trim_end() != PORT {
                    continue;
                }
                let device = Path::new("/dev").join(entry.file_name());
                if let Ok(file) = File::options().read(true).write(true).open(device) {
                    let sending = Mutex::default();
                    return Ok(Self { file, sending });
                }
            }
            thread::sleep(Duration::from_millis(5));
        }
        Err(InitError::NoPort)
    }

    fn send(&self, frame: &Frame) -> io::Result<()> {
        let _alone = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        frame.write(&self.file)
    }

    fn receive(&self) -> io::Result<Option<Frame>> {
        Frame::read(&self.file)
    }
}

fn serve(port: &Arc<Port>) -> Result<(), InitError> {
    let job = fs::read(JOB).map_err(InitError::Job)?;
    let job: Job = serde_json::from_slice(&job).map_err(|error| InitError::Job(error.into()))?;
    for name in &job.modules {
        let module = |error| InitError::Module(name.clone(), error);
        let file = File::open(format!("/lib/modules/{name}.ko")).map_err(module)?;
        finit_module(&file, c"", 0).map_err(|errno| module(errno.into()))?;
    }
    if job.modules.iter().any(|name| name == "kvm") {
        // Never closed, see there.
        std::mem::forget(IdleGuests::open().map_err(InitError::Kvm)?);
    }
    let cpus = online_cpus()?;
    loopback_up().map_err(|error| InitError::Setup("cannot bring the loopback up", error))?;
    fs::create_dir_all(&job.cwd)
        .map_err(|error| InitError::Setup("cannot make the working directory", error))?;
    let hello = Frame::Hello(Hello {
        kernel: uname().release().to_string_lossy().into_owned(),
        cpus,
        npt: parameter("kvm_amd", "npt"),
        tdp_mmu: parameter("kvm", "tdp_mmu"),
        uptime: uptime(),
    });
    let sent = |error| InitError::Setup("cannot write to the port", error);
    port.send(&hello).map_err(sent)?;
    beat(port);
    let last = match command(&job, port) {
        Ok(ended) => Frame::Ended(ended),
        Err(error) => Frame::NotStarted(error.raw_os_error().unwrap_or(0), error.to_string()),
    };
    for (index, path) in job.outputs.iter().enumerate() {
        if let Err(error) = send_output(port, index, Path::new(path), "") {
            let failed = Frame::OutputFailed(format!("{path}: {error}"));
            port.send(&failed).map_err(sent)?;
        }
    }
    port.send(&last).map_err(sent)
}

/// Tells the host from now on that this machine makes progress.
fn beat(port: &Arc<Port>) {
    let port = Arc::clone(port);
    thread::spawn(move || {
        while port.send(&Frame::Alive).is_ok() {
            thread::sleep(BEAT);
        }
    });
}

fn mounts() -> Result<(), InitError> {
    let points = [
        ("proc", "/proc", ""),
        ("sysfs", "/sys", ""),
        ("devtmpfs", "/dev", "mode=0755"),
        ("tmpfs", "/tmp", "mode=1777,size=90%"),
        ("tmpfs", "/run", "mode=0755"),
        ("tmpfs", "/dev/shm", "mode=1777,size=90%"),
        ("devpts", "/dev/pts", "mode=0620"),
    ];
    for (kind, at, options) in points {
        // Fails where it exists or will be seen to miss in the mount.
        let _ = fs::create_dir(at);
        let options = std::ffi::CString::new(options).unwrap_or_default();
        mount(kind, at, kind, MountFlags::empty(), options.as_c_str())
            .map_err(|errno| InitError::Mount(at, errno))?;
    }
    let _ = sethostname(b"lab");
    Ok(())
}

/// Idle guests that live as long as the lab. KVM patches its own code (static
/// keys) whenever the first or last guest, guest without interrupt controller or
/// guest with a disabled one comes or goes, and the emulator sometimes loses a
/// race with such patching on another CPU. With these open nothing is patched.
struct IdleGuests {
    _with_apic: (VmFd, VcpuFd),
    _without_apic: (VmFd, VcpuFd),
}

impl IdleGuests {
    fn open() -> Result<Self, kvm_ioctls::Error> {
        let kvm = Kvm::new()?;
        let with = kvm.create_vm()?;
        with.create_irq_chip()?;
        let with_vcpu = with.create_vcpu(0)?;
        let without = kvm.create_vm()?;
        let without_vcpu = without.create_vcpu(0)?;
        Ok(Self {
            _with_apic: (with, with_vcpu),
            _without_apic: (without, without_vcpu),
        })
    }
}

/// Brings the other CPUs up. The kernel booted on one of them, so that all code
/// patching of boot and of module loading happened without the emulator's race.
fn online_cpus() -> Result<usize, InitError> {
    let mut online = 1;
    for cpu in 1.. {
        let file = format!("/sys/devices/system/cpu/cpu{cpu}/online");
        if !Path::new(&file).exists() {
            break;
        }
        fs::write(&file, "1").map_err(|error| InitError::Setup("cannot start a CPU", error))?;
        online += 1;
    }
    Ok(online)
}

fn loopback_up() -> io::Result<()> {
    let socket = std::net::UdpSocket::bind(("0.0.0.0", 0))?;
    // SAFETY: an all-zero ifreq is valid: a name and plain old data.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP).unwrap_or(1);
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which outlives the call.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn parameter(module: &str, name: &str) -> bool {
    fs::read_to_string(format!("/sys/module/{module}/parameters/{name}"))
        .is_ok_and(|value| matches!(value.trim(), "Y" | "1"))
}

fn uptime() -> Duration {
    fs::read_to_string("/proc/uptime")
        .ok()
        .and_then(|text| text.split(' ').next()?.parse().ok())
        .map_or(Duration::ZERO, Duration::from_secs_f64)
}

/// Runs the command to its end, its output going to the host as it comes.
fn command(job: &Job, port: &Arc<Port>) -> io::Result<Ended> {
    let (program, arguments) = job
        .argv
        .split_first()
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let path = job.env.iter().find(|(key, _)| key == "PATH");
    let input = if job.stdin {
        Stdio::piped()
    } else {
        Stdio::null()
    };
    let mut child = Command::new(find(program, path.map_or("", |(_, value)| value)))
        .arg0(program)
        .args(arguments)
        .env_clear()
        .envs(job.env.iter().map(|(key, value)| (key, value)))
        .current_dir(&job.cwd)
        .stdin(input)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()?;
    if let Some(stdin) = child.stdin.take() {
        let port = Arc::clone(port);
        thread::spawn(move || feed(&port, stdin));
    }
    let stdout = child
        .stdout
        .take()
        .map(|pipe| pump(port, pipe, Frame::Stdout));
    let stderr = child
        .stderr
        .take()
        .map(|pipe| pump(port, pipe, Frame::Stderr));
    let ended = wait_for(child.id())?;
    // What the command left running holds its pipes open: end that first.
    // SAFETY: kill takes no pointers; -1 is every process but this one.
    unsafe { libc::kill(-1, libc::SIGKILL) };
    for pump in [stdout, stderr].into_iter().flatten() {
        let _ = pump.join();
    }
    Ok(ended)
}

/// Looks a bare name up in `path`; exec would take the lab's own PATH, which is
/// not the command's.
fn find(program: &str, path: &str) -> String {
    if program.contains('/') {
        return program.to_owned();
    }
    path.split(':')
        .map(|dir| format!("{dir}/{program}"))
        .find(|candidate| Path::new(candidate).exists())
        .unwrap_or_else(|| format!("/bin/{program}"))
}

/// Reaps children, orphans too, until the command is among them.
fn wait_for(command: u32) -> io::Result<Ended> {
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid.as_raw_nonzero().get().cast_unsigned() == command => {
                return Ok(ended(status));
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn ended(status: WaitStatus) -> Ended {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => Ended::Exited(code),
        (None, signal) => Ended::Signaled(signal.unwrap_or(0)),
    }
}

fn pump(
    port: &Arc<Port>,
    mut pipe: impl Read + Send + 'static,
    frame: fn(Vec<u8>) -> Frame,
) -> thread::JoinHandle<()> {
    let port = Arc::clone(port);
    thread::spawn(move || {
        let mut buffer = vec![0; CHUNK];
        loop {
            match pipe.read(&mut buffer) {
                Ok(0) => break,
                Ok(len) => {
                    if port.send(&frame(buffer[..len].to_vec())).is_err() {
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
    })
}

fn feed(port: &Port, mut stdin: ChildStdin) {
    while let Ok(Some(Frame::Stdin(data))) = port.receive() {
        if data.is_empty() || stdin.write_all(&data).is_err() {
            break;
        }
    }
}

fn send_output(port: &Port, index: usize, root: &Path, below: &str) -> io::Result<()> {
    let path = if below.is_empty() {
        root.to_owned()
    } else {
        root.join(below)
    };
    let meta = fs::metadata(&path)?;
    let entry = Entry {
        index,
        path: below.to_owned(),
        mode: meta.permissions().mode() & 0o777,
        is_dir: meta.is_dir(),
    };
    port.send(&Frame::Entry(entry))?;
    if meta.is_dir() {
        for inner in fs::read_dir(&path)? {
            let name = inner?.file_name();
            let name = name
                .to_str()
                .ok_or_else(|| io::Error::other("a name in it is not UTF-8"))?;
            let inner = if below.is_empty() {
                name.to_owned()
            } else {
                format!("{below}/{name}")
            };
            send_output(port, index, root, &inner)?;
        }
        return Ok(());
    }
    let mut file = File::open(&path)?;
    let mut buffer = vec![0; CHUNK];
    loop {
        let len = file.read(&mut buffer)?;
        if len == 0 {
            return Ok(());
        }
        port.send(&Frame::Data(buffer[..len].to_vec()))?;
    }
}
