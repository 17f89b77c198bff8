//! Runs a command with a limit on its time and on its output.

use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use mshare_protocol::agent::{Exec, ExecResult, Failure, MAX_OUTPUT};

use crate::reaper::{Reaper, shell_status};

const TIMEOUT: Duration = Duration::from_secs(60);
/// How long to wait for output once the command has ended: what it left in
/// the background may keep the pipes open for ever.
const DRAIN: Duration = Duration::from_millis(500);

/// Commands are looked for here if the environment does not say.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A command from its words, `guest-agent` being this program.
///
/// # Errors
/// If there are no words.
pub fn command(argv: &[String]) -> Result<Command, Failure> {
    let (program, args) = argv
        .split_first()
        .ok_or_else(|| Failure::new("the command is empty"))?;
    let program = match program.as_str() {
        "guest-agent" => "/proc/self/exe",
        other => other,
    };
    let mut command = Command::new(program);
    command.args(args);
    if std::env::var_os("PATH").is_none() {
        command.env("PATH", PATH);
    }
    Ok(command)
}

/// Runs it.
///
/// # Errors
/// If it cannot be started.
pub fn run(exec: Exec, reaper: &Reaper) -> Result<ExecResult, Failure> {
    let mut command = command(&exec.argv)?;
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    let fail = |e: &io::Error| Failure::os(format_args!("run {:?}", exec.argv.join(" ")), e);
    let (mut child, pid) = reaper.spawn(&mut command).map_err(|e| fail(&e))?;
    let stdout = Collector::start(child.stdout.take()).map_err(|e| fail(&e))?;
    let stderr = Collector::start(child.stderr.take()).map_err(|e| fail(&e))?;
    if let Some(mut pipe) = child.stdin.take() {
        // A command may end without reading its input.
        thread::Builder::new()
            .spawn(move || drop(pipe.write_all(&exec.stdin)))
            .map_err(|e| fail(&e))?;
    }
    let timeout = match exec.timeout_ms {
        0 => TIMEOUT,
        ms => Duration::from_millis(ms.into()),
    };
    let mut status = reaper.wait(pid, timeout);
    let timed_out = status.is_none();
    if timed_out {
        reaper.kill(pid, true);
        status = reaper.wait(pid, TIMEOUT);
    }
    let (stdout, out_cut) = stdout.finish();
    let (stderr, err_cut) = stderr.finish();
    Ok(ExecResult {
        status: status.map_or(-1, shell_status),
        stdout,
        stderr,
        truncated: out_cut || err_cut,
        timed_out,
    })
}

/// Reads a pipe in the background and keeps the first [`MAX_OUTPUT`] bytes.
struct Collector {
    kept: Arc<Mutex<(Vec<u8>, bool)>>,
    done: mpsc::Receiver<()>,
}

impl Collector {
    fn start(pipe: Option<impl Read + Send + 'static>) -> io::Result<Self> {
        let kept = Arc::<Mutex<(Vec<u8>, bool)>>::default();
        let theirs = Arc::clone(&kept);
        let (sender, done) = mpsc::channel();
        if let Some(mut pipe) = pipe {
            thread::Builder::new().spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(n) = pipe.read(&mut buffer)
                    && n > 0
                {
                    let mut kept = theirs.lock().unwrap_or_else(PoisonError::into_inner);
                    let room = n.min(MAX_OUTPUT - kept.0.len());
                    kept.0.extend_from_slice(&buffer[..room]);
                    kept.1 |= room < n;
                }
                // Nobody may be waiting any more.
                let _ = sender.send(());
            })?;
        }
        Ok(Self { kept, done })
    }

    /// The output, and whether some of it is missing.
    fn finish(self) -> (Vec<u8>, bool) {
        let complete = self.done.recv_timeout(DRAIN).is_ok();
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        (std::mem::take(&mut kept.0), kept.1 || !complete)
    }
}
