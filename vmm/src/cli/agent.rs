//! `vmm agent`: asks the agent inside a guest.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use mshare_protocol::agent::{
    Exec, Figures, LogLine, MAX_READ, Map, MemOp, O_CREAT, O_EXCL, O_RDWR, Op, Outcome, RegionOp,
    Reply, Request, Run, SpinKind, StartGroup, Value, parse_bytes,
};
use serde::Serialize;

use crate::agent_client::{AgentClient, AgentError};

/// Arguments of `vmm agent`.
#[derive(Debug, Args)]
pub struct AgentArgs {
    /// Unix socket of the guest's vsock device
    #[arg(long, short, value_name = "PATH")]
    socket: PathBuf,
    /// The socket is the agent's own (guest-agent serve --listen unix:PATH)
    #[arg(long)]
    direct: bool,
    /// Seconds to wait for the agent to come up
    #[arg(long, default_value_t = 10)]
    timeout: u64,
    /// Print answers as JSON
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Say who answers, and whether its kernel has mshare
    Ping,
    /// Run a command in the guest; its exit status becomes this program's
    Exec {
        /// Seconds after which it is killed
        #[arg(long, default_value_t = 60)]
        limit: u32,
        /// Pass standard input on
        #[arg(long, short)]
        input: bool,
        /// Command and arguments
        #[arg(required = true, trailing_var_arg = true)]
        argv: Vec<String>,
    },
    /// Page-table and memory figures
    Figures,
    /// Interrupt counts
    Interrupts,
    /// The kernel's log
    Dmesg {
        /// How many lines
        #[arg(long, short = 'n', default_value_t = 100)]
        lines: u32,
        /// Only warnings and oopses; status 1 if there are any
        #[arg(long)]
        complaints: bool,
    },
    /// Make mshare calls
    #[command(subcommand)]
    Mshare(Mshare),
    /// Processes that attach a region and stay
    #[command(subcommand)]
    Group(Group),
    /// Print a file, whole
    Cat {
        /// Path in the guest
        path: String,
    },
    /// List a directory
    Ls {
        /// Path in the guest
        path: String,
    },
    /// Send any request, given as JSON, and print the answer
    #[command(
        after_help = "Example: '{\"Run\": {\"group\": \"g\", \"process\": null, \"timeout_ms\": 0,\n  \
        \"op\": {\"Mem\": {\"slot\": 0, \"offset\": 0, \"mem\": \"Load\"}}}}'"
    )]
    Call {
        /// A request of mshare_protocol::agent
        request: String,
    },
    /// Switch the guest off
    Poweroff,
    /// Restart the guest
    Reboot,
    /// Crash the guest's kernel
    Crash,
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
    /// Remove a region's name; its memory goes with the last attachment
    Unlink {
        /// Region
        name: String,
    },
    /// Change what everybody may do with a range, in every guest
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

#[derive(Debug, Subcommand)]
enum Group {
    /// Start a group
    Start {
        /// Its name
        group: String,
        /// Region that each process attaches
        #[arg(long)]
        region: String,
        /// How many processes
        #[arg(long, short = 'n', default_value_t = 1)]
        processes: u32,
        /// Attach read only
        #[arg(long)]
        ro: bool,
        /// CPUs to pin the processes to, in turn
        #[arg(long, value_delimiter = ',')]
        pin: Vec<u32>,
    },
    /// Write the pattern of a seed
    Fill(Pattern),
    /// Compare with the pattern of a seed; status 1 if it differs
    Verify(Pattern),
    /// Compare with zero; status 1 if it differs
    Zero(Pattern),
    /// Access one word of every page
    Touch {
        #[command(flatten)]
        pattern: Pattern,
        /// Write too; contents are kept
        #[arg(long)]
        write: bool,
    },
    /// Access one word again and again, in the background, until a fault or `spin-stop`
    Spin {
        /// How
        how: How,
        #[command(flatten)]
        member: Member,
        /// Offset of the word in the region
        #[arg(long, value_parser = parse_bytes, default_value = "0")]
        offset: u64,
    },
    /// Say what the spinning processes have seen; status 1 if a fault has ended one
    SpinStatus(Member),
    /// End the spinning and say what it has seen; status 1 if a fault had ended it
    SpinStop(Member),
    /// List the groups
    List,
    /// Ask a group to exit
    Stop {
        /// Its name
        group: String,
    },
    /// Kill a group
    Kill {
        /// Its name
        group: String,
    },
}

