//! The lab: a software-emulated machine with nested paging, in which the real
//! KVM and the real VMM run on hosts whose own KVM has no such paging.
//!
//! ```text
//! host                          lab (qemu, TCG, SVM + NPT)
//! lab / runner                  Linux 6.12 (Debian's cloud kernel) + kvm-amd
//!   initramfs in a memfd ─────▶   /init   = this crate, see `init`
//!   serial console      ◀─────    kernel messages
//!   virtio-serial port  ◀────▶    frames, see `wire`: output, files, status
//! ```
//!
//! Nothing is left behind: the initramfs is a memfd, the channels are socket
//! pairs, and the kernel ends the emulator together with the thread that runs
//! it.

mod follow;
mod init;
mod kernel;
mod outputs;
mod wire;

use std::fs::File;
use std::io::{self, BufReader, BufWriter};
use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use vmm::doctor::SHMEM_ENABLED;

use crate::cpio::{Archive, CpioError};
use crate::qemu::{self, Channel, QEMU, Qemu};
use follow::{Run, pass_stdin, spawn_console, spawn_frames};
use wire::{JOB, Job, PORT};

pub use init::run_if_init;
pub use kernel::{KernelError, LabKernel};
pub use wire::{Ended, Hello};

/// Environment variable that commands in a lab find set.
pub const IN_LAB: &str = "MSHARE_IN_LAB";
/// How often a run is started again that died of the emulator.
const MAX_RETRIES: u32 = 2;
/// How long the machine may take to the start of the command.
const BOOT_PATIENCE: Duration = Duration::from_secs(120);
/// How long it may be silent after that: many times what a busy host delays.
const SILENCE: Duration = Duration::from_secs(90);

/// What to run and in which machine.
#[derive(Debug, Clone)]
pub struct Lab {
    /// The command and its arguments. A name without a slash is searched in the
    /// `PATH` of [`Lab::env`].
    pub argv: Vec<String>,
    /// The command's environment.
    pub env: Vec<(String, String)>,
    /// The command's working directory.
    pub cwd: String,
    /// Files and directories of this machine and their absolute path in the lab.
    pub files: Vec<(PathBuf, String)>,
    /// Paths in the lab and where to put them here when the command has ended.
    pub outputs: Vec<(String, PathBuf)>,
    /// Emulated CPUs.
    pub cpus: u32,
    /// Memory of the lab in MiB.
    pub memory_mib: u32,
    /// Time for the whole run, a retried start included.
    pub timeout: Option<Duration>,
    /// For how long nothing may be heard of a lab that is up, not even one of the
    /// signs of life that its init gives, before it counts as hung.
    pub silence: Duration,
    /// Pass standard input on. A run with it cannot be retried.
    pub stdin: bool,
    /// The static binary that becomes `/init`; it must call [`run_if_init`].
    pub init: PathBuf,
    /// Kernel command line options to add.
    pub append: Vec<String>,
}

