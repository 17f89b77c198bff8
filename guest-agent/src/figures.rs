//! Figures from /proc.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use mshare_protocol::agent::{
    Failure, Figures, GroupInfo, Info, LogLine, MSHAREFS, ProcessFigures, VERSION,
};

use crate::region;
use crate::spin::monotonic_ns;

/// Longest tail of the kernel's log: keeps the answer within one message.
const MAX_LINES: u32 = 4096;

/// Reads a text file of /proc.
fn text(path: &str) -> Result<String, Failure> {
    fs::read_to_string(path).map_err(|e| Failure::os(format_args!("read {path}"), &e))
}

/// The agent and its kernel.
///
/// # Errors
/// If /proc is not mounted.
pub fn info() -> Result<Info, Failure> {
    let uname = rustix::system::uname();
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get());
    Ok(Info {
        version: VERSION,
        init: rustix::process::getpid().is_init(),
        release: uname.release().to_string_lossy().into_owned(),
        cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
        cmdline: text("/proc/cmdline")?.trim_end().to_owned(),
        mshare: region::present(),
        pool: Path::new(MSHAREFS).join("pool").is_dir(),
        monotonic_ns: monotonic_ns(),
    })
}

/// `/proc/meminfo`, and the processes of `groups`.
///
/// # Errors
/// If /proc is not mounted.
pub fn figures(groups: &[GroupInfo]) -> Result<Figures, Failure> {
    let processes = groups
        .iter()
        .flat_map(|g| g.pids.iter().zip(0..).map(move |(pid, i)| (g, *pid, i)))
        // One that has ended meanwhile has no figures.
        .filter_map(|(g, pid, i)| process(&g.group, pid, i))
        .collect();
    Ok(Figures {
        meminfo: fields(&text("/proc/meminfo")?),
        processes,
    })
}

fn process(group: &str, pid: i32, index: u32) -> Option<ProcessFigures> {
    if pid == 0 {
        return None;
    }
    let status = fields(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?);
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (minflt, majflt) = fault_counts(&stat)?;
    let kib = |name: &str| status.get(name).copied().unwrap_or(0);
    Some(ProcessFigures {
        group: group.to_owned(),
        process: index,
        pid,
        vm_pte_kib: kib("VmPTE"),
        rss_kib: kib("VmRSS"),
        vm_size_kib: kib("VmSize"),
        minflt,
        majflt,
    })
}

/// Lines of `Name:   number [kB]`; others are left out.
fn fields(text: &str) -> BTreeMap<String, u64> {
    text.lines()
        .filter_map(|line| {
            let (name, rest) = line.split_once(':')?;
            let value = rest.split_whitespace().next()?.parse().ok()?;
            Some((name.to_owned(), value))
        })
        .collect()
}

/// Fields 10 (minflt) and 12 (majflt) of `/proc/PID/stat`. The name, field 2,
/// may contain anything, so count from the parenthesis that ends it.
fn fault_counts(stat: &str) -> Option<(u64, u64)> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(7);
    let minflt = fields.next()?.parse().ok()?;
    let majflt = fields.nth(1)?.parse().ok()?;
    Some((minflt, majflt))
}

/// `/proc/interrupts`, each summed over the CPUs. A device's line is called by
/// its number and its device, a virtio device with its driver:
/// `25 virtio1 virtio_mshare`.
///
/// # Errors
/// If /proc is not mounted.
pub fn interrupts() -> Result<BTreeMap<String, u64>, Failure> {
    let driver = |device: &str| {
        let link = fs::read_link(format!("/sys/bus/virtio/devices/{device}/driver")).ok()?;
        Some(link.file_name()?.to_string_lossy().into_owned())
    };
    Ok(sum_interrupts(&text("/proc/interrupts")?, driver))
}

