//! The program behind the Makefile: builds what is missing and runs the tests,
//! or a program that needs guests, on this machine or in the lab.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use mshare_protocol::report::chain;
use mshare_tests::lab;
use mshare_tests::runner::{self, LabSize, Options, RunnerError};

/// Build, test and show this project.
#[derive(Debug, Parser)]
struct Cli {
    /// Use the lab even where guests could run on this machine.
    #[arg(long, global = true, env = "MSHARE_LAB", value_parser = clap::builder::FalseyValueParser::new())]
    lab: bool,
    /// CPUs of a lab: 2 for tests of KVM without Linux, else 1, if not given.
    #[arg(long, global = true)]
    lab_cpus: Option<u32>,
    /// Memory of a lab in MiB.
    #[arg(long, global = true, default_value_t = 6144)]
    lab_memory: u32,
    /// Give a lab run up after so many minutes.
    #[arg(long, global = true, default_value_t = 45)]
    lab_minutes: u64,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Build the guest kernel, the programs and the initramfs.
    Build,
    /// Run all checks and tests. The last line is 'N passed, N failed'.
    Test {
        /// Leave out what starts machines.
        #[arg(long)]
        quick: bool,
    },
    /// Run guest tests only; arguments go to the test program.
    Guest {
        /// Arguments of the test program, such as a part of a test's name.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Run selftests of the kernel series, each in a machine of its own.
    Selftests(runner::Selection),
    /// Run them on kernels with checks, in many machines.
    Matrix(runner::Matrix),
    /// Build and boot the kernel after each patch of the series.
    Bisect(runner::Bisect),
    /// Count what the hooks of the series cost those that use no mshare.
    Hooks(runner::Hooks),
    /// Run the demo.
    Demo {
        /// Arguments of the demo.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Run a program of the workspace where guests run.
    Run {
        /// Its name.
        program: String,
        /// Its arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

fn main() -> ExitCode {
    lab::run_if_init();
    let cli = Cli::parse();
    let options = Options {
        force_lab: cli.lab,
        lab: LabSize {
            cpus: cli.lab_cpus,
            memory_mib: cli.lab_memory,
            timeout: Duration::from_secs(cli.lab_minutes * 60),
        },
    };
    match cli.action {
        Action::Build => match runner::build_all() {
            Ok(built) => {
                for (name, path) in built.env() {
                    println!("{name}={}", path.display());
                }
                ExitCode::SUCCESS
            }
            Err(error) => failed(&error),
        },
        Action::Test { quick } => verdict(runner::test(options, quick)),
        Action::Guest { arguments } => verdict(runner::guest_tests(options, &arguments)),
        Action::Selftests(selection) => verdict(runner::selftests(&selection)),
        Action::Matrix(matrix) => judged(runner::matrix(&matrix)),
        Action::Bisect(bisect) => judged(runner::bisect(&bisect)),
        Action::Hooks(hooks) => judged(runner::hooks(&hooks)),
        Action::Demo { arguments } => tool(options, "demo", &arguments),
        Action::Run { program, arguments } => tool(options, &program, &arguments),
    }
}

fn verdict(passed: bool) -> ExitCode {
    if passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn judged(result: Result<bool, RunnerError>) -> ExitCode {
    match result {
        Ok(passed) => verdict(passed),
        Err(error) => failed(&error),
    }
}

fn tool(options: Options, name: &str, arguments: &[String]) -> ExitCode {
    match runner::tool(options, name, arguments) {
        Ok(status) => ExitCode::from(u8::try_from(status & 0xff).unwrap_or(1)),
        Err(error) => failed(&error),
    }
}

fn failed(error: &RunnerError) -> ExitCode {
    eprintln!("error: {}", chain(error));
    ExitCode::FAILURE
}
