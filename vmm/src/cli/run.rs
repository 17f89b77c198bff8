//! `vmm --kernel ...`: runs a guest.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::Failure;
use crate::builder::Builder;
use crate::config::{Config, ConsoleConfig, DiskConfig, MemorySize, VsockConfig};
use crate::exit::{ExitStatus, GuestExit};
use crate::launch::{Launch, PoolOption};
use crate::pool_service::PoolService;
use crate::signals::Signals;
use crate::supervisor;
use crate::terminal::RawMode;

/// The options of a run.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The guest's kernel: a bzImage or a vmlinux
    // Required unless there is a subcommand, which is why it is an Option.
    #[arg(long, value_name = "FILE", required_unless_present = "config")]
    kernel: Option<PathBuf>,
    /// One guest's whole configuration as JSON, instead of these options
    #[arg(long, value_name = "FILE", conflicts_with_all = [
        "kernel", "initrd", "cmdline", "cpus", "memory", "disks", "vsock", "rng", "console",
        "guests", "pool",
    ])]
    config: Option<PathBuf>,
    /// Name of the guest, in messages and in the pool's directory
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// The initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Added to the kernel command line
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true
    )]
    cmdline: String,
    /// Number of vCPUs, 1 to 32
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,
    /// Memory, a multiple of 2M
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    memory: MemorySize,
    /// A disk: PATH or PATH,ro (may be given several times)
    #[arg(long = "disk", value_name = "PATH[,ro]")]
    disks: Vec<DiskConfig>,
    /// A vsock device that leads to a Unix socket: cid=N,path=SOCKET
    #[arg(long, value_name = "cid=N,path=SOCKET")]
    vsock: Option<VsockConfig>,
    /// A source of random numbers
    #[arg(long)]
    rng: bool,
    /// Where the console leads: stdio, output, file=PATH or off
    ///
    /// The default is stdio for one guest and output for several.
    #[arg(long, value_name = "WHERE")]
    console: Option<ConsoleConfig>,
    // Not written out: clap takes {n} for a line break.
    /// Number of guests; in a path, the letter n in braces is the guest's number
    #[arg(long, value_name = "N", default_value_t = 1)]
    guests: u32,
    /// Share a pool: join the broker at SOCKET, or make a pool with size=N
    ///
    /// SOCKET[,policy=P] or
    /// size=N[,pages=2M][,socket=PATH][,window=ADDRESS][,policy=P[:P...]].
    /// With pages=2M a page-table entry maps 2 MiB where protections allow it.
    /// Policies: rw and ro share page tables, private and private-ro have their own,
    /// none has no part in the pool; give one, or one for each guest. All guests of a
    /// pool with rw or ro are one trust domain.
    #[arg(long, value_name = "POOL", verbatim_doc_comment)]
    pool: Option<PoolOption>,
}

/// A configuration file that is none.
#[derive(Debug, thiserror::Error)]
enum ConfigFileError {
    #[error("cannot read the configuration {0}")]
    Read(PathBuf, #[source] io::Error),
    #[error("the configuration {0} is wrong")]
    Json(PathBuf, #[source] serde_json::Error),
}

fn read_config(path: PathBuf) -> Result<Config, ConfigFileError> {
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(source) => return Err(ConfigFileError::Read(path, source)),
    };
    serde_json::from_slice(&text).map_err(|source| ConfigFileError::Json(path, source))
}

impl RunArgs {
    fn into_launch(self) -> Result<Launch, Failure> {
        let guest = match (self.config, self.kernel) {
            (Some(path), _) => {
                let file = read_config(path).map_err(Failure::usage)?;
                Config {
                    name: self.name.or(file.name),
                    ..file
                }
            }
            (None, Some(kernel)) => Config {
                name: self.name,
                kernel,
                initrd: self.initrd,
                cmdline: self.cmdline,
                cpus: self.cpus,
                memory: self.memory,
                disks: self.disks,
                vsock: self.vsock,
                rng: self.rng,
                console: self.console.unwrap_or(match self.guests {
                    1 => ConsoleConfig::Stdio,
                    _ => ConsoleConfig::Output,
                }),
                pool: None,
            },
            (None, None) => return Err(Failure::usage("--kernel is missing")),
        };
        Ok(Launch {
            guest,
            guests: self.guests,
            pool: self.pool,
        })
    }
}

/// Runs the guests to their end.
pub(super) fn run(args: RunArgs) -> Result<ExitCode, Failure> {
    let launch = args.into_launch()?;
    launch.validate().map_err(Failure::usage)?;
    // Before there are threads, which inherit the mask.
    let signals = Signals::block()?;
    let pool = launch.pool.as_ref().map(PoolService::start).transpose()?;
    let socket = pool.as_ref().map(PoolService::socket);
    match launch.configs(socket).map_err(Failure::usage)?.as_slice() {
        [config] => run_one(config, signals).map(ExitCode::from),
        configs => Ok(supervisor::run(configs, signals)?.into()),
    }
}

fn run_one(config: &Config, signals: Signals) -> Result<ExitStatus, Failure> {
    let machine = Builder::new(config)?.build()?;
    let terminal = match config.console {
        ConsoleConfig::Stdio => RawMode::enter()?,
        _ => None,
    };
    let ended = machine.run(Some(signals));
    drop(terminal);
    report(&ended?)
}

/// Says how the run ended, if it did not end well.
fn report(ended: &GuestExit) -> Result<ExitStatus, Failure> {
    match ended {
        GuestExit::PoweredOff | GuestExit::Rebooted => {}
        other => eprintln!("vmm: {other}"),
    }
    Ok(ended.status())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        args: RunArgs,
    }

    #[test]
    fn name_of_the_configuration_holds_unless_one_is_given() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config");
        std::fs::write(&path, r#"{"kernel": "k", "name": "db"}"#).unwrap();
        let name = |more: &[&str]| {
            let argv = ["vmm", "--config", path.to_str().unwrap()];
            let cli = Cli::try_parse_from(argv.iter().chain(more)).unwrap();
            let launch = cli.args.into_launch().map_err(|f| f.error).unwrap();
            launch.guest.name
        };
        assert_eq!(name(&[]).as_deref(), Some("db"));
        assert_eq!(name(&["--name", "web"]).as_deref(), Some("web"));
    }
}
