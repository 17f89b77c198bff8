//! Packs the guest agent into an initramfs in the cache. The last line printed
//! is `initramfs=PATH`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use mshare_protocol::report::chain;
use mshare_tests::initramfs;

/// Pack the guest agent into an initramfs, kept in the cache.
#[derive(Debug, Parser)]
struct Cli {
    /// The static binary that becomes /init.
    #[arg(long)]
    agent: PathBuf,
    /// Add a file or directory.
    #[arg(long, value_name = "HOST:GUESTPATH", value_parser = pair)]
    file: Vec<(PathBuf, String)>,
}

fn pair(text: &str) -> Result<(PathBuf, String), String> {
    text.split_once(':')
        .map(|(host, guest)| (host.into(), guest.to_owned()))
        .ok_or_else(|| "give HOST:GUESTPATH".to_owned())
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match initramfs::build(&cli.agent, &cli.file) {
        Ok(built) => {
            let state = if built.up_to_date {
                "up to date"
            } else {
                "packed"
            };
            println!("initramfs: {state}");
            println!("initramfs={}", built.path.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("mkinitramfs: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}
