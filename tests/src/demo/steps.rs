//! The first half of the demo: shared tables.

use std::thread;
use std::time::Duration;

use mshare_pool::admin;
use mshare_protocol::agent::{Fault, Map, MemOp, Op, RegionOp, Spin, SpinKind, Value};
use mshare_protocol::entry::Prot;

use super::cost::{self, Cost};
use super::pair::{Pair, at, pool_name};
use super::{Failed, PROCESSES, REGION, REGION_LEN, Verdicts, ensure};
use crate::guests::Images;

const PAGE: u64 = 4096;
/// Offset of the page that the host fills.
const HOST_PAGE: u64 = 100 << 20;
/// Offset of the page that B writes when it is protected.
const SPIN_PAGE: u64 = 20 << 20;

/// Runs the steps; the figures of the shared tables if they were measured.
pub fn run(images: &Images, verdicts: &mut Verdicts) -> Option<Cost> {
    let mut pair = verdicts.step("two guests boot", || {
        let (pair, took) = Pair::start(images, "rw")?;
        Ok((
            pair,
            format!("both agents answer after {:.1} s", took.as_secs_f64()),
        ))
    })?;
    verdicts.step("A creates, 8 processes in each guest attach", || {
        pair.attach()?;
        let region = pair.pool.lookup(REGION.as_bytes())?;
        ensure(
            region.len == REGION_LEN && region.attached.len() == 2,
            || format!("the broker has {region:?}"),
        )?;
        let tables = pair.pool.stat(region.id)?.table_bytes >> 10;
        Ok((
            (),
            format!("one set of tables, {tables} KiB, in two guests"),
        ))
    })?;
    verdicts.step("A writes a pattern, B reads it", || {
        let words = pair.pass_pattern(0, 1, 1)?;
        Ok((
            (),
            format!("{words} words in {PROCESSES} processes, none wrong"),
        ))
    });
    verdicts.step("B writes a pattern, A reads it", || {
        let words = pair.pass_pattern(1, 0, 2)?;
        Ok((
            (),
            format!("{words} words in {PROCESSES} processes, none wrong"),
        ))
    });
    let cost = verdicts.step("shared tables are measured", || {
        let cost = cost::measure(&mut pair)?;
        let saw = format!(
            "{} minor faults in {} processes",
            cost.faults,
            2 * PROCESSES
        );
        Ok((cost, saw))
    });
    verdicts.step("a page that the host fills appears in both", || {
        host_page(&mut pair)
    });
    verdicts.step("protect stops a process of B that spins on writes", || {
        protect_stops_writer(&mut pair)
    });
    verdicts.step("discard reads as zero", || discard(&mut pair));
    verdicts.step("an O_RDONLY attach is refused its write", || {
        read_only(&mut pair)
    });
    verdicts.step("B is killed with SIGKILL, A goes on", || kill_b(&mut pair));
    verdicts.step("unlink gives the memory back", || unlink(&mut pair));
    verdicts.step("A's kernel has nothing to complain about", || {
        let complaints = pair.agents[0].complaints()?;
        ensure(complaints.is_empty(), || complaints.join("\n"))?;
        Ok(((), "no warning in its log".to_owned()))
    });
    cost
}

fn host_page(pair: &mut Pair) -> Result<((), String), Failed> {
    let page: Vec<u8> = (0..PAGE).map(|i| (i % 251).to_le_bytes()[0]).collect();
    let word = u64::from_le_bytes(page[..8].try_into()?);
    admin::fill(
        &pair.pool,
        REGION.as_bytes(),
        HOST_PAGE,
        &mut page.as_slice(),
    )?;
    for agent in &mut pair.agents {
        for value in agent.run_all("workers", at(HOST_PAGE, MemOp::Load))? {
            ensure(value == Value::Word(word), || {
                format!("a worker read {value:?}")
            })?;
        }
    }
    Ok((
        (),
        format!("all {} processes read {word:#018x}", 2 * PROCESSES),
    ))
}

/// The word that B's spinner writes, read by the host.
fn host_word(pair: &Pair, offset: u64) -> Result<u64, Failed> {
    let mut bytes = Vec::new();
    admin::read(&pair.pool, REGION.as_bytes(), offset, 8, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes.as_slice().try_into()?))
}

fn protect_stops_writer(pair: &mut Pair) -> Result<((), String), Failed> {
    let spin = at(SPIN_PAGE, MemOp::Spin(SpinKind::Write));
    pair.agents[1].run_one("workers", 0, spin)?;
    let first = host_word(pair, SPIN_PAGE)?;
    thread::sleep(Duration::from_millis(200));
    let second = host_word(pair, SPIN_PAGE)?;
    ensure(first != second, || "B does not write".to_owned())?;

    let before = shootdown_interrupts(pair)?;
    let protect = RegionOp::Protect {
        name: pool_name(),
        offset: SPIN_PAGE,
        len: PAGE,
        prot: Prot::Read.bits(),
    };
    pair.agents[0].region(protect)?;
    let at_return = host_word(pair, SPIN_PAGE)?;
    thread::sleep(Duration::from_millis(300));
    let later = host_word(pair, SPIN_PAGE)?;
    let after = shootdown_interrupts(pair)?;

    ensure(at_return == later, || {
        format!(
            "B wrote {} times after protect had returned",
            later - at_return
        )
    })?;
    let status = pair.agents[1].run_one("workers", 0, Op::SpinStop)?;
    let Value::Spin(Spin {
        fault: Some(fault),
        iterations,
        ..
    }) = status
    else {
        return Err(format!("the spinner did not fault: {status:?}").into());
    };
    ensure(fault.signal == libc::SIGSEGV, || {
        format!("the spinner got {fault}")
    })?;
    ensure(before == after, || {
        format!("B handled shootdown interrupts: {before:?} before, {after:?} after")
    })?;
    let upgrade = RegionOp::Protect {
        name: pool_name(),
        offset: SPIN_PAGE,
        len: PAGE,
        prot: Prot::ReadWrite.bits(),
    };
    pair.agents[0].region(upgrade)?;
    pair.agents[1].run_one("workers", 0, at(SPIN_PAGE, MemOp::Store { value: 7 }))?;
    Ok((
        (),
        format!(
            "SIGSEGV after {iterations} writes, none after protect returned; B handled no \
             shootdown and no device interrupt for it; writable again on request"
        ),
    ))
}

