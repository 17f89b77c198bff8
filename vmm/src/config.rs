//! The configuration of one guest: the one place that says what can be asked
//! for. The command line fills it; it can be read from JSON as well.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use mshare_protocol::agent::parse_bytes;
use serde::{Deserialize, Serialize};

use crate::arch::layout;
use crate::launch::JoinPool;

const MIB: u64 = 1 << 20;
/// Memory is given in units of 2 MiB, the size of a huge page.
const MEMORY_UNIT: u64 = 2 * MIB;
/// Context ids a guest may have (virtio 1.2, 5.10.4): 0 to 2 and the
/// largest are taken.
const FIRST_GUEST_CID: u32 = 3;

/// What every guest gets on its command line before the user's own part:
/// the console, no search for serial ports that do not exist, a reboot right
/// after a panic, and ACPI as the way to reboot (a kernel with EFI support
/// would look for EFI).
pub const PLATFORM_CMDLINE: &str = "console=ttyS0 8250.nr_uarts=1 reboot=acpi panic=-1";

/// A configuration that cannot work on any host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No or too many vCPUs.
    #[error("{0} vCPUs are asked for; a guest has 1 to {max}", max = layout::MAX_CPUS)]
    Cpus(u32),
    /// No memory.
    #[error(
        "0 bytes of memory are asked for; a guest needs at least 2 MiB and the room its kernel takes"
    )]
    NoMemory,
    /// An odd amount of memory.
    #[error("{0} bytes of memory are not a multiple of 2 MiB")]
    MemoryUnit(u64),
    /// More memory than the platform has addresses for.
    #[error("{0} of memory are asked for; a guest has at most {max}", max = MemorySize(layout::RAM_MAX))]
    MemoryLimit(MemorySize),
    /// A size that is no number.
    #[error("{0:?} is not a size: give bytes, or a number with K, M, G or T, such as 512M")]
    NotASize(String),
    /// Too many devices.
    #[error("{0} virtio devices are asked for; a guest has at most {max}", max = layout::MAX_MMIO_DEVICES)]
    Devices(usize),
    /// A context id that means something else.
    #[error("{0} cannot be the vsock context id of a guest; give a number from 3 to 4294967294")]
    Cid(u32),
    /// An option that is not understood.
    #[error("{value:?} is not understood: {expected}")]
    Syntax {
        /// What was given.
        value: String,
        /// What would be right.
        expected: &'static str,
    },
    /// A command line Linux would misread.
    #[error("the kernel command line contains a NUL byte or a line break")]
    Cmdline,
}

/// An amount of memory in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "SizeText", into = "u64")]
pub struct MemorySize(pub u64);

/// A size in a configuration file: a number of bytes or a text.
#[derive(Deserialize)]
#[serde(untagged)]
enum SizeText {
    Bytes(u64),
    Text(String),
}

impl TryFrom<SizeText> for MemorySize {
    type Error = Error;

    fn try_from(size: SizeText) -> Result<Self, Error> {
        match size {
            SizeText::Bytes(bytes) => Ok(Self(bytes)),
            SizeText::Text(text) => text.parse(),
        }
    }
}

impl From<MemorySize> for u64 {
    fn from(size: MemorySize) -> Self {
        size.0
    }
}

impl fmt::Display for MemorySize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            n if n >= 1 << 30 && n.is_multiple_of(1 << 30) => write!(f, "{} GiB", n >> 30),
            n if n >= MIB && n.is_multiple_of(MIB) => write!(f, "{} MiB", n / MIB),
            n => write!(f, "{n} bytes"),
        }
    }
}

impl FromStr for MemorySize {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        parse_bytes(text)
            .map(Self)
            .map_err(|_| Error::NotASize(text.into()))
    }
}

/// A disk: `PATH` or `PATH,ro`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// The file or block device of the host.
    pub path: PathBuf,
    /// Whether the guest may only read.
    #[serde(default)]
    pub read_only: bool,
}

impl FromStr for DiskConfig {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let (path, read_only) = match text.rsplit_once(',') {
            Some((path, "ro")) => (path, true),
            Some((path, "rw")) => (path, false),
            _ => (text, false),
        };
        if path.is_empty() {
            return Err(Error::Syntax {
                value: text.into(),
                expected: "give PATH or PATH,ro",
            });
        }
        Ok(Self {
            path: path.into(),
            read_only,
        })
    }
}

/// A vsock device: `cid=N,path=SOCKET`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context id.
    pub cid: u32,
    /// The Unix socket of the host that leads to the guest.
    pub path: PathBuf,
}

