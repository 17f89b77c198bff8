//! Guests of the real VMM, driven through their agents.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use vmm::agent_client::{AgentClient, AgentError};

/// How long a guest may take from exec to an agent that answers. The lab
/// needs about two seconds; a loaded machine several times that.
pub const BOOT_LIMIT: Duration = Duration::from_secs(180);

/// Kernel command line with which only warnings go to the console: each byte is an
/// exit from the guest, and all that a boot says takes half of its time in the lab.
/// The rest is in the log that the agent reads.
pub const SHORT_CONSOLE: &str = "loglevel=5";

/// Why a guest is not there.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The environment does not say where the images are.
    #[error("{0} is not set; start the tests with `make test`")]
    NoImage(&'static str),
    /// The VMM does not start.
    #[error("cannot start {vmm}")]
    Start {
        /// Its path.
        vmm: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The VMM ended before its guest's agent answered.
    #[error("{name} ended with {status} before its agent answered; its output:\n{output}")]
    Ended {
        /// Name of the guest.
        name: String,
        /// How.
        status: ExitStatus,
        /// Last lines of console and VMM.
        output: String,
    },
    /// The agent does not answer.
    #[error("the agent of {name} does not answer; its output:\n{output}")]
    Agent {
        /// Name of the guest.
        name: String,
        /// Last lines of console and VMM.
        output: String,
        /// Cause.
        #[source]
        source: AgentError,
    },
    /// An interrupt that shall be counted is not in `/proc/interrupts`.
    #[error("the guest has no interrupt called {0:?}, only {1:?}")]
    NoInterrupt(&'static str, Vec<String>),
    /// The guest cannot be asked.
    #[error(transparent)]
    Asked(#[from] AgentError),
    /// A file or process of the test itself.
    #[error("{what}")]
    Host {
        /// What failed.
        what: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The process did not end in time.
    #[error("{name} did not end within {limit:?}; its output:\n{output}")]
    StillThere {
        /// Name of the guest.
        name: String,
        /// The time it had.
        limit: Duration,
        /// Last lines of console and VMM.
        output: String,
    },
}

/// The files that guests are made of.
#[derive(Clone, Debug)]
pub struct Images {
    /// The VMM.
    pub vmm: PathBuf,
    /// bzImage with the series.
    pub kernel: PathBuf,
    /// The initramfs with the agent.
    pub initrd: PathBuf,
}

impl Images {
    /// Takes them from `MSHARE_VMM`, `MSHARE_KERNEL` and `MSHARE_INITRD`.
    ///
    /// # Errors
    /// [`GuestError::NoImage`].
    pub fn from_env() -> Result<Self, GuestError> {
        Ok(Self {
            vmm: from_env("MSHARE_VMM")?,
            kernel: from_env("MSHARE_KERNEL")?,
            initrd: from_env("MSHARE_INITRD")?,
        })
    }

    /// The same with the kernel from which safety elements can be removed
    /// (`MSHARE_KERNEL_ABLATION`).
    ///
    /// # Errors
    /// [`GuestError::NoImage`].
    pub fn ablation_from_env() -> Result<Self, GuestError> {
        Ok(Self {
            kernel: from_env("MSHARE_KERNEL_ABLATION")?,
            ..Self::from_env()?
        })
    }
}

fn from_env(name: &'static str) -> Result<PathBuf, GuestError> {
    std::env::var_os(name)
        .map(PathBuf::from)
        .ok_or(GuestError::NoImage(name))
}

/// What a guest is started with.
#[derive(Clone, Debug)]
pub struct Options {
    /// Name; also of its files.
    pub name: String,
    /// vCPUs.
    pub cpus: u32,
    /// RAM in MiB.
    pub memory_mib: u32,
    /// `--pool` argument.
    pub pool: Option<String>,
    /// Added to the kernel's command line.
    pub cmdline: String,
    /// Further arguments of the VMM.
    pub args: Vec<OsString>,
    /// How long the boot may take.
    pub boot_limit: Duration,
}

impl Options {
    /// A guest of 2 vCPUs and 256 MiB.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            cpus: 2,
            memory_mib: 256,
            pool: None,
            cmdline: String::new(),
            args: Vec::new(),
            boot_limit: BOOT_LIMIT,
        }
    }

    /// Joins the pool at `socket` with a policy.
    #[must_use]
    pub fn pool(mut self, socket: &Path, policy: &str) -> Self {
        self.pool = Some(format!("{},policy={policy}", socket.display()));
        self
    }

    /// With this many vCPUs.
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// With this on the kernel's command line.
    #[must_use]
    pub fn cmdline(mut self, text: &str) -> Self {
        self.cmdline = text.to_owned();
        self
    }
}

/// A process that is killed when the value is dropped, with a log of its
/// output.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with its output in `dir/NAME.log` and no input.
    ///
    /// # Errors
    /// [`GuestError::Start`] or [`GuestError::Host`].
    pub fn start(name: &str, dir: &Path, mut command: Command) -> Result<Self, GuestError> {
        let log = dir.join(format!("{name}.log"));
        let host = |what: &str| {
            let what = format!("cannot {what} {}", log.display());
            move |source| GuestError::Host { what, source }
        };
        let output = File::create(&log).map_err(host("create"))?;
        let errors = output.try_clone().map_err(host("share"))?;
        let vmm = PathBuf::from(command.get_program());
        command.stdin(Stdio::null()).stdout(output).stderr(errors);
        let child = command
            .spawn()
            .map_err(|source| GuestError::Start { vmm, source })?;
        Ok(Self {
            name: name.to_owned(),
            child,
            log,
        })
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The last lines of its output.
    #[must_use]
    pub fn output(&self) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    /// Its exit status, if it has ended.
    ///
    /// # Errors
    /// [`GuestError::Host`].
    pub fn ended(&mut self) -> Result<Option<ExitStatus>, GuestError> {
        let name = &self.name;
        self.child.try_wait().map_err(|source| GuestError::Host {
            what: format!("cannot wait for {name}"),
            source,
        })
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// [`GuestError::StillThere`] or [`GuestError::Host`].
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus, GuestError> {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            if begun.elapsed() > limit {
                return Err(GuestError::StillThere {
                    name: self.name.clone(),
                    limit,
                    output: self.output(),
                });
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends it with SIGKILL and waits.
    ///
    /// # Errors
    /// [`GuestError::Host`].
    pub fn kill(&mut self) -> Result<(), GuestError> {
        let name = &self.name;
        self.child
            .kill()
            .and_then(|()| self.child.wait())
            .map(drop)
            .map_err(|source| GuestError::Host {
                what: format!("cannot kill {name}"),
                source,
            })
    }

    /// Connects to a guest's agent, unless the process ends before.
    ///
    /// # Errors
    /// [`GuestError::Ended`] or [`GuestError::Agent`].
    pub fn agent(&mut self, vsock: &Path, limit: Duration) -> Result<AgentClient, GuestError> {
        let begun = Instant::now();
        loop {
            let source = match AgentClient::connect(vsock, Duration::from_millis(500)) {
                Ok(agent) => return Ok(agent),
                Err(error) => error,
            };
            let (name, output) = (self.name.clone(), self.output());
            if let Some(status) = self.ended()? {
                return Err(GuestError::Ended {
                    name,
                    status,
                    output,
                });
            }
            if begun.elapsed() > limit {
                return Err(GuestError::Agent {
                    name,
                    output,
                    source,
                });
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It fails only if the process has ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A guest whose agent answers.
#[derive(Debug)]
pub struct Guest {
    /// Its VMM.
    pub process: Process,
    /// Its agent.
    pub agent: AgentClient,
    /// The unix socket of its vsock device.
    pub vsock: PathBuf,
}

impl Guest {
    /// Starts a guest, with its files in `dir`, and waits for its agent.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub fn start(images: &Images, dir: &Path, options: &Options) -> Result<Self, GuestError> {
        let mut process = Self::launch(images, dir, options)?;
        let vsock = vsock_path(dir, &options.name);
        let agent = process.agent(&vsock, options.boot_limit)?;
        Ok(Self {
            process,
            agent,
            vsock,
        })
    }

    /// Starts a guest and does not wait.
    ///
    /// # Errors
    /// [`GuestError::Start`] or [`GuestError::Host`].
    pub fn launch(images: &Images, dir: &Path, options: &Options) -> Result<Process, GuestError> {
        let mut command = Command::new(&images.vmm);
        command
            .arg("--name")
            .arg(&options.name)
            .arg("--kernel")
            .arg(&images.kernel)
            .arg("--initrd")
            .arg(&images.initrd)
            .args(["--cpus", &options.cpus.to_string()])
            .args(["--memory", &format!("{}M", options.memory_mib)])
            .arg("--vsock")
            .arg(format!(
                "cid=3,path={}",
                vsock_path(dir, &options.name).display()
            ));
        if let Some(pool) = &options.pool {
            command.args(["--pool", pool]);
        }
        command.args(["--cmdline", &format!("{SHORT_CONSOLE} {}", options.cmdline)]);
        command.args(&options.args);
        Process::start(&options.name, dir, command)
    }

    /// Another connection to the agent.
    ///
    /// # Errors
    /// [`AgentError::NotReady`].
    pub fn second_agent(&self) -> Result<AgentClient, AgentError> {
        AgentClient::connect(&self.vsock, Duration::from_secs(10))
    }
}

/// Counts of the interrupts by which a guest could be told of a change of
/// rights: TLB shootdowns, which its kernel counts apart from other function
/// calls, and those of the mshare device. All others of a guest that answers
/// its agent's client count that.
///
/// # Errors
/// [`GuestError::NoInterrupt`] if one of them has no count, else
/// [`GuestError::Asked`].
pub fn shootdowns(agent: &mut AgentClient) -> Result<Vec<(String, u64)>, GuestError> {
    let counts = agent.interrupts()?;
    let mut found = Vec::new();
    for wanted in ["TLB", "virtio_mshare"] {
        let before = found.len();
        let lines = counts.iter().filter(|(name, _)| name.contains(wanted));
        found.extend(lines.map(|(name, &count)| (name.clone(), count)));
        if found.len() == before {
            return Err(GuestError::NoInterrupt(
                wanted,
                counts.into_keys().collect(),
            ));
        }
    }
    Ok(found)
}

/// The unix socket of the vsock device of the guest `name`.
#[must_use]
pub fn vsock_path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.vsock"))
}