fn sum_interrupts(text: &str, driver: impl Fn(&str) -> Option<String>) -> BTreeMap<String, u64> {
    let mut lines = text.lines();
    // The first line names the CPUs, which says how many numbers are counts.
    let cpus = lines.next().map_or(0, |l| l.split_whitespace().count());
    lines
        .filter_map(|line| {
            let (name, rest) = line.split_once(':')?;
            let mut name = name.trim().to_owned();
            let counts = rest.split_whitespace().take(cpus);
            let sum = counts.map_while(|c| c.parse::<u64>().ok()).sum();
            if name.parse::<u32>().is_ok()
                && let Some(device) = rest.split_whitespace().last()
            {
                name = format!("{name} {device}");
                if let Some(driver) = driver(device) {
                    name = format!("{name} {driver}");
                }
            }
            Some((name, sum))
        })
        .collect()
}

/// The last `lines` lines of the kernel's log.
///
/// # Errors
/// If /dev/kmsg cannot be read.
pub fn dmesg(lines: u32) -> Result<Vec<LogLine>, Failure> {
    let fail = |e: &io::Error| Failure::os("read /dev/kmsg", e);
    let mut kmsg = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/kmsg")
        .map_err(|e| fail(&e))?;
    let keep = lines.min(MAX_LINES) as usize;
    let mut tail = VecDeque::new();
    let mut buffer = vec![0; 8192];
    loop {
        match kmsg.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => tail.extend(record(&String::from_utf8_lossy(&buffer[..n]))),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            // Older records were overwritten while we read: go on behind them.
            Err(e) if e.raw_os_error() == Some(libc::EPIPE) => {}
            Err(e) => return Err(fail(&e)),
        }
        while tail.len() > keep {
            tail.pop_front();
        }
    }
    Ok(tail.into())
}

/// A record of /dev/kmsg: `prio,seq,time,flags[,...];text`, then lines with
/// ` KEY=value` (Documentation/ABI/testing/dev-kmsg).
fn record(record: &str) -> Option<LogLine> {
    let (head, rest) = record.split_once(';')?;
    let mut head = head.split(',');
    let prio: u32 = head.next()?.parse().ok()?;
    let time_us = head.nth(1)?.parse().ok()?;
    Some(LogLine {
        level: u8::try_from(prio & 7).ok()?,
        time_us,
        text: rest.lines().next().unwrap_or("").to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_fields_are_numbers_by_name() {
        let fields = fields("MemTotal:  100 kB\nName:\tguest-agent\nHugePages_Total:  2\n");
        assert_eq!(fields.len(), 2);
        assert_eq!((fields["MemTotal"], fields["HugePages_Total"]), (100, 2));
    }

    #[test]
    fn fault_counts_survive_a_name_with_parentheses() {
        let stat = "7 (a) b) (c) S 1 7 7 0 -1 4194304 11 22 33 44 5 6";
        assert_eq!(fault_counts(stat), Some((11, 33)));
    }

    #[test]
    fn interrupts_are_summed_over_cpus_only() {
        let text = "      CPU0  CPU1\n  9:  1  2  IO-APIC 9-fasteoi 5 acpi\n 25:  2  0  IO-APIC 7-edge virtio1\nTLB: 10 20 TLB shootdowns\nERR: 3\n";
        let driver = |device: &str| (device == "virtio1").then(|| "virtio_mshare".to_owned());
        let sums = sum_interrupts(text, driver);
        assert_eq!((sums["9 acpi"], sums["TLB"], sums["ERR"]), (3, 30, 3));
        assert_eq!(sums["25 virtio1 virtio_mshare"], 2);
    }

    #[test]
    fn kmsg_record_gives_level_time_and_first_line() {
        let line = record("12,339,5140900,-,caller=T1;Bad page state\n SUBSYSTEM=x\n").unwrap();
        assert_eq!((line.level, line.time_us), (4, 5_140_900));
        assert_eq!(line.text, "Bad page state");
        assert!(line.is_complaint());
    }
}