impl FromStr for VsockConfig {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = || Error::Syntax {
            value: text.into(),
            expected: "give cid=N,path=SOCKET with N from 3 on",
        };
        // The path comes last, so that it may contain commas.
        let (cid, path) = text
            .strip_prefix("cid=")
            .and_then(|rest| rest.split_once(",path="))
            .ok_or_else(bad)?;
        let cid = cid.parse().map_err(|_| bad())?;
        if path.is_empty() {
            return Err(bad());
        }
        Ok(Self {
            cid,
            path: path.into(),
        })
    }
}

/// Where the guest's console leads.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConsoleConfig {
    /// Standard input and output.
    #[default]
    Stdio,
    /// Standard output only.
    Output,
    /// Output to a file, no input.
    File(PathBuf),
    /// Nowhere.
    Off,
}

impl FromStr for ConsoleConfig {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "stdio" => Ok(Self::Stdio),
            "output" => Ok(Self::Output),
            "off" => Ok(Self::Off),
            _ => match text.strip_prefix("file=") {
                Some(path) if !path.is_empty() => Ok(Self::File(path.into())),
                _ => Err(Error::Syntax {
                    value: text.into(),
                    expected: "give stdio, output, file=PATH or off",
                }),
            },
        }
    }
}

/// Everything about one guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Name for people to read, in messages and in the pool's directory.
    #[serde(default)]
    pub name: Option<String>,
    /// The kernel, a bzImage or a vmlinux.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    #[serde(default)]
    pub initrd: Option<PathBuf>,
    /// The user's part of the kernel command line.
    #[serde(default)]
    pub cmdline: String,
    /// Number of vCPUs.
    #[serde(default = "default_cpus")]
    pub cpus: u32,
    /// Memory.
    #[serde(default = "default_memory")]
    pub memory: MemorySize,
    /// Disks, in the order in which the guest sees them.
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// Socket device.
    #[serde(default)]
    pub vsock: Option<VsockConfig>,
    /// Whether the guest gets a source of random numbers.
    #[serde(default)]
    pub rng: bool,
    /// Where the console leads.
    #[serde(default)]
    pub console: ConsoleConfig,
    /// The pool that the guest shares.
    #[serde(default)]
    pub pool: Option<JoinPool>,
}

fn default_cpus() -> u32 {
    1
}

fn default_memory() -> MemorySize {
    MemorySize(512 * MIB)
}

impl Config {
    /// A guest with this kernel and otherwise default values.
    pub fn new(kernel: impl Into<PathBuf>) -> Self {
        Self {
            name: None,
            kernel: kernel.into(),
            initrd: None,
            cmdline: String::new(),
            cpus: default_cpus(),
            memory: default_memory(),
            disks: Vec::new(),
            vsock: None,
            rng: false,
            console: ConsoleConfig::default(),
            pool: None,
        }
    }

    /// Checks everything that needs no look at the host.
    ///
    /// # Errors
    ///
    /// The first value that cannot work.
    pub fn validate(&self) -> Result<(), Error> {
        self.cpu_count()?;
        match self.memory.0 {
            0 => return Err(Error::NoMemory),
            n if !n.is_multiple_of(MEMORY_UNIT) => return Err(Error::MemoryUnit(n)),
            n if n > layout::RAM_MAX => return Err(Error::MemoryLimit(self.memory)),
            _ => {}
        }
        let devices = self.disks.len()
            + usize::from(self.vsock.is_some())
            + usize::from(self.rng)
            + usize::from(self.pool.is_some());
        if u32::try_from(devices).unwrap_or(u32::MAX) > layout::MAX_MMIO_DEVICES {
            return Err(Error::Devices(devices));
        }
        if let Some(vsock) = &self.vsock
            && !(FIRST_GUEST_CID..u32::MAX).contains(&vsock.cid)
        {
            return Err(Error::Cid(vsock.cid));
        }
        if self.cmdline.contains(['\0', '\n', '\r']) {
            return Err(Error::Cmdline);
        }
        Ok(())
    }

    /// The number of vCPUs.
    ///
    /// # Errors
    ///
    /// It is not from 1 to 32.
    pub fn cpu_count(&self) -> Result<u8, Error> {
        u8::try_from(self.cpus)
            .ok()
            .filter(|n| (1..=layout::MAX_CPUS).contains(n))
            .ok_or(Error::Cpus(self.cpus))
    }

