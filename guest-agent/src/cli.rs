//! The command line.

use std::io::{self, Write};
use std::net::Shutdown;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use mshare_protocol::agent::{
    Failure, MSHAREFS, Map, MemOp, Op, OpError, Outcome, RegionOp, Run, SpinKind, StartGroup,
    Value, parse_bytes,
};

use vsock::{VMADDR_CID_HOST, VsockStream};

use crate::groups::Groups;
use crate::reaper::reaper;
use crate::server::{self, Agent, Listen};
use crate::watch::{self, Watch};
use crate::{access, figures, worker};

/// The agent of a guest: makes mshare calls, runs worker processes on shared
/// memory, reads figures, and answers to `vmm agent` on the host.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "As PID 1 it sets the guest up, listens on vsock port 1024 and \
    prints \"agent: ready\". Kernel command line:\n  \
    agent.exec=\"COMMAND ...\"  run it, print \"agent: exit STATUS\", power off\n  \
    agent.shell               shells on the console, if there is /bin/sh"
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Answer to clients until killed
    Serve {
        /// vsock, vsock:PORT or unix:PATH
        #[arg(long, default_value = "vsock")]
        listen: Listen,
        /// Let clients power off, reboot and crash this machine
        #[arg(long)]
        allow_power: bool,
    },
    /// Make mshare calls
    #[command(subcommand)]
    Mshare(Mshare),
    /// Attach a region (or map a file) in several processes and use it
    Work(Work),
    /// Print page-table and memory figures
    Figures {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Run a test program; its lines and the kernel's in one stream
    Watch(Watch),
    /// Connect standard input and output to a vsock port of the host
    Connect {
        /// The port; the host's program listens on the unix socket PATH_PORT,
        /// where PATH is that of the guest's vsock device
        port: u32,
    },
    /// Read a word of this process; status 128 + the signal if it gets one
    #[command(hide = true)]
    Peek {
        /// Its address
        #[arg(value_parser = parse_bytes)]
        addr: u64,
    },
    /// One process of a group; started by the agent
    #[command(hide = true)]
    Worker,
}

#[derive(Debug, Subcommand)]
enum Mshare {
    /// Create a region; it lives until it is unlinked
    Create {
        /// NAME, or pool/NAME for a region that other guests see too
        name: String,
        /// Address in every process: a multiple of 1G
        #[arg(long = "address", alias = "addr", value_parser = parse_bytes)]
        addr: u64,
        /// Length: a multiple of 2M
        #[arg(long, value_parser = parse_bytes)]
        len: u64,
        /// Permission bits, octal
        #[arg(long, value_parser = octal, default_value = "600")]
        mode: u32,
    },
    /// Attach a region, say where it is, and stay attached for a while
    Attach {
        /// Region
        name: String,
        /// Read only
        #[arg(long)]
        ro: bool,
        /// Seconds to stay attached
        #[arg(long, default_value_t = 0)]
        hold: u64,
    },
    /// Remove a region's name; its memory goes with the last attachment
    Unlink {
        /// Region
        name: String,
    },
    /// Change what everybody may do with a range
    Protect {
        /// Region
        name: String,
        #[command(flatten)]
        range: ByteRange,
        /// New protection
        #[arg(long)]
        prot: Prot,
    },
    /// Free the memory of a range, which then reads as zero
    Discard {
        /// Region
        name: String,
        #[command(flatten)]
        range: ByteRange,
    },
    /// Report on a region
    Info {
        /// Region
        name: String,
    },
    /// List the regions
    List,
}

#[derive(Debug, Args)]
struct ByteRange {
    /// Offset in the region: a multiple of 4K
    #[arg(long, value_parser = parse_bytes, default_value = "0")]
    offset: u64,
    /// Length: a multiple of 4K
    #[arg(long, value_parser = parse_bytes)]
    len: u64,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Prot {
    /// No access
    None,
    /// Reads only
    R,
    /// Reads and writes
    Rw,
}

#[derive(Debug, Args)]
struct Work {
    /// Region; with --file, path of a file to map instead
    name: String,
    /// Map a file with MAP_SHARED, for comparison
    #[arg(long)]
    file: bool,
    /// Address; 0: the region's own, or any
    #[arg(
        long = "address",
        alias = "addr",
        value_parser = parse_bytes,
        default_value = "0"
    )]
    addr: u64,
    /// Length; 0: all of the region
    #[arg(long, value_parser = parse_bytes, default_value = "0")]
    len: u64,
    /// Attach read only
    #[arg(long)]
    ro: bool,
    /// Number of processes
    #[arg(short = 'n', long, default_value_t = 1)]
    processes: u32,
    /// Seed of the pattern
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Seconds that the step `hold` takes; without it, to stay attached afterwards
    #[arg(long, default_value_t = 0)]
    hold: u64,
    /// What each process does, in this order
    #[arg(required = true)]
    steps: Vec<Step>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Step {
    /// Read one word of every page
    Read,
    /// Write one word of every page, contents kept
    Write,
    /// Write the pattern
    Fill,
    /// Compare with the pattern
    Verify,
    /// Compare with zero
    Zero,
    /// Print figures of the processes
    Figures,
    /// Read the first word again and again, in the background
    SpinRead,
    /// Write it again and again, in the background
    SpinWrite,
    /// Let --hold seconds pass
    Hold,
    /// Print what the spinning processes have seen
    Status,
    /// End the spinning and print what it has seen
    Stop,
}