/// What happens in a run, as it happens.
#[derive(Debug)]
pub enum Event<'a> {
    /// The machine is up, the command starts now; time since the start.
    Started(&'a Hello, Duration),
    /// The command's standard output.
    Stdout(&'a [u8]),
    /// The command's standard error.
    Stderr(&'a [u8]),
    /// Console of the lab's kernel, and messages of the emulator.
    Console(&'a [u8]),
    /// Something takes time, once.
    Note(&'a str),
    /// The emulator failed: the run starts from the beginning, output included.
    /// Which retry, and how the last start ended.
    Retry(u32, &'a LabError),
}

/// A run that came to its end.
#[derive(Debug)]
pub struct Outcome {
    /// How the command ended.
    pub ended: Ended,
    /// Starts that died of the emulator before this one.
    pub retries: u32,
}

/// Why a run has no result.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// No kernel for the lab.
    #[error("the lab has no kernel")]
    Kernel(#[from] KernelError),
    /// The initramfs cannot be put together.
    #[error("cannot pack the lab's files")]
    Pack(#[from] CpioError),
    /// A local resource is missing.
    #[error("cannot prepare the lab")]
    Prepare(#[source] io::Error),
    /// The emulator cannot be started.
    #[error("cannot start {QEMU} (Debian package qemu-system-x86)")]
    Start(#[source] io::Error),
    /// A description that cannot be run.
    #[error("{0}")]
    Invalid(String),
    /// The machine is there, but cannot be used.
    #[error("the lab cannot be set up: {0}")]
    Broken(String),
    /// Tables cannot be shared without two-dimensional paging.
    #[error("the lab's KVM has npt={npt} tdp_mmu={tdp_mmu}, both must be on")]
    NoNestedPaging {
        /// Parameter of `kvm_amd`.
        npt: bool,
        /// Parameter of `kvm`.
        tdp_mmu: bool,
    },
    /// The command could not be started.
    #[error("cannot start '{command}' in the lab: {message}")]
    NotStarted {
        /// The command.
        command: String,
        /// errno.
        errno: i32,
        /// The system's message.
        message: String,
    },
    /// Time is up.
    #[error("time-out: not done after {0:.0?}; the lab has been ended")]
    TimedOut(Duration),
    /// The machine did not reach the command.
    #[error("the lab did not boot within {BOOT_PATIENCE:?}; end of its console:\n{0}")]
    NoBoot(String),
    /// The machine died.
    #[error("the lab died{}; end of its console:\n{console}", if *.emulator { " of a fault of the emulator" } else { "" })]
    Died {
        /// Whether its kernel died of a fault that only the emulator can cause.
        emulator: bool,
        /// The last lines of the console.
        console: String,
    },
    /// The machine stopped without a word.
    #[error("the lab hung: no sign of life for {silence:.0?}; end of its console:\n{console}")]
    Hung {
        /// For how long nothing was heard.
        silence: Duration,
        /// The last lines of the console.
        console: String,
    },
    /// A path could not be brought back.
    #[error("cannot bring back {path}")]
    Output {
        /// Path on this machine.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The lab could not read a path it was to send back.
    #[error("cannot bring back {0}")]
    OutputMissing(String),
}

/// In a lab, which is the program's own machine, sets [`SHMEM_ENABLED`]. Elsewhere
/// that is up to who runs the machine.
///
/// # Errors
/// The lab's kernel refuses.
pub fn set_shmem_enabled(mode: &str) -> io::Result<()> {
    if std::env::var_os(IN_LAB).is_some() {
        std::fs::write(SHMEM_ENABLED, mode)?;
    }
    Ok(())
}

impl LabError {
    /// Whether the emulator is the cause, as far as can be told: see
    /// `docs/testing.md`.
    fn is_of_emulator(&self) -> bool {
        matches!(
            self,
            LabError::Died { emulator: true, .. } | LabError::Hung { .. }
        )
    }
}

impl Lab {
    /// A lab for a command, with 2 CPUs and 4 GiB, whose init is the binary that
    /// is running now.
    pub fn new(argv: Vec<String>) -> Self {
        let env = [
            ("PATH", "/bin"),
            ("HOME", "/tmp"),
            ("TMPDIR", "/tmp"),
            (IN_LAB, "1"),
        ];
        Self {
            argv,
            env: env.map(|(key, value)| (key.into(), value.into())).into(),
            cwd: "/tmp".into(),
            files: Vec::new(),
            outputs: Vec::new(),
            cpus: 2,
            memory_mib: 4096,
            timeout: None,
            silence: SILENCE,
            stdin: false,
            // Not its name: a build may put another file there meanwhile.
            init: "/proc/self/exe".into(),
            append: Vec::new(),
        }
    }

    /// Runs the command. `sink` gets everything as it comes.
    pub fn run(&self, sink: &mut dyn FnMut(Event<'_>)) -> Result<Outcome, LabError> {
        if self.argv.is_empty() {
            return Err(LabError::Invalid("no command given".into()));
        }
        let started = Instant::now();
        let kernel = LabKernel::find(|line| sink(Event::Note(line)))?;
        let initramfs = self.pack(&kernel)?;
        let mut retries = 0;
        loop {
            let deadline = self.timeout.map(|timeout| started + timeout);
            match self.attempt(&kernel, &initramfs, deadline, sink) {
                Ok(ended) => return Ok(Outcome { ended, retries }),
                Err(error) if error.is_of_emulator() && retries < MAX_RETRIES && !self.stdin => {
                    retries += 1;
                    sink(Event::Retry(retries, &error));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Writes the initramfs into a memfd.
    fn pack(&self, kernel: &LabKernel) -> Result<File, LabError> {
        let mut archive = Archive::new();
        for dir in ["/dev", "/proc", "/run", "/sys", "/tmp", "/bin"] {
            archive.dir(dir)?;
        }
        archive.char_device("/dev/console", 0o600, (5, 1))?;
        archive.copy("/init", &self.init)?;
        for name in kernel::MODULES {
            archive.copy(&format!("/lib/modules/{name}.ko"), &kernel.module(name))?;
        }
        for (from, to) in &self.files {
            archive.copy(to, from)?;
        }
        let job = Job {
            argv: self.argv.clone(),
            env: self.env.clone(),
            cwd: self.cwd.clone(),
            modules: kernel::MODULES.map(str::to_owned).into(),
            outputs: self.outputs.iter().map(|(path, _)| path.clone()).collect(),
            stdin: self.stdin,
        };
        let job = serde_json::to_vec(&job).map_err(|error| LabError::Prepare(error.into()))?;
        archive.bytes(JOB, 0o600, &job)?;

        let memfd = memfd_create("lab-initramfs", MemfdFlags::CLOEXEC)
            .map_err(|errno| LabError::Prepare(errno.into()))?;
        let file = File::from(memfd);
        archive.write(BufWriter::with_capacity(1 << 20, &file))?;
        Ok(file)
    }

    fn qemu(
        &self,
        kernel: &LabKernel,
        initramfs: &File,
        console: &Channel,
        port: &Channel,
    ) -> Command {
        // One CPU until the init has loaded KVM, see `init::online_cpus`. An
        // oops ends the machine, and with -no-reboot the emulator.
        let mut append = String::from(
            "console=ttyS0 loglevel=5 8250.nr_uarts=1 panic=-1 oops=panic mitigations=off \
             maxcpus=1 tsc=reliable lpj=10000000 no_timer_check nokaslr edd=off nowatchdog \
             initcall_blacklist=jent_mod_init random.trust_cpu=on audit=0 rdinit=/init",
        );
        for option in &self.append {
            append.push(' ');
            append.push_str(option);
        }
        let mut command = Command::new(QEMU);
        command
            .args([
                "-M",
                "q35",
                "-accel",
                "tcg,thread=multi",
                "-cpu",
                "EPYC,+svm,+npt",
            ])
            .args(["-smp", &self.cpus.to_string()])
            .args(["-m", &self.memory_mib.to_string()])
            .args([
                "-nodefaults",
                "-no-user-config",
                "-no-reboot",
                "-display",
                "none",
            ])
            .arg("-kernel")
            .arg(kernel.image())
            .args(["-initrd", &qemu::inherited_path(initramfs)])
            .args(["-append", &append])
            .args(["-chardev", &console.chardev(), "-serial", "chardev:console"])
            .args(["-chardev", &port.chardev(), "-device", "virtio-serial-pci"])
            .args([
                "-device",
                &format!("virtserialport,chardev=port,name={PORT}"),
            ]);
        command
    }

    fn attempt(
        &self,
        kernel: &LabKernel,
        initramfs: &File,
        deadline: Option<Instant>,
        sink: &mut dyn FnMut(Event<'_>),
    ) -> Result<Ended, LabError> {
        let console = Channel::new("console").map_err(LabError::Prepare)?;
        let port = Channel::new("port").map_err(LabError::Prepare)?;
        let command = self.qemu(kernel, initramfs, &console, &port);
        let start = Instant::now();
        let mut qemu =
            Qemu::start(command, &[&console, &port], &[initramfs]).map_err(LabError::Start)?;
        let (console, port) = (console.into_ours(), port.into_ours());

        let (send, receive) = mpsc::channel();
        if self.stdin {
            let port = port.try_clone().map_err(LabError::Prepare)?;
            thread::spawn(move || pass_stdin(&port));
        }
        spawn_frames(BufReader::new(port), send.clone());
        spawn_console(console, send.clone());
        if let Some(messages) = qemu.messages() {
            spawn_console(messages, send);
        }
        let mut run = Run::new(self, start, sink);
        run.follow(&receive, deadline)
    }
}