    /// The whole kernel command line. Linux takes the last value of most
    /// options, so the user's part overrules the platform's.
    pub fn kernel_cmdline(&self) -> String {
        format!("{PLATFORM_CMDLINE} {}", self.cmdline)
            .trim_end()
            .to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(change: impl FnOnce(&mut Config)) -> Result<(), Error> {
        let mut config = Config::new("k");
        change(&mut config);
        config.validate()
    }

    #[test]
    fn default_configuration_is_valid() {
        assert_eq!(with(|_| {}), Ok(()));
    }

    #[test]
    fn cpus_from_1_to_32_are_valid() {
        for cpus in [1, 2, 32] {
            assert_eq!(with(|c| c.cpus = cpus), Ok(()));
        }
        for cpus in [0, 33, 256, 257, u32::MAX] {
            let error = with(|c| c.cpus = cpus).unwrap_err();
            assert_eq!(error, Error::Cpus(cpus));
            assert!(error.to_string().contains("1 to 32"));
        }
    }

    #[test]
    fn memory_is_checked() {
        let memory = |bytes| with(|c| c.memory = MemorySize(bytes));
        assert_eq!(memory(0), Err(Error::NoMemory));
        assert_eq!(memory(MIB), Err(Error::MemoryUnit(MIB)));
        assert_eq!(memory(512 * MIB + 1), Err(Error::MemoryUnit(512 * MIB + 1)));
        assert_eq!(memory(layout::RAM_MAX), Ok(()));
        let error = memory(layout::RAM_MAX + MEMORY_UNIT).unwrap_err();
        assert!(error.to_string().contains("at most 255 GiB"), "{error}");
        assert!(memory(3 * MIB).unwrap_err().to_string().contains("2 MiB"));
    }

    #[test]
    fn reserved_context_ids_are_refused() {
        for cid in [0, 1, 2, u32::MAX] {
            let path = "s".into();
            let vsock = Some(VsockConfig { cid, path });
            assert_eq!(with(|c| c.vsock = vsock), Err(Error::Cid(cid)));
        }
    }

    #[test]
    fn too_many_devices_are_refused() {
        let disk = DiskConfig {
            path: "d".into(),
            read_only: false,
        };
        let max = layout::MAX_MMIO_DEVICES as usize;
        assert_eq!(with(|c| c.disks = vec![disk.clone(); max]), Ok(()));
        let error = with(|c| {
            c.disks = vec![disk; max];
            c.rng = true;
        });
        assert_eq!(error, Err(Error::Devices(max + 1)));
    }

    #[test]
    fn sizes_are_read_with_their_units() {
        for (text, bytes) in [("4096", 4096), ("512MiB", 512 * MIB), ("0x10M", 16 * MIB)] {
            assert_eq!(text.parse(), Ok(MemorySize(bytes)));
        }
        for text in ["", "12X", "99999999999T"] {
            let error = text.parse::<MemorySize>().unwrap_err();
            assert_eq!(error, Error::NotASize(text.into()));
        }
    }

    #[test]
    fn options_are_read_or_explained() {
        let disk: DiskConfig = "/a,b,ro".parse().unwrap();
        assert_eq!((disk.path, disk.read_only), ("/a,b".into(), true));
        assert!(!"/a".parse::<DiskConfig>().unwrap().read_only);
        assert!(",ro".parse::<DiskConfig>().is_err());
        let vsock: VsockConfig = "cid=3,path=/s,t".parse().unwrap();
        assert_eq!((vsock.cid, vsock.path), (3, "/s,t".into()));
        for text in ["", "cid=3", "path=/s", "cid=x,path=/s", "cid=3,path="] {
            let error = text.parse::<VsockConfig>().unwrap_err();
            assert!(error.to_string().contains("cid=N,path=SOCKET"), "{error}");
        }
        assert_eq!("file=/x".parse(), Ok(ConsoleConfig::File("/x".into())));
        assert!("file=".parse::<ConsoleConfig>().is_err());
        assert!("tty".parse::<ConsoleConfig>().is_err());
    }

    #[test]
    fn json_fills_defaults_and_refuses_unknown_fields() {
        let json = r#"{"kernel": "k", "memory": "1G", "disks": [{"path": "d"}]}"#;
        let config: Config = serde_json::from_str(json).unwrap();
        assert_eq!((config.cpus, config.memory.0), (1, 1 << 30));
        let back: Config = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(back, config);
        for json in [
            r#"{"kernel": "k", "cpu": 2}"#,
            r#"{"kernel": "k", "memory": "x"}"#,
            "{}",
        ] {
            assert!(serde_json::from_str::<Config>(json).is_err());
        }
    }

    #[test]
    fn users_command_line_comes_last() {
        let mut config = Config::new("k");
        assert_eq!(config.kernel_cmdline(), PLATFORM_CMDLINE);
        config.cmdline = "panic=5".into();
        assert!(config.kernel_cmdline().ends_with("panic=-1 panic=5"));
        config.cmdline = "a\nb".into();
        assert_eq!(config.validate(), Err(Error::Cmdline));
    }
}
