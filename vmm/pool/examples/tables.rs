//! Measures the table editor: `cargo run --release -p mshare-pool --example
//! tables -- [GiB]` builds the tables of a region of that size (256 if not
//! given), changes protections in several ways and prints the cost of each.
//! It needs 2 MiB of memory for each GiB, twice that while it protects all.

use std::error::Error;
use std::time::{Duration, Instant};

use mshare_pool::directory::Directory;
use mshare_pool::editor::Tables;
use mshare_pool::layout::PoolConfig;
use mshare_pool::memory::{PoolFiles, SharedFile};
use mshare_protocol::entry::{ENTRIES, PAGE_SIZE, PMD_SIZE, PUD_SIZE, Prot};

/// Prints one line: what, how long, and the time for each of `count` things.
#[allow(clippy::cast_precision_loss)] // For people to read.
fn line(what: &str, took: Duration, count: u64, unit: &str) {
    let each = took.as_nanos() as f64 / count as f64;
    println!(
        "{what:<44} {:>9.2} ms {each:>10.2} ns/{unit}",
        took.as_secs_f64() * 1e3
    );
}

fn main() -> Result<(), Box<dyn Error>> {
    let gib: u64 = std::env::args().nth(1).map_or(Ok(256), |arg| arg.parse())?;
    let len = gib * PUD_SIZE;
    let geometry = PoolConfig::new(len).geometry([0; 16])?;
    let files = PoolFiles::create(&geometry)?;
    let mut directory = Directory::create(&files, &geometry, 1)?;
    let file = SharedFile::open(files.tables())?;
    let id = directory.create_region(b"bench", 0o600, 0, 0)?;
    let Some(span) = directory.begin_build(id, PUD_SIZE, len)? else {
        return Err("the region is sized already".into());
    };
    let (ptes, units) = (len / PAGE_SIZE, len / PMD_SIZE);

    let start = Instant::now();
    let mut tables = Tables::build(&file, span, Prot::ReadWrite)?;
    line(&format!("build {gib} GiB"), start.elapsed(), ptes, "PTE");
    println!("{:<44} {:>9} KiB", "  tables", tables.bytes() / 1024);

    let start = Instant::now();
    tables.protect(&file, 0, ptes, Prot::Read)?;
    line(
        "protect all down (copy, publish, punch)",
        start.elapsed(),
        units,
        "2 MiB",
    );
    let start = Instant::now();
    tables.protect(&file, 0, ptes, Prot::ReadWrite)?;
    line("protect all up (in place)", start.elapsed(), units, "2 MiB");

    let count = units.min(4096);
    let start = Instant::now();
    for unit in 0..count {
        tables.protect(&file, unit * ENTRIES, ENTRIES, Prot::Read)?;
    }
    line(
        "protect 2 MiB down, one call each",
        start.elapsed(),
        count,
        "call",
    );
    let start = Instant::now();
    for unit in 0..count {
        tables.protect(&file, unit * ENTRIES, ENTRIES, Prot::ReadWrite)?;
    }
    line(
        "protect 2 MiB up, one call each",
        start.elapsed(),
        count,
        "call",
    );
    let start = Instant::now();
    for unit in 0..count {
        tables.protect(&file, unit * ENTRIES, 1, Prot::Read)?;
    }
    line(
        "protect 4 KiB down, one call each",
        start.elapsed(),
        count,
        "call",
    );

    let start = Instant::now();
    let (again, found) = Tables::recover(&file, span)?;
    line("recover", start.elapsed(), units, "2 MiB");
    if found.damaged != 0 || again.bytes() != tables.bytes() {
        return Err("recovery found something else".into());
    }
    let start = Instant::now();
    Tables::destroy(&file, &span)?;
    line("destroy", start.elapsed(), units, "2 MiB");
    Ok(())
}