/// What a spinning process does.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum How {
    /// Reads
    Read,
    /// Writes the number of the write
    Write,
}

#[derive(Debug, Args)]
struct Member {
    /// Name of the group
    group: String,
    /// Only this process
    #[arg(long)]
    process: Option<u32>,
}

#[derive(Debug, Args)]
struct Pattern {
    /// Name of the group
    group: String,
    /// Only this process
    #[arg(long)]
    process: Option<u32>,
    /// Offset in the region
    #[arg(long, value_parser = parse_bytes, default_value = "0")]
    offset: u64,
    /// Length; 0: up to the end
    #[arg(long, value_parser = parse_bytes, default_value = "0")]
    len: u64,
    /// Seed of the pattern
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Why the command failed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The agent could not be asked, or refused.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The request is not one.
    #[error("the request is not valid JSON for a request of the agent protocol")]
    Request(#[source] serde_json::Error),
    /// The answer cannot be shown.
    #[error("cannot print the answer")]
    Output(#[from] io::Error),
}

/// Carries out `vmm agent`.
///
/// # Errors
/// See [`CommandError`].
pub fn run(args: &AgentArgs) -> Result<ExitCode, CommandError> {
    // A wrong request needs no guest to be found out.
    let request = request(&args.command)?;
    let timeout = Duration::from_secs(args.timeout);
    let mut client = if args.direct {
        AgentClient::connect_direct(&args.socket, timeout)?
    } else {
        AgentClient::connect(&args.socket, timeout)?
    };
    if let Command::Exec { limit, .. } = args.command {
        client.set_timeout(Duration::from_secs(u64::from(limit) + 30))?;
    }
    if matches!(args.command, Command::Crash) {
        client.crash()?;
        return Ok(ExitCode::SUCCESS);
    }
    if let (Command::Cat { path }, false) = (&args.command, args.json) {
        cat(&mut client, path)?;
        return Ok(ExitCode::SUCCESS);
    }
    let reply = match &args.command {
        Command::Cat { path } => Reply::Bytes(client.read_file(path)?),
        _ => client.call(&request)?,
    };
    let reply = match (reply, &args.command) {
        (Reply::Dmesg(lines), Command::Dmesg { complaints, .. }) if *complaints => {
            Reply::Dmesg(lines.into_iter().filter(LogLine::is_complaint).collect())
        }
        (reply, _) => reply,
    };
    let mut out = io::stdout().lock();
    if args.json || matches!(args.command, Command::Call { .. }) {
        print_json(&mut out, &reply)?;
    } else {
        print_reply(&mut out, &reply)?;
    }
    out.flush()?;
    Ok(status(&reply, &args.command))
}

/// Prints a file piece by piece, however long it is.
fn cat(client: &mut AgentClient, path: &str) -> Result<(), CommandError> {
    let mut out = io::stdout().lock();
    let mut offset = 0;
    loop {
        let piece = client.read_piece(path, offset, MAX_READ)?;
        out.write_all(&piece)?;
        out.flush()?;
        if piece.len() < MAX_READ as usize {
            return Ok(());
        }
        offset += piece.len() as u64;
    }
}

/// The request for a command, or for its first piece.
fn request(command: &Command) -> Result<Request, CommandError> {
    Ok(match command {
        Command::Ping => Request::Info,
        Command::Exec { limit, input, argv } => {
            let mut stdin = Vec::new();
            if *input {
                io::Read::read_to_end(&mut io::stdin().lock(), &mut stdin)?;
            }
            Request::Exec(Exec {
                argv: argv.clone(),
                stdin,
                timeout_ms: limit.saturating_mul(1000),
            })
        }
        Command::Figures => Request::Figures,
        Command::Interrupts => Request::Interrupts,
        Command::Dmesg {
            lines, complaints, ..
        } => Request::Dmesg {
            lines: if *complaints { u32::MAX } else { *lines },
        },
        Command::Mshare(call) => Request::Once(mshare(call)),
        Command::Group(group) => group_request(group),
        Command::Cat { path } => Request::ReadFile {
            path: path.clone(),
            offset: 0,
            max: MAX_READ,
        },
        Command::Ls { path } => Request::ListDir { path: path.clone() },
        Command::Call { request } => {
            serde_json::from_str(request).map_err(CommandError::Request)?
        }
        Command::Poweroff => Request::PowerOff,
        Command::Reboot => Request::Reboot,
        Command::Crash => Request::Crash,
    })
}

fn mshare(call: &Mshare) -> Op {
    Op::Region(match call {
        Mshare::Create {
            name,
            addr,
            len,
            mode,
        } => {
            return Op::Map {
                slot: 0,
                map: Map::Mshare {
                    name: name.clone(),
                    addr: *addr,
                    len: *len,
                    oflag: O_RDWR | O_CREAT | O_EXCL,
                    mode: *mode,
                },
            };
        }
        Mshare::Unlink { name } => RegionOp::Unlink { name: name.clone() },
        Mshare::Protect { name, range, prot } => RegionOp::Protect {
            name: name.clone(),
            offset: range.offset,
            len: range.len,
            prot: match prot {
                Prot::None => 0,
                Prot::R => 1,
                Prot::Rw => 3,
            },
        },
        Mshare::Discard { name, range } => RegionOp::Discard {
            name: name.clone(),
            offset: range.offset,
            len: range.len,
        },
        Mshare::Info { name } => RegionOp::Info { name: name.clone() },
    })
}

fn group_request(group: &Group) -> Request {
    let (pattern, mem) = match group {
        Group::Start {
            group,
            region,
            processes,
            ro,
            pin,
        } => {
            return Request::StartGroup(StartGroup {
                group: group.clone(),
                processes: *processes,
                map: Some(if *ro {
                    Map::attach_ro(region)
                } else {
                    Map::attach(region)
                }),
                pin: pin.clone(),
            });
        }
        Group::Spin {
            how,
            member,
            offset,
        } => {
            let kind = match how {
                How::Read => SpinKind::Read,
                How::Write => SpinKind::Write,
            };
            return member.run(Op::mem(*offset, MemOp::Spin(kind)));
        }
        Group::SpinStatus(member) => return member.run(Op::SpinStatus),
        Group::SpinStop(member) => return member.run(Op::SpinStop),
        Group::List => return Request::ListGroups,
        Group::Stop { group } => {
            return Request::StopGroup {
                group: group.clone(),
            };
        }
        Group::Kill { group } => {
            return Request::KillGroup {
                group: group.clone(),
                process: None,
            };
        }
        Group::Fill(p) => (
            p,
            MemOp::Fill {
                len: p.len,
                seed: p.seed,
            },
        ),
        Group::Verify(p) => (
            p,
            MemOp::Verify {
                len: p.len,
                seed: p.seed,
            },
        ),
        Group::Zero(p) => (p, MemOp::VerifyZero { len: p.len }),
        Group::Touch { pattern: p, write } => (
            p,
            MemOp::Touch {
                len: p.len,
                stride: 4096,
                write: *write,
            },
        ),
    };
    Request::Run(Run {
        group: pattern.group.clone(),
        process: pattern.process,
        op: Op::mem(pattern.offset, mem),
        timeout_ms: 0,
    })
}

impl Member {
    fn run(&self, op: Op) -> Request {
        Request::Run(Run {
            group: self.group.clone(),
            process: self.process,
            op,
            timeout_ms: 0,
        })
    }
}

/// The command's own exit status, and 1 for findings that are bad.
fn status(reply: &Reply, command: &Command) -> ExitCode {
    let bad = match reply {
        Reply::Exec(result) => {
            return ExitCode::from(u8::try_from(result.status).unwrap_or(u8::MAX));
        }
        Reply::Outcomes(outcomes) => outcomes.iter().any(is_bad),
        Reply::Dmesg(lines) => {
            matches!(command, Command::Dmesg { complaints, .. } if *complaints) && !lines.is_empty()
        }
        _ => false,
    };
    ExitCode::from(u8::from(bad))
}

fn is_bad(outcome: &Outcome) -> bool {
    match &outcome.result {
        Ok(Value::Verified(seen)) => seen.bad > 0,
        Ok(Value::Spin(spin)) => spin.fault.is_some(),
        Ok(_) => false,
        Err(_) => true,
    }
}

fn print_json(out: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer_pretty(&mut *out, value)?;
    writeln!(out)
}

fn print_reply(out: &mut impl Write, reply: &Reply) -> io::Result<()> {
    match reply {
        Reply::Info(info) => {
            let yes_no = |b| if b { "yes" } else { "no" };
            writeln!(out, "kernel    {}", info.release)?;
            writeln!(out, "cpus      {}", info.cpus)?;
            writeln!(out, "mshare    {}", yes_no(info.mshare))?;
            writeln!(out, "pool      {}", yes_no(info.pool))?;
            writeln!(out, "PID 1     {}", yes_no(info.init))?;
            writeln!(out, "cmdline   {}", info.cmdline)
        }
        Reply::Outcomes(outcomes) => outcomes.iter().try_for_each(|o| writeln!(out, "{o}")),
        Reply::Groups(groups) => groups
            .iter()
            .try_for_each(|g| writeln!(out, "{} {:?}", g.group, g.pids)),
        Reply::Figures(figures) => print_figures(out, figures),
        Reply::Interrupts(counts) => counts
            .iter()
            .try_for_each(|(name, count)| writeln!(out, "{count:>12} {name}")),
        Reply::Dmesg(lines) => lines.iter().try_for_each(|line| {
            let (s, us) = (line.time_us / 1_000_000, line.time_us % 1_000_000);
            writeln!(out, "[{s:5}.{us:06}] {}", line.text)
        }),
        Reply::Exec(result) => {
            out.write_all(&result.stdout)?;
            io::stderr().write_all(&result.stderr)?;
            if result.timed_out {
                eprintln!("vmm agent: the command was killed: it took too long");
            }
            if result.truncated {
                eprintln!("vmm agent: some of the command's output was dropped");
            }
            Ok(())
        }
        Reply::Bytes(bytes) => out.write_all(bytes),
        Reply::Names(names) => names.iter().try_for_each(|name| writeln!(out, "{name}")),
        Reply::Done => Ok(()),
    }
}

fn print_figures(out: &mut impl Write, figures: &Figures) -> io::Result<()> {
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
            writeln!(out, "{name:14} {kib:>12} KiB")?;
        }
    }
    for p in &figures.processes {
        writeln!(
            out,
            "{}/{} (pid {}): page tables {} KiB, resident {} KiB, minor faults {}, major {}",
            p.group, p.process, p.pid, p.vm_pte_kib, p.rss_kib, p.minflt, p.majflt
        )?;
    }
    Ok(())
}

