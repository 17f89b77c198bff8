//! `lab run -- COMMAND`: runs a command in the lab.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use mshare_protocol::report::chain;
use mshare_tests::lab::{self, Ended, Event, Lab, LabError};

const STATUS_HELP: &str = "\
Exit status: that of COMMAND, 128+N when signal N ended it; 124 at a time-out,
125 when the lab itself failed, died or was called wrongly, 126 when COMMAND
cannot be executed, 127 when it does not exist. 124 to 127 come with a line
'lab: ...' on standard error.

In the lab: /tmp, /run and /dev/shm are writable, /bin is the PATH, /dev/kvm is
the real KVM of Linux 6.12 with nested paging. Binaries must be static, as all
of this workspace are.";

/// Exit status when the lab has no status of a command to pass on.
const FAILED: u8 = 125;

/// A software-emulated machine with nested paging, for hosts without it.
#[derive(Debug, Parser)]
#[command(name = "lab", after_help = STATUS_HELP)]
struct Cli {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Run a command in a fresh lab.
    Run(Run),
    /// Fetch the lab's kernel into the cache and print where it is.
    Fetch,
}

#[derive(Debug, Parser)]
#[command(after_help = STATUS_HELP)]
struct Run {
    /// Emulated CPUs.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    smp: u32,
    /// Memory in MiB.
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(512..))]
    memory: u32,
    /// Put a file or directory into the lab; as /bin/NAME without LABPATH.
    #[arg(long, value_name = "HOST[:LABPATH]")]
    file: Vec<String>,
    /// Bring a file or directory back when COMMAND has ended.
    #[arg(long, value_name = "LABPATH:HOST")]
    out: Vec<String>,
    /// Set a variable of COMMAND's environment.
    #[arg(long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// COMMAND's working directory in the lab.
    #[arg(long, default_value = "/tmp")]
    cwd: String,
    /// Give up after so many seconds.
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Take the lab for hung when nothing is heard of it for so many seconds;
    /// its init gives a sign of life every 5.
    #[arg(long, value_name = "SECONDS", default_value_t = 90,
        value_parser = clap::value_parser!(u32).range(10..))]
    silence: u32,
    /// Pass standard input to COMMAND; it is empty otherwise.
    #[arg(long)]
    stdin: bool,
    /// Write the console of the lab's kernel to a file.
    #[arg(long, value_name = "FILE")]
    console: Option<PathBuf>,
    /// Add an option to the command line of the lab's kernel.
    #[arg(long, value_name = "OPTION")]
    append: Vec<String>,
    /// Say nothing but what COMMAND says.
    #[arg(long, short)]
    quiet: bool,
    /// The command. A file of this machine is put into the lab as /bin/NAME.
    #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<String>,
}

fn main() -> ExitCode {
    lab::run_if_init();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Nothing is left to do if the terminal is gone.
            let _ = error.print();
            // Not 2, which may be the status of a command.
            return ExitCode::from(if error.use_stderr() { FAILED } else { 0 });
        }
    };
    let result = match cli.action {
        Action::Run(arguments) => run(&arguments),
        Action::Fetch => fetch(),
    };
    result.unwrap_or_else(|error| {
        eprintln!("lab: {}", chain(&error));
        ExitCode::from(status_of(&error))
    })
}

fn status_of(error: &LabError) -> u8 {
    match error {
        LabError::TimedOut(_) => 124,
        LabError::NotStarted { errno, .. } if *errno == libc::ENOENT => 127,
        LabError::NotStarted { .. } => 126,
        _ => FAILED,
    }
}

fn fetch() -> Result<ExitCode, LabError> {
    let kernel = lab::LabKernel::find(|line| eprintln!("lab: {line}"))?;
    println!("{}", kernel.image().display());
    Ok(ExitCode::SUCCESS)
}

fn run(arguments: &Run) -> Result<ExitCode, LabError> {
    let lab = describe(arguments)?;
    let mut console = match &arguments.console {
        Some(path) => Some(File::create(path).map_err(|source| LabError::Output {
            path: path.clone(),
            source,
        })?),
        None => None,
    };
    let say = |line: String| {
        if !arguments.quiet {
            eprintln!("lab: {line}");
        }
    };
    let outcome = lab.run(&mut |event| match event {
        Event::Started(hello, took) => say(format!(
            "Linux {}, {} CPUs, {} MiB, npt and tdp_mmu on, up in {:.1} s",
            hello.kernel,
            hello.cpus,
            arguments.memory,
            took.as_secs_f64()
        )),
        // A reader that is gone does not change the command's status.
        Event::Stdout(data) => drop(pass(io::stdout().lock(), data)),
        Event::Stderr(data) => drop(pass(io::stderr().lock(), data)),
        Event::Console(data) => {
            if let Some(file) = &mut console {
                drop(pass(file, data));
            }
        }
        Event::Note(line) => say(line.to_owned()),
        Event::Retry(count, error) => {
            eprintln!("{error}\nlab: starting again, retry {count}");
        }
    })?;
    Ok(ExitCode::from(match outcome.ended {
        Ended::Exited(code) => u8::try_from(code & 0xff).unwrap_or(u8::MAX),
        Ended::Signaled(signal) => {
            say(format!("signal {signal} ended the command"));
            u8::try_from(128 + (signal & 0x7f)).unwrap_or(u8::MAX)
        }
    }))
}

fn pass(mut out: impl Write, data: &[u8]) -> io::Result<()> {
    out.write_all(data)?;
    out.flush()
}

fn describe(arguments: &Run) -> Result<Lab, LabError> {
    let mut lab = Lab::new(arguments.command.clone());
    lab.cpus = arguments.smp;
    lab.memory_mib = arguments.memory;
    lab.cwd.clone_from(&arguments.cwd);
    lab.timeout = arguments.timeout.map(Duration::from_secs);
    lab.silence = Duration::from_secs(arguments.silence.into());
    lab.stdin = arguments.stdin;
    lab.append.clone_from(&arguments.append);
    for file in &arguments.file {
        let (host, inside) = match file.split_once(':') {
            Some((host, inside)) => (host, inside.to_owned()),
            None => (file.as_str(), in_bin(file)?),
        };
        lab.files.push((host.into(), inside));
    }
    let command = &arguments.command[0];
    let given = lab.files.iter().any(|(_, inside)| inside == command);
    if command.contains('/') && !given && Path::new(command).is_file() {
        let inside = in_bin(command)?;
        lab.files.push((command.into(), inside.clone()));
        lab.argv[0] = inside;
    }
    for out in &arguments.out {
        let (inside, host) = out
            .split_once(':')
            .ok_or_else(|| LabError::Invalid(format!("--out {out}: give LABPATH:HOST")))?;
        lab.outputs.push((inside.to_owned(), host.into()));
    }
    for pair in &arguments.env {
        let (name, value) = pair
            .split_once('=')
            .ok_or_else(|| LabError::Invalid(format!("--env {pair}: give NAME=VALUE")))?;
        lab.env.retain(|(known, _)| known != name);
        lab.env.push((name.to_owned(), value.to_owned()));
    }
    Ok(lab)
}

/// Where a file of this machine goes when nothing is said.
fn in_bin(file: &str) -> Result<String, LabError> {
    Path::new(file)
        .file_name()
        .and_then(|name| name.to_str())
        .map(|name| format!("/bin/{name}"))
        .ok_or_else(|| LabError::Invalid(format!("'{file}' names no file")))
}
