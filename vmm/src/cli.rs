//! The command line. It fills a [`Config`], runs what was asked for, and turns
//! the outcome into an exit status and at most one message.

mod agent;
mod doctor;
mod pool;
mod run;

use std::error::Error;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use mshare_protocol::report::chain;

use crate::exit::{EXIT_STATUS_HELP, ExitStatus};

const ABOUT: &str = "Runs Linux guests on KVM. Guests of one pool can share page tables.";
const KEYS_HELP: &str = "\
Keys on the console:
  Ctrl-A x       ends the run
  Ctrl-A Ctrl-A  sends Ctrl-A to the guest";

/// The whole command line.
#[derive(Debug, Parser)]
#[command(
    name = "vmm",
    version,
    about = ABOUT,
    after_help = format!("{KEYS_HELP}\n\n{EXIT_STATUS_HELP}"),
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: run::RunArgs,
}

/// What else can be asked for.
#[derive(Debug, Subcommand)]
enum Command {
    /// Says what this host can do and what it lacks.
    Doctor(doctor::DoctorArgs),
    /// Runs a pool's broker, or shows and changes what a pool holds.
    Pool(Box<pool::Pool>),
    /// Talks to the agent inside a guest.
    Agent(agent::AgentArgs),
}

/// Runs the program.
pub fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::new().filter_or("VMM_LOG", "warn"))
        .format_target(false)
        .init();
    if let Err(error) = crate::signals::ignore_file_size_limit() {
        log::warn!("a file that grows too large may end this process: {error}");
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version come as errors too; clap knows which is which.
            let status = if error.use_stderr() {
                ExitStatus::Usage
            } else {
                ExitStatus::Success
            };
            // Nobody is left to be told if this fails.
            let _ = error.print();
            return status.into();
        }
    };
    let outcome = match cli.command {
        None => run::run(cli.run),
        Some(Command::Doctor(args)) => doctor::run(&args).map(ExitCode::from),
        Some(Command::Pool(args)) => run_pool(*args),
        Some(Command::Agent(args)) => agent::run(&args).map_err(Failure::from),
    };
    match outcome {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("vmm: {}", chain(failure.error.as_ref()));
            failure.status.into()
        }
    }
}

fn run_pool(args: pool::Pool) -> Result<ExitCode, Failure> {
    match args.run() {
        Ok(()) => Ok(ExitStatus::Success.into()),
        Err(error) if error.is_usage() => Err(Failure::usage(error)),
        Err(error) => Err(error.into()),
    }
}

/// An error and the exit status it leads to.
struct Failure {
    error: Box<dyn Error>,
    status: ExitStatus,
}

impl Failure {
    /// The user asked for something that cannot be.
    fn usage(error: impl Into<Box<dyn Error>>) -> Self {
        Self {
            error: error.into(),
            status: ExitStatus::Usage,
        }
    }
}

impl<E: Into<Box<dyn Error>>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self {
            error: error.into(),
            status: ExitStatus::Error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn help_documents_every_exit_status() {
        let help = Cli::command().render_help().to_string();
        for status in [0, 1, 2, 16, 17, 18, 19] {
            assert!(help.contains(&format!("{status:>4}  ")), "{status}");
        }
    }

    #[test]
    fn kernel_is_required_for_a_run_only() {
        assert!(Cli::try_parse_from(["vmm"]).is_err());
        assert!(Cli::try_parse_from(["vmm", "--kernel", "k"]).is_ok());
        assert!(Cli::try_parse_from(["vmm", "doctor"]).is_ok());
        assert!(Cli::try_parse_from(["vmm", "--kernel", "k", "doctor"]).is_err());
    }
}
