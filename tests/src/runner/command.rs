//! Runs the tools of a build, their output going through to the terminal.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};

use rustix::process::{Signal, set_parent_process_death_signal};

use super::RunnerError;

/// A command with its place in the project, ended when its starter ends.
pub fn command(program: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .current_dir(super::project())
        .stdin(Stdio::null());
    let prepare = || Ok(set_parent_process_death_signal(Some(Signal::TERM))?);
    // SAFETY: between fork and exec this makes one system call, no more.
    unsafe { command.pre_exec(prepare) };
    command
}

/// A cargo command, of the cargo that runs us.
pub fn cargo(arguments: &[&str]) -> Command {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    command(&cargo, arguments)
}

/// Runs a command and hands over its standard output line by line, newline
/// included. Returns its status.
pub fn stream(
    command: &mut Command,
    mut line: impl FnMut(&[u8]),
) -> Result<ExitStatus, RunnerError> {
    let fail = |source, command: &Command| RunnerError::Spawn {
        program: command.get_program().to_string_lossy().into_owned(),
        source,
    };
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| fail(error, command))?;
    if let Some(stdout) = child.stdout.take() {
        let mut stdout = BufReader::new(stdout);
        let mut buffer = Vec::new();
        while stdout
            .read_until(b'\n', &mut buffer)
            .map_err(|error| fail(error, command))?
            > 0
        {
            line(&buffer);
            buffer.clear();
        }
    }
    child.wait().map_err(|error| fail(error, command))
}

/// Passes output on at once. A reader that is gone changes no result.
pub fn pass(bytes: &[u8]) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(bytes).and_then(|()| out.flush());
}

/// Builds with cargo and returns the programs it made, by name.
pub fn build(arguments: &[&str]) -> Result<Vec<(String, PathBuf)>, RunnerError> {
    let mut programs = Vec::new();
    let mut cargo = cargo(arguments);
    cargo.arg("--message-format=json-render-diagnostics");
    let built = stream(&mut cargo, |line| {
        let Ok(message) = serde_json::from_slice::<serde_json::Value>(line) else {
            return;
        };
        let name = message["target"]["name"].as_str();
        if let (Some(name), Some(path)) = (name, message["executable"].as_str()) {
            programs.push((name.to_owned(), path.into()));
        }
    })?;
    if built.success() {
        return Ok(programs);
    }
    Err(RunnerError::Failed(format!(
        "cargo {}",
        arguments.join(" ")
    )))
}
