//! The agent of a guest: a static program that is PID 1 of the project's
//! initramfs, or a service elsewhere, or a tool to call by hand.
//!
//! It answers the requests of `mshare_protocol::agent`: it makes mshare calls,
//! runs groups of worker processes on shared memory, reads figures from /proc,
//! runs commands and switches the machine off.

/// Writes a line to the console. Unlike `println!` it does not panic if that
/// fails: PID 1 lives on without a console.
macro_rules! say {
    ($($arg:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stdout(), $($arg)*);
    }};
}

mod access;
mod cli;
mod exec;
mod figures;
mod groups;
mod init;
mod mem;
mod paths;
mod power;
mod probe;
mod reaper;
mod region;
mod server;
mod spin;
mod watch;
mod worker;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    // The kernel hands PID 1 every word of its command line that it does not
    // know itself: those are not ours, unless they make sense (a container).
    let init = rustix::process::getpid().is_init();
    match cli::Cli::try_parse() {
        Ok(cli) => cli.run(),
        Err(_) if init => {
            init::main();
            ExitCode::FAILURE
        }
        Err(e) => {
            // Nothing is left to do if the terminal is gone.
            drop(e.print());
            ExitCode::from(u8::try_from(e.exit_code()).unwrap_or(2))
        }
    }
}