/// Interrupts of guest B that could have carried a shootdown: TLB shootdowns
/// of its own kernel and those of the mshare device.
fn shootdown_interrupts(pair: &mut Pair) -> Result<Vec<(String, u64)>, Failed> {
    let counts = pair.agents[1].interrupts()?;
    Ok(counts
        .into_iter()
        .filter(|(name, _)| name.contains("TLB") || name.contains("mshare"))
        .collect())
}

fn discard(pair: &mut Pair) -> Result<((), String), Failed> {
    let name = pool_name();
    let (offset, len) = (HOST_PAGE, 2 << 20);
    pair.agents[1].region(RegionOp::Discard { name, offset, len })?;
    let zero = at(offset, MemOp::VerifyZero { len });
    for agent in &mut pair.agents {
        for value in agent.run_all("workers", zero.clone())? {
            let Value::Verified(verified) = value else {
                return Err(format!("a worker answered {value:?}").into());
            };
            ensure(verified.bad == 0, || {
                format!("{} words are not zero", verified.bad)
            })?;
        }
    }
    Ok(((), format!("2 MiB, in all {} processes", 2 * PROCESSES)))
}

fn read_only(pair: &mut Pair) -> Result<((), String), Failed> {
    let b = &mut pair.agents[1];
    b.start_group("readers", 1, Some(Map::attach_ro(&pool_name())))?;
    let read = b.run_one("readers", 0, at(0, MemOp::Try { write: false }))?;
    ensure(read == Value::Access(None), || {
        format!("the read: {read:?}")
    })?;
    let write = b.run_one("readers", 0, at(0, MemOp::Try { write: true }))?;
    let Value::Access(Some(Fault { signal, .. })) = write else {
        return Err(format!("the write was not refused: {write:?}").into());
    };
    ensure(signal == libc::SIGSEGV, || {
        format!("the write got signal {signal}")
    })?;
    // The shared entry itself allows the write: a peer's succeeds.
    b.run_one("workers", 0, at(0, MemOp::Try { write: true }))?;
    b.stop_group("readers")?;
    Ok((
        (),
        "SIGSEGV from its link; a writer's access through the same entry succeeds".to_owned(),
    ))
}

fn kill_b(pair: &mut Pair) -> Result<((), String), Failed> {
    let pid = child_named(pair.supervisor.pid(), "guest1")?;
    rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
    let id = pair.pool.lookup(REGION.as_bytes())?.id;
    let mut attached = Vec::new();
    for _ in 0..100 {
        attached = pair.pool.stat(id)?.attached;
        if attached.len() == 1 {
            break;
        }
        thread::sleep(Duration::from_millis(20));
    }
    ensure(attached == ["guest0"], || {
        format!("still attached: {attached:?}")
    })?;
    let words = pair.pass_pattern(0, 0, 5)?;
    Ok((
        (),
        format!("the broker has detached it; A wrote and compared {words} words"),
    ))
}

/// The child of `parent` that has `name` on its command line.
fn child_named(parent: u32, name: &str) -> Result<rustix::process::Pid, Failed> {
    let children = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"))?;
    for child in children.split_whitespace() {
        let line = std::fs::read(format!("/proc/{child}/cmdline"))?;
        if line.split(|&b| b == 0).any(|word| word == name.as_bytes()) {
            return rustix::process::Pid::from_raw(child.parse()?)
                .ok_or_else(|| "a child without a process id".into());
        }
    }
    Err(format!("the supervisor has no child called {name}").into())
}

fn unlink(pair: &mut Pair) -> Result<((), String), Failed> {
    let before = pair.pool.pool_stat()?;
    let a = &mut pair.agents[0];
    a.run_all(
        "workers",
        Op::Region(RegionOp::Unlink { name: pool_name() }),
    )?;
    let gone = pair.pool.lookup(REGION.as_bytes());
    ensure(
        matches!(&gone, Err(failure) if failure.errno == libc::ENOENT),
        || format!("the name is still there: {gone:?}"),
    )?;
    let mut after = pair.pool.pool_stat()?;
    for _ in 0..100 {
        if after.resident == 0 && after.table_bytes == 0 {
            break;
        }
        thread::sleep(Duration::from_millis(20));
        after = pair.pool.pool_stat()?;
    }
    ensure(after.resident == 0 && after.table_bytes == 0, || {
        format!(
            "{} bytes of data, {} of tables are left",
            after.resident, after.table_bytes
        )
    })?;
    Ok((
        (),
        format!(
            "{} MiB of data and {} KiB of tables before, nothing after",
            before.resident >> 20,
            before.table_bytes >> 10
        ),
    ))
}