impl Cli {
    /// Carries the command out.
    pub fn run(self) -> ExitCode {
        let done = match self.command {
            Command::Serve {
                listen,
                allow_power,
            } => serve(&listen, allow_power),
            Command::Mshare(call) => mshare(call),
            Command::Work(work) => run_work(&work),
            Command::Figures { json } => print_figures(json),
            Command::Watch(watch) => match watch::run(&watch) {
                Ok(status) => return ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX)),
                Err(e) => Err(e),
            },
            Command::Connect { port } => connect(port),
            Command::Peek { addr } => match peek(addr) {
                Ok(status) => return ExitCode::from(status),
                Err(e) => Err(Failure::os("install a signal handler", &e)),
            },
            Command::Worker => worker::main().map_err(|e| Failure::new(e.to_string())),
        };
        match done {
            Ok(()) => ExitCode::SUCCESS,
            Err(e) => {
                eprintln!("guest-agent: {e}");
                ExitCode::FAILURE
            }
        }
    }
}

fn octal(text: &str) -> Result<u32, String> {
    u32::from_str_radix(text, 8).map_err(|_| format!("{text:?} is not an octal number"))
}

fn serve(listen: &Listen, allow_power: bool) -> Result<(), Failure> {
    let reaper = reaper().map_err(|e| Failure::os("start a thread", &e))?;
    let agent = Arc::new(Agent::new(reaper, allow_power));
    server::listen(listen, &agent).map_err(|e| Failure::new(e.to_string()))?;
    println!("agent: ready");
    loop {
        thread::park();
    }
}

/// Passes standard input to the host and what the host says to standard output,
/// until the host has said all.
fn connect(port: u32) -> Result<(), Failure> {
    let fail = |e: &io::Error| Failure::os(format_args!("vsock port {port} of the host"), e);
    let mut stream =
        VsockStream::connect_with_cid_port(VMADDR_CID_HOST, port).map_err(|e| fail(&e))?;
    let mut sender = stream.try_clone().map_err(|e| fail(&e))?;
    thread::spawn(move || {
        // Whether it has arrived, the host has to say.
        let _ = io::copy(&mut io::stdin().lock(), &mut sender);
        let _ = sender.shutdown(Shutdown::Write);
    });
    let mut out = io::stdout().lock();
    io::copy(&mut stream, &mut out)
        .and_then(|_| out.flush())
        .map_err(|e| fail(&e))
}

fn peek(addr: u64) -> io::Result<u8> {
    access::install()?;
    // SAFETY: no Rust object is meant: the caller asks what is mapped there.
    let result = unsafe { access::load(addr) };
    Ok(result.map_or_else(
        |fault| u8::try_from(128 + fault.signal).unwrap_or(u8::MAX),
        |_| 0,
    ))
}

/// Runs one operation in a process of its own and yields what it yields.
fn once(op: &Op) -> Result<Value, Failure> {
    let reaper = reaper().map_err(|e| Failure::os("start a thread", &e))?;
    single(Groups::new(reaper).once(op)?)
}

fn single(outcomes: Vec<Outcome>) -> Result<Value, Failure> {
    match outcomes.into_iter().next().map(|o| o.result) {
        Some(Ok(value)) => Ok(value),
        Some(Err(OpError::Failed(failure))) => Err(failure),
        Some(Err(e)) => Err(Failure::new(e.to_string())),
        None => Err(Failure::new("no process was started")),
    }
}

fn mshare(call: Mshare) -> Result<(), Failure> {
    let value = match call {
        Mshare::Create {
            name,
            addr,
            len,
            mode,
        } => once(&Op::Map {
            slot: 0,
            map: Map::Mshare {
                name,
                addr,
                len,
                oflag: libc::O_CREAT | libc::O_EXCL | libc::O_RDWR,
                mode,
            },
        })?,
        Mshare::Attach { name, ro, hold } => return attach(name, ro, hold),
        Mshare::Unlink { name } => once(&Op::Region(RegionOp::Unlink { name }))?,
        Mshare::Protect { name, range, prot } => once(&Op::Region(RegionOp::Protect {
            name,
            offset: range.offset,
            len: range.len,
            prot: match prot {
                Prot::None => 0,
                Prot::R => 1,
                Prot::Rw => 3,
            },
        }))?,
        Mshare::Discard { name, range } => once(&Op::Region(RegionOp::Discard {
            name,
            offset: range.offset,
            len: range.len,
        }))?,
        Mshare::Info { name } => once(&Op::Region(RegionOp::Info { name }))?,
        Mshare::List => return list(),
    };
    println!("{value}");
    Ok(())
}

