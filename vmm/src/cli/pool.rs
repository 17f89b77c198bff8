//! `vmm pool`: a broker by itself, and what a person asks of one.

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;

use clap::{Args, Subcommand};
use mshare_pool::admin::{self, AdminError};
use mshare_pool::broker::{Broker, BrokerError};
use mshare_pool::client::Client;
use mshare_pool::layout::PoolConfig;
use mshare_pool::server::{Listener, Options, Server, ServerError, Start};
use mshare_protocol::agent::parse_bytes;
use mshare_protocol::broker::{PoolStat, Region};
use mshare_protocol::entry::Prot;
use rustix::event::{PollFd, PollFlags, poll};

use crate::config::MemorySize;
use crate::launch::PageSize;
use crate::patience::Wait;
use crate::signals::Signals;

/// Arguments of `vmm pool`.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = false,
    after_help = "\
A pool whose guests share page tables is one trust domain: a guest with policy
rw or ro could, if its kernel is hostile, make a process of a peer map any page
of that peer. Guests that do not trust each other use private or private-ro."
)]
pub struct Pool {
    /// The broker's socket.
    #[arg(long, value_name = "PATH", global = true)]
    socket: Option<PathBuf>,
    /// Run a broker for a pool of this size, for example 1G.
    #[arg(long, value_name = "SIZE")]
    size: Option<MemorySize>,
    /// Guest-physical address of the window; a multiple of 1 GiB.
    #[arg(long, value_name = "ADDRESS", value_parser = parse_bytes, requires = "size")]
    window: Option<u64>,
    /// Size of the pages by which regions are mapped: 4K, or 2M where protections
    /// are the same for 2 MiB.
    #[arg(long, value_name = "SIZE", requires = "size")]
    pages: Option<PageSize>,
    /// Run a broker in the place of one that died: it takes the pool over from
    /// the first VMM that comes back.
    #[arg(long, conflicts_with = "size")]
    recover: bool,
    #[command(subcommand)]
    action: Option<Action>,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List the regions.
    Ls {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Report on one region, or on the whole pool.
    Stat {
        /// The region.
        name: Option<String>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Create a region.
    Create {
        /// Its name.
        name: String,
        /// Its address in every process; a multiple of 1 GiB.
        #[arg(long, value_parser = parse_bytes)]
        address: u64,
        /// Its length; a multiple of 2 MiB.
        #[arg(long)]
        len: MemorySize,
        /// Permission bits.
        #[arg(long, default_value = "600", value_parser = parse_mode)]
        mode: u32,
    },
    /// Remove a region's name; its memory goes with the last attachment.
    Rm {
        /// The region.
        name: String,
    },
    /// Fill a region from a file (`-`: standard input).
    Fill {
        /// The region.
        name: String,
        /// The file.
        file: PathBuf,
        /// Byte offset in the region.
        #[arg(long, default_value = "0", value_parser = parse_bytes)]
        offset: u64,
    },
    /// Write a region's contents to standard output.
    Read {
        /// The region.
        name: String,
        /// Byte offset in the region.
        #[arg(long, default_value = "0", value_parser = parse_bytes)]
        offset: u64,
        /// Bytes; all the rest if not given.
        #[arg(long, value_parser = parse_bytes)]
        len: Option<u64>,
    },
    /// Change what every process of every guest may do with a range.
    Protect {
        /// The region.
        name: String,
        /// none, r or rw.
        #[arg(value_parser = parse_prot)]
        prot: Prot,
        /// Byte offset, page multiple.
        #[arg(long, default_value = "0", value_parser = parse_bytes)]
        offset: u64,
        /// Bytes, page multiple; all the rest if not given.
        #[arg(long, value_parser = parse_bytes)]
        len: Option<u64>,
    },
    /// Free the memory of a range; it reads as zero afterwards.
    Discard {
        /// The region.
        name: String,
        /// Byte offset, page multiple.
        #[arg(long, default_value = "0", value_parser = parse_bytes)]
        offset: u64,
        /// Bytes, page multiple; all the rest if not given.
        #[arg(long, value_parser = parse_bytes)]
        len: Option<u64>,
    },
}

/// Why it did not work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither a broker nor a request.
    #[error("nothing to do: give --size to run a broker, or a command such as ls; see --help")]
    Nothing,
    /// A broker and a request at once.
    #[error("--size, --window, --pages and --recover run a broker; leave them out to ask one")]
    Both,
    /// No socket.
    #[error("--socket PATH is needed")]
    NoSocket,
    /// The pool cannot be made.
    #[error("cannot make the pool")]
    Broker(#[from] BrokerError),
    /// The broker does not listen.
    #[error("cannot serve the pool")]
    Server(#[from] ServerError),
    /// No way to be told to end.
    #[error("cannot wait for signals")]
    Signals(#[source] io::Error),
    /// The broker refuses.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// A file of the host.
    #[error("cannot open {path}")]
    Open {
        /// Which.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// Standard output is gone.
    #[error("cannot write the result")]
    Output(#[from] io::Error),
    /// The result has no JSON.
    #[error("cannot print JSON")]
    Json(#[from] serde_json::Error),
}

impl Error {
    /// Whether the command line is wrong.
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::Nothing | Self::Both | Self::NoSocket)
    }
}

impl Pool {
    /// Does what the arguments ask for.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub fn run(self) -> Result<(), Error> {
        let socket = self.socket.ok_or(Error::NoSocket)?;
        if let Some(action) = self.action {
            // clap cannot refuse some options beside a subcommand and take
            // others.
            if self.size.is_some() || self.recover {
                return Err(Error::Both);
            }
            let wait = Wait::broker(&socket);
            let client = admin::connect(&socket)?;
            drop(wait);
            return act(&client, action, &mut io::stdout().lock());
        }
        // Only a broker reads them: whoever asks one is ended by the signal
        // itself, whatever it waits for. Before there are threads, which
        // inherit the mask.
        let signals = Signals::block().map_err(Error::Signals)?;
        let start = match self.size {
            Some(size) => {
                let mut config = PoolConfig::new(size.0);
                config.huge_pages = self.pages == Some(PageSize::Huge);
                if let Some(window) = self.window {
                    config.window_gpa = window;
                }
                Start::from(Broker::new(&config)?)
            }
            None if self.recover => Start::Recover {
                max_regions: PoolConfig::new(0).max_regions,
            },
            None => return Err(Error::Nothing),
        };
        let server = Server::start(Listener::bind(&socket)?, start, Options::default())?;
        log::info!("serving a pool at {}", socket.display());
        wait(signals);
        drop(server);
        Ok(())
    }
}

fn wait(mut signals: Signals) {
    while signals.pending().is_none() {
        // An interrupted wait is taken up again.
        let _ = poll(&mut [PollFd::new(&signals, PollFlags::IN)], None);
    }
}

fn act(client: &Client, action: Action, out: &mut impl Write) -> Result<(), Error> {
    match action {
        Action::Ls { json } => {
            let regions = admin::list(client)?;
            if json {
                writeln!(out, "{}", serde_json::to_string_pretty(&regions)?)?;
            } else {
                list(&regions, out)?;
            }
        }
        Action::Stat {
            name: Some(name),
            json,
        } => {
            let region = admin::stat(client, name.as_bytes())?;
            if json {
                writeln!(out, "{}", serde_json::to_string_pretty(&region)?)?;
            } else {
                describe(&region, out)?;
            }
        }
        Action::Stat { name: None, json } => {
            let stat = admin::pool_stat(client)?;
            if json {
                writeln!(out, "{}", serde_json::to_string_pretty(&stat)?)?;
            } else {
                describe_pool(&stat, out)?;
            }
        }
        Action::Create {
            name,
            address,
            len,
            mode,
        } => drop(admin::create(
            client,
            name.as_bytes(),
            mode,
            address,
            len.0,
        )?),
        Action::Rm { name } => admin::remove(client, name.as_bytes())?,
        Action::Fill { name, file, offset } => {
            let written = if file.as_os_str() == "-" {
                admin::fill(client, name.as_bytes(), offset, &mut io::stdin().lock())?
            } else {
                let mut input = File::open(&file).map_err(|source| Error::Open {
                    path: file.clone(),
                    source,
                })?;
                admin::fill(client, name.as_bytes(), offset, &mut input)?
            };
            writeln!(out, "{written} bytes written")?;
        }
        Action::Read { name, offset, len } => {
            let len = rest(client, &name, offset, len)?.1;
            admin::read(client, name.as_bytes(), offset, len, out)?;
        }
        Action::Protect {
            name,
            prot,
            offset,
            len,
        } => {
            let (id, len) = rest(client, &name, offset, len)?;
            client
                .protect(id, offset, len, prot)
                .map_err(AdminError::from)?;
        }
        Action::Discard { name, offset, len } => {
            let (id, len) = rest(client, &name, offset, len)?;
            client.discard(id, offset, len).map_err(AdminError::from)?;
        }
    }
    out.flush()?;
    Ok(())
}

/// The region's id and, if `len` is not given, what is left behind `offset`.
fn rest(client: &Client, name: &str, offset: u64, len: Option<u64>) -> Result<(u64, u64), Error> {
    let region = admin::stat(client, name.as_bytes())?;
    Ok((region.id, len.unwrap_or(region.len.saturating_sub(offset))))
}

fn text(name: &[u8]) -> String {
    if name.is_empty() {
        "(unlinked)".to_owned()
    } else {
        name.escape_ascii().to_string()
    }
}

fn list(regions: &[Region], out: &mut impl Write) -> io::Result<()> {
    writeln!(
        out,
        "{:<24} {:>16} {:>10} {:>12} {:>10} {:>5}  GUESTS",
        "NAME", "ADDRESS", "LENGTH", "RESIDENT", "TABLES", "MODE"
    )?;
    for region in regions {
        writeln!(
            out,
            "{:<24} {:>#16x} {:>10} {:>8} KiB {:>6} KiB {:>5o}  {}",
            text(&region.name),
            region.start,
            MemorySize(region.len).to_string(),
            region.resident >> 10,
            region.table_bytes >> 10,
            region.mode,
            region.attached.join(", ")
        )?;
    }
    Ok(())
}

fn describe(region: &Region, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "name      {}", text(&region.name))?;
    writeln!(out, "id        {}", region.id)?;
    writeln!(out, "address   {:#x}", region.start)?;
    writeln!(out, "length    {}", MemorySize(region.len))?;
    writeln!(out, "resident  {} KiB", region.resident >> 10)?;
    writeln!(out, "tables    {} KiB", region.table_bytes >> 10)?;
    writeln!(out, "mode      {:o}", region.mode)?;
    writeln!(out, "owner     {}:{}", region.uid, region.gid)?;
    writeln!(out, "guests    {}", region.attached.join(", "))
}

fn describe_pool(stat: &PoolStat, out: &mut impl Write) -> io::Result<()> {
    let geometry = &stat.geometry;
    writeln!(
        out,
        "window    {:#x}..{:#x}, data from {:#x}",
        geometry.window_gpa,
        geometry.window_gpa + geometry.window_len(),
        geometry.window_gpa + geometry.data_off
    )?;
    writeln!(out, "size      {}", MemorySize(geometry.data_len))?;
    let pages = if geometry.huge_pages { "2M" } else { "4K" };
    writeln!(out, "pages     {pages}")?;
    writeln!(
        out,
        "free      {}, longest run {}",
        MemorySize(stat.data_free),
        MemorySize(stat.data_free_run)
    )?;
    writeln!(out, "resident  {} KiB", stat.resident >> 10)?;
    writeln!(out, "tables    {} KiB", stat.table_bytes >> 10)?;
    writeln!(out, "regions   {}", stat.regions)?;
    writeln!(out, "guests    {}", stat.guests.join(", "))
}

fn parse_mode(text: &str) -> Result<u32, String> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| *mode <= 0o777)
        .ok_or_else(|| "give permission bits in octal, such as 640".to_owned())
}

fn parse_prot(text: &str) -> Result<Prot, String> {
    match text {
        "none" => Ok(Prot::None),
        "r" => Ok(Prot::Read),
        "rw" => Ok(Prot::ReadWrite),
        _ => Err("give none, r or rw".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        pool: Pool,
    }

    fn parse(words: &str) -> Pool {
        let argv = format!("pool --socket /nonexistent/s {words}");
        Cli::try_parse_from(argv.split(' ')).unwrap().pool
    }

    #[test]
    fn addresses_offsets_and_lengths_take_units() {
        let action = parse("create a --address 16T --len 0x200000").action;
        let Some(Action::Create { address, len, .. }) = action else {
            panic!("{action:?}")
        };
        assert_eq!((address, len.0), (16 << 40, 2 << 20));
        let action = parse("protect a r --offset 2M --len 64KiB").action;
        let Some(Action::Protect { offset, len, .. }) = action else {
            panic!("{action:?}")
        };
        assert_eq!((offset, len), (2 << 20, Some(64 << 10)));
        assert_eq!(parse("--size 1G --window 512G").window, Some(512 << 30));
    }

    #[test]
    fn broker_and_request_at_once_are_refused() {
        for words in ["--size 1G ls", "--recover ls", "--size 1G --pages 2M rm a"] {
            let error = parse(words).run().unwrap_err();
            assert!(matches!(error, Error::Both), "{words}: {error}");
            assert!(error.is_usage());
        }
        assert!(!parse("ls").run().unwrap_err().is_usage());
    }
}