fn octal(text: &str) -> Result<u32, String> {
    u32::from_str_radix(text, 8).map_err(|_| format!("{text:?} is not an octal number"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        args: AgentArgs,
    }

    fn parse(words: &str) -> Request {
        let argv = format!("agent --socket s {words}");
        request(&Cli::try_parse_from(argv.split(' ')).unwrap().args.command).unwrap()
    }

    #[test]
    fn arguments_of_a_command_are_not_ours() {
        let Request::Exec(exec) = parse("exec ls -l --json") else {
            panic!()
        };
        assert_eq!(exec.argv, ["ls", "-l", "--json"]);
    }

    #[test]
    fn spin_is_for_a_group_or_one_of_its_processes() {
        let run = |process, op| {
            Request::Run(Run {
                group: "g".into(),
                process,
                op,
                timeout_ms: 0,
            })
        };
        let spin = Op::mem(2 << 20, MemOp::Spin(SpinKind::Write));
        assert_eq!(parse("group spin write g --offset 2M"), run(None, spin));
        let status = run(Some(1), Op::SpinStatus);
        assert_eq!(parse("group spin-status g --process 1"), status);
        assert_eq!(parse("group spin-stop g"), run(None, Op::SpinStop));
    }

    #[test]
    fn protect_names_range_and_protection() {
        let expected = Request::Once(Op::Region(RegionOp::Protect {
            name: "pool/a".into(),
            offset: 0,
            len: 2 << 20,
            prot: 1,
        }));
        assert_eq!(parse("mshare protect pool/a --len 2M --prot r"), expected);
    }

    #[test]
    fn call_takes_json_and_refuses_the_rest() {
        assert_eq!(parse("call \"Figures\""), Request::Figures);
        let command = Command::Call {
            request: "{}".into(),
        };
        assert!(matches!(request(&command), Err(CommandError::Request(_))));
    }
}