fn attach(name: String, ro: bool, hold: u64) -> Result<(), Failure> {
    let reaper = reaper().map_err(|e| Failure::os("start a thread", &e))?;
    let groups = Groups::new(reaper);
    let outcomes = groups.start(StartGroup {
        group: "attach".into(),
        processes: 1,
        map: Some(region(name, 0, 0, ro)),
        pin: vec![],
    })?;
    println!("{}", single(outcomes)?);
    thread::sleep(Duration::from_secs(hold));
    groups.stop("attach", false).map(drop)
}

fn region(name: String, addr: u64, len: u64, ro: bool) -> Map {
    Map::Mshare {
        name,
        addr,
        len,
        oflag: if ro { libc::O_RDONLY } else { libc::O_RDWR },
        mode: 0,
    }
}

/// Prints the regions of this guest, then those of the pool.
fn list() -> Result<(), Failure> {
    for prefix in ["", "pool/"] {
        let path = format!("{MSHAREFS}/{prefix}");
        let entries = match std::fs::read_dir(&path) {
            Ok(entries) => entries,
            // No device, no pool.
            Err(_) if !prefix.is_empty() => break,
            Err(e) => return Err(Failure::os(format_args!("list {path}"), &e)),
        };
        for entry in entries.flatten() {
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            // The one file there that is no region says what the kernel can do.
            if name != "mshare_info" && entry.file_type().is_ok_and(|t| t.is_file()) {
                match crate::region::extent(&name) {
                    Ok((start, len)) => println!("{start:#x} {len:#x} {name}"),
                    Err(e) => println!("? ? {name} ({e})"),
                }
            }
        }
    }
    Ok(())
}

fn run_work(work: &Work) -> Result<(), Failure> {
    let reaper = reaper().map_err(|e| Failure::os("start a thread", &e))?;
    let groups = Groups::new(reaper);
    let map = if work.file {
        Map::File {
            path: work.name.clone(),
            addr: work.addr,
            len: work.len,
            write: !work.ro,
        }
    } else {
        region(work.name.clone(), work.addr, work.len, work.ro)
    };
    let mut bad = report(groups.start(StartGroup {
        group: "work".into(),
        processes: work.processes,
        map: Some(map),
        pin: vec![],
    })?);
    for step in &work.steps {
        if bad > 0 {
            break;
        }
        let Some(op) = step.op(work.seed) else {
            match step {
                Step::Hold => thread::sleep(Duration::from_secs(work.hold)),
                _ => print_processes(&groups)?,
            }
            continue;
        };
        bad += report(groups.run(&Run {
            group: "work".into(),
            process: None,
            op,
            timeout_ms: 600_000,
        })?);
    }
    if !work.steps.iter().any(|step| matches!(step, Step::Hold)) {
        thread::sleep(Duration::from_secs(work.hold));
    }
    groups.stop("work", false)?;
    match bad {
        0 => Ok(()),
        n => Err(Failure::new(format!("{n} processes reported errors"))),
    }
}

fn print_processes(groups: &Groups) -> Result<(), Failure> {
    for p in figures::figures(&groups.list())?.processes {
        println!(
            "process {}: page tables {} KiB, resident {} KiB, minor faults {}, major {}",
            p.process, p.vm_pte_kib, p.rss_kib, p.minflt, p.majflt
        );
    }
    Ok(())
}

impl Step {
    /// What the processes are asked for it, if they are.
    fn op(self, seed: u64) -> Option<Op> {
        let (len, stride) = (0, 4096);
        let mem = match self {
            Self::Read => MemOp::Touch {
                len,
                stride,
                write: false,
            },
            Self::Write => MemOp::Touch {
                len,
                stride,
                write: true,
            },
            Self::Fill => MemOp::Fill { len, seed },
            Self::Verify => MemOp::Verify { len, seed },
            Self::Zero => MemOp::VerifyZero { len },
            Self::SpinRead => MemOp::Spin(SpinKind::Read),
            Self::SpinWrite => MemOp::Spin(SpinKind::Write),
            Self::Status => return Some(Op::SpinStatus),
            Self::Stop => return Some(Op::SpinStop),
            Self::Figures | Self::Hold => return None,
        };
        Some(Op::mem(0, mem))
    }
}

/// Prints outcomes, and gives the number of those that are bad.
fn report(outcomes: Vec<Outcome>) -> usize {
    let mut bad = 0;
    for outcome in outcomes {
        println!("{outcome}");
        bad += usize::from(match outcome.result {
            Ok(Value::Verified(seen)) => seen.bad > 0,
            Ok(Value::Spin(spin)) => spin.fault.is_some(),
            Ok(_) => false,
            Err(_) => true,
        });
    }
    bad
}

fn print_figures(json: bool) -> Result<(), Failure> {
    let figures = figures::figures(&[])?;
    if json {
        let text =
            serde_json::to_string_pretty(&figures).map_err(|e| Failure::new(e.to_string()))?;
        println!("{text}");
        return Ok(());
    }
    const NAMES: [&str; 6] = [
        "MemTotal",
        "MemFree",
        "PageTables",
        "SecPageTables",
        "Shmem",
        "AnonPages",
    ];
    for name in NAMES {
        if let Some(kib) = figures.meminfo.get(name) {
            println!("{name:14} {kib:>12} KiB");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
