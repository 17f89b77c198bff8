//! Finds out what this host can do: by asking where the host tells, by trying
//! where it does not. Every trial is bounded in time.

pub mod guest;
pub mod kernel_code;
mod render;
pub mod tables;

use std::fs::File;

use kvm_bindings::{KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_SLOT_ZAP_ALL};
use kvm_ioctls::Kvm;
use serde::Serialize;

use crate::config::MemorySize;
use crate::exit::ExitStatus;
use crate::host;
use crate::vstate::memory::{self, memory_file};
use crate::vstate::vm;
use kernel_code::{KernelCode, Outcome};
use tables::{Edits, Tables};

/// What is said where hardware does not run kernel-mode code.
const HARDWARE_ADVICE: &str =
    "use a host whose CPU runs guests in hardware (VT-x, SVM), or the lab, an emulated machine";
const CAPABILITIES: &str = "capabilities";
/// Whether shared memory gets huge pages (`Documentation/admin-guide/mm/transhuge.rst`).
pub const SHMEM_ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// As it should be.
    Good,
    /// Works, but not as well as it could.
    Fair,
    /// Missing.
    Bad,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// How it came out.
    pub state: State,
    /// What was found.
    pub found: String,
    /// What to do about it, if anything.
    pub advice: Option<&'static str>,
}

impl Check {
    /// `advice` says what to do if it came out other than good.
    fn new(
        name: &'static str,
        state: State,
        found: impl Into<String>,
        advice: &'static str,
    ) -> Self {
        Self {
            name,
            state,
            found: found.into(),
            advice: (state != State::Good).then_some(advice),
        }
    }
}

/// What this host can do.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Whether Linux guests boot here.
    pub can_boot_linux: bool,
    /// Whether guests can share page tables here. If not, regions are attached
    /// privately.
    pub shared_tables: bool,
    /// What was found about kernel-mode code, if there is a KVM.
    pub kernel_code: Option<KernelCode>,
    /// What was found about page tables, if there is a KVM.
    pub tables: Option<Tables>,
    /// Everything that was looked at.
    pub checks: Vec<Check>,
}

impl Report {
    /// The exit status of `vmm doctor`.
    pub fn status(&self) -> ExitStatus {
        match (self.can_boot_linux, self.shared_tables) {
            (true, true) => ExitStatus::Success,
            (true, false) => ExitStatus::NoSharedTables,
            (false, _) => ExitStatus::NoGuests,
        }
    }
}

/// Whether Linux guests boot on `kvm`: takes a few milliseconds where they do.
pub fn probe_kernel_code(kvm: &Kvm) -> KernelCode {
    kernel_code::probe(kvm)
}

/// Whether guests of `kvm` can share page tables: a few milliseconds.
pub fn probe_shared_tables(kvm: &Kvm) -> Tables {
    tables::probe(kvm)
}

/// Looks at everything, in less than 300 ms; where a probe guest does not come
/// back at once, it says so and takes up to nine seconds.
pub fn probe() -> Report {
    let mut report = Report {
        can_boot_linux: false,
        shared_tables: false,
        kernel_code: None,
        tables: None,
        checks: Vec::new(),
    };
    let kvm = host::open_kvm();
    report.checks.push(check_kvm(&kvm));
    if let Ok(kvm) = kvm {
        probe_kvm(&kvm, &mut report);
    }
    report
        .checks
        .push(check_memfd(&memory_file("doctor", 1 << 21)));
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let memory = read("/proc/meminfo");
    report
        .checks
        .push(check_memory(&memory, host::total_memory()));
    report
        .checks
        .push(check_huge_pages(&read(SHMEM_ENABLED), &memory));
    report
}

/// An error with its causes.
fn told(error: &dyn std::error::Error) -> String {
    mshare_protocol::report::chain(error)
}

fn check_kvm(kvm: &Result<Kvm, host::Error>) -> Check {
    let name = "KVM";
    let error = match kvm {
        Ok(kvm) => {
            let found = format!(
                "/dev/kvm opens, API version {}, up to {} vCPUs and {} memory slots",
                kvm.get_api_version(),
                kvm.get_max_vcpus(),
                kvm.get_nr_memslots()
            );
            return Check::new(name, State::Good, found, "");
        }
        Err(error) => error,
    };
    let advice = match error {
        host::Error::NoKvm => {
            "modprobe kvm_intel or kvm_amd; if that fails, turn on virtualisation in the firmware, \
             or nested virtualisation in the host of this machine"
        }
        host::Error::Permission => {
            "become a member of the group that owns it: usermod -aG kvm USER, then log in again"
        }
        _ => "look at ls -l /dev/kvm and at the kernel's log: this is not a KVM that works",
    };
    Check::new(name, State::Bad, told(error), advice)
}

fn check_capabilities(machine: &Result<vm::Vm, vm::Error>) -> Check {
    let (state, found) = match machine {
        Ok(_) => (State::Good, "all that is needed".to_owned()),
        Err(error) => (State::Bad, told(error)),
    };
    let advice = "use a newer host kernel (6.1 or later)";
    Check::new(CAPABILITIES, state, found, advice)
}

fn probe_kvm(kvm: &Kvm, report: &mut Report) {
    report.checks.push(check_capabilities(&vm::Vm::new(kvm)));
    let code = kernel_code::probe(kvm);
    let tables = tables::probe(kvm);
    report.checks.push(check_kernel_code(&code));
    report.checks.push(check_speed(&code));
    report.checks.push(check_paging(&tables));
    report.checks.push(check_edits(&tables));
    let quirks = kvm.check_extension_raw(KVM_CAP_DISABLE_QUIRKS2.into());
    report.checks.push(check_quirk(quirks));
    report.can_boot_linux = code.obstacle().is_none()
        && report
            .checks
            .iter()
            .all(|c| c.name != CAPABILITIES || c.state == State::Good);
    report.shared_tables = tables.shareable();
    report.kernel_code = Some(code);
    report.tables = Some(tables);
}

fn check_kernel_code(code: &KernelCode) -> Check {
    let name = "kernel-mode code";
    if let Some(error) = &code.error {
        let found = format!("no guest runs: {error}");
        let advice = "look at the kernel's log (dmesg) for what KVM says; free some memory; use \
                      another host, or the lab, an emulated machine";
        return Check::new(name, State::Bad, found, advice);
    }
    let failing = code.failing();
    let found = if failing.is_empty() {
        let works = code
            .instructions
            .iter()
            .filter(|(_, o)| *o == Outcome::Works);
        let names: Vec<_> = works.map(|(name, _)| *name).collect();
        let note = match code.keeps_xcr0 {
            Some(false) => " (XCR0 gets lost: guests are shown no XSAVE and no AVX)",
            _ => "",
        };
        format!("{} work{note}", names.join(", "))
    } else {
        format!("{} do not work", failing.join(", "))
    };
    let state = if failing.is_empty() {
        State::Good
    } else {
        State::Bad
    };
    Check::new(name, state, found, HARDWARE_ADVICE)
}

fn check_speed(code: &KernelCode) -> Check {
    let name = "kernel-mode speed";
    match code.mips {
        Some(mips) => {
            let (state, how) = if code.interpreted() {
                (State::Fair, ": interpreted, not run")
            } else {
                (State::Good, "")
            };
            let digits = usize::from(state != State::Good);
            let found = format!("{mips:.digits$} million instructions a second{how}");
            Check::new(name, state, found, HARDWARE_ADVICE)
        }
        None => Check::new(
            name,
            State::Fair,
            "could not be measured",
            "see to what is wrong above; on a busy host, ask again when it is idle",
        ),
    }
}

fn check_paging(tables: &Tables) -> Check {
    let mut found = format!("KVM_CAP_PRE_FAULT_MEMORY is {}", tables.pre_fault_memory);
    if let Some(parameter) = &tables.module_parameter {
        found = format!("{found}, {parameter}");
    }
    let (state, verdict) = match tables.two_dimensional {
        Some(true) => (State::Good, "yes"),
        Some(false) => (State::Bad, "no, shadow paging"),
        None => (State::Fair, "not known"),
    };
    Check::new(
        "two-dimensional paging",
        state,
        format!("{verdict} ({found})"),
        "load kvm_intel with ept=1 or kvm_amd with npt=1, on a CPU that has it",
    )
}

fn check_edits(tables: &Tables) -> Check {
    let (state, found) = match &tables.edits {
        Edits::Seen => (State::Good, "a guest sees the host's edit at once".into()),
        Edits::Stale => (
            State::Bad,
            "a guest goes on with the old translation: STALE".into(),
        ),
        Edits::Unknown(why) => (State::Bad, format!("could not be tried: {why}")),
    };
    let advice = match &tables.edits {
        Edits::Unknown(_) => {
            "see to what is wrong above; on a busy host, ask again when it is idle; until then \
             guests attach regions privately"
        }
        _ => "guests attach regions privately: data is shared, page tables are not",
    };
    Check::new("table edits", state, found, advice)
}

/// `offered`: what KVM_CAP_DISABLE_QUIRKS2 says.
fn check_quirk(offered: i32) -> Check {
    let zap = i64::from(offered) & i64::from(KVM_X86_QUIRK_SLOT_ZAP_ALL) != 0;
    let (state, found) = if zap {
        (State::Good, "removes one slot's mappings only")
    } else {
        (State::Fair, "removes the mappings of all slots")
    };
    let advice = "nothing is wrong, but detaching is cheaper on a host with Linux 6.12 or later";
    Check::new("detach", state, found, advice)
}

fn check_memfd(file: &Result<File, memory::Error>) -> Check {
    let (state, found) = match file {
        Ok(_) => (State::Good, "works, with seals".to_owned()),
        Err(error) => (State::Bad, told(error)),
    };
    let advice = "use a kernel with CONFIG_MEMFD_CREATE and CONFIG_TMPFS";
    Check::new("memfd", state, found, advice)
}

/// A value of `/proc/meminfo`, or of a file like it, in bytes.
#[must_use]
pub fn meminfo(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find(|l| l.split(':').next() == Some(key))?;
    let mut words = line.split_whitespace().skip(1);
    let number: u64 = words.next()?.parse().ok()?;
    Some(if words.next() == Some("kB") {
        number << 10
    } else {
        number
    })
}

/// `text`: /proc/meminfo.
fn check_memory(text: &str, total: u64) -> Check {
    let available = meminfo(text, "MemAvailable");
    let mib = |bytes: u64| MemorySize(bytes & !((1 << 20) - 1));
    let found = match available {
        Some(available) => format!("{} of {} available", mib(available), mib(total)),
        None => mib(total).to_string(),
    };
    let state = if available.unwrap_or(total) < 256 << 20 {
        State::Fair
    } else {
        State::Good
    };
    let advice = "free some memory: a small guest takes 128 MiB";
    Check::new("memory", state, found, advice)
}

/// The choice in brackets of a sysfs file such as `always [madvise] never`.
fn chosen(text: &str) -> Option<&str> {
    text.split_whitespace()
        .find_map(|word| word.strip_prefix('[')?.strip_suffix(']'))
}

/// `shmem_enabled`: what that file of sysfs says; `memory`: /proc/meminfo.
fn check_huge_pages(shmem_enabled: &str, memory: &str) -> Check {
    let mode = chosen(shmem_enabled).unwrap_or("not available").to_owned();
    let reserved = meminfo(memory, "HugePages_Total").unwrap_or(0);
    let state = if matches!(mode.as_str(), "always" | "within_size" | "advise" | "force") {
        State::Good
    } else {
        State::Fair
    };
    let found = format!("shared memory: {mode}; reserved: {reserved}");
    let advice = "for speed, and for small second-stage tables of guests with a pool: \
                  echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled";
    Check::new("huge pages", state, found, advice)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::io;
    use std::time::{Duration, Instant};

    /// What must hold on a host without a KVM that can be opened.
    pub fn no_kvm_is_reported() {
        let report = probe();
        assert_eq!(report.status(), ExitStatus::NoGuests);
        assert_eq!((&report.kernel_code, &report.tables), (&None, &None));
        assert_eq!(report.checks[0].state, State::Bad);
        assert!(report.checks[0].advice.is_some());
    }

    #[test]
    fn probe_is_consistent_and_no_longer_than_it_says() {
        let start = Instant::now();
        let report = probe();
        let took = start.elapsed();
        let limits = [kernel_code::LIMITS, tables::LIMITS].concat();
        let limit = limits.iter().sum::<Duration>();
        assert!(limit <= Duration::from_secs(9), "{limit:?}");
        assert!(took < limit + Duration::from_secs(5), "{took:?}");
        assert_eq!(
            report.status() == ExitStatus::NoGuests,
            !report.can_boot_linux
        );
        let text = report.to_string();
        for check in &report.checks {
            assert!(text.contains(check.name));
            assert_eq!(check.state == State::Good, check.advice.is_none());
        }
    }

    fn code(outcome: Outcome, mips: Option<f64>) -> KernelCode {
        KernelCode {
            instructions: vec![("popcnt", outcome)],
            keeps_xcr0: None,
            mips,
            error: None,
        }
    }

    fn paging(two_dimensional: Option<bool>, edits: Edits) -> Tables {
        Tables {
            pre_fault_memory: 0,
            module_parameter: Some("kvm_amd.npt=N".into()),
            two_dimensional,
            edits,
        }
    }

    fn no_memfd() -> memory::Error {
        memory::Error::Memfd(4096, io::Error::from_raw_os_error(libc::ENOSYS))
    }

    /// Each check in each of its states: what it finds, and what it advises.
    #[test]
    fn every_state_says_what_was_found_and_every_lack_what_to_do() {
        use State::{Bad, Fair, Good};
        let works = || code(Outcome::Works, Some(1000.0));
        let fails = || code(Outcome::Fails("x".into()), Some(1.6));
        let broken = KernelCode {
            error: Some("no memory".into()),
            ..code(Outcome::Works, None)
        };
        let lost_xcr0 = KernelCode {
            keeps_xcr0: Some(false),
            ..works()
        };
        let open = |errno| Err(host::Error::Open(io::Error::from_raw_os_error(errno)));
        let seen = |two| paging(two, Edits::Seen);
        let edits = |edits| paging(None, edits);
        let zap = KVM_X86_QUIRK_SLOT_ZAP_ALL.cast_signed();
        let memory = |mib: u64| format!("MemAvailable: {} kB\n", mib << 10);
        let kvm = check_kvm;
        #[rustfmt::skip]
        let table = [
            (kvm(&Err(host::Error::NoKvm)), Bad, "there is no /dev/kvm", "modprobe"),
            (kvm(&Err(host::Error::Permission)), Bad, "no permission", "usermod"),
            (kvm(&open(libc::EBUSY)), Bad, "cannot open /dev/kvm: Device or resource busy", "log"),
            (kvm(&Err(host::Error::ApiVersion(-1))), Bad, "API version -1", "ls -l"),
            (check_capabilities(&Err(vm::Error::Missing("IRQFD"))), Bad, "lacks IRQFD", "6.1"),
            (check_kernel_code(&works()), Good, "popcnt work", ""),
            (check_kernel_code(&lost_xcr0), Good, "XCR0 gets lost", ""),
            (check_kernel_code(&fails()), Bad, "popcnt do not work", "VT-x, SVM"),
            (check_kernel_code(&broken), Bad, "no guest runs: no memory", "dmesg"),
            (check_speed(&works()), Good, "1000 million", ""),
            (check_speed(&fails()), Fair, "1.6 million instructions a second: interpreted", "VT-x"),
            (check_speed(&broken), Fair, "could not be measured", "when it is idle"),
            (check_paging(&seen(Some(true))), Good, "yes (KVM_CAP_PRE_FAULT_MEMORY is 0", ""),
            (check_paging(&seen(Some(false))), Bad, "no, shadow paging", "ept=1"),
            (check_paging(&seen(None)), Fair, "not known", "npt=1"),
            (check_edits(&edits(Edits::Seen)), Good, "at once", ""),
            (check_edits(&edits(Edits::Stale)), Bad, "STALE", "privately"),
            (check_edits(&edits(Edits::Unknown("why".into()))), Bad, "tried: why", "idle"),
            (check_quirk(zap), Good, "one slot", ""),
            (check_quirk(0), Fair, "all slots", "6.12"),
            (check_memfd(&memory_file("t", 4096)), Good, "seals", ""),
            (check_memfd(&Err(no_memfd())), Bad, "not implemented", "CONFIG_MEMFD_CREATE"),
            (check_memory(&memory(300), 1 << 30), Good, "300 MiB of 1 GiB available", ""),
            (check_memory(&memory(100), 1 << 30), Fair, "100 MiB of 1 GiB available", "free"),
            (check_memory("", 1 << 30), Good, "1 GiB", ""),
            (check_huge_pages("always [advise]", "HugePages_Total: 3"), Good, "reserved: 3", ""),
            (check_huge_pages("always [never]", ""), Fair, "shared memory: never", "echo advise"),
            (check_huge_pages("", ""), Fair, "not available", "echo advise"),
        ];
        for (check, state, found, advice) in table {
            assert_eq!(check.state, state, "{check:?}");
            assert!(check.found.contains(found), "no {found:?} in {check:?}");
            match check.advice {
                Some(text) => assert!(!advice.is_empty() && text.contains(advice), "{check:?}"),
                None => assert_eq!((state, advice), (Good, ""), "{check:?}"),
            }
        }
    }

    #[test]
    fn text_shows_bad_checks_with_their_remedies() {
        let report = Report {
            can_boot_linux: false,
            shared_tables: false,
            kernel_code: None,
            tables: None,
            checks: vec![
                check_kvm(&Err(host::Error::Permission)),
                check_quirk(0),
                check_memory("", 1 << 30),
            ],
        };
        let text = report.to_string();
        let lines: Vec<_> = text.lines().collect();
        assert!(
            lines[0].starts_with("BAD   KVM     no permission"),
            "{text}"
        );
        assert!(lines[1].contains("-> become a member"), "{text}");
        assert!(lines[2].starts_with("fair  detach"), "{text}");
        assert!(lines[3].contains("-> nothing is wrong"), "{text}");
        assert_eq!(lines[4], "ok    memory  1 GiB");
        assert!(lines[5].starts_with("can boot Linux guests: no"), "{text}");
    }

    #[test]
    fn status_tells_the_three_verdicts_apart() {
        let report = |can_boot_linux, shared_tables| Report {
            can_boot_linux,
            shared_tables,
            kernel_code: None,
            tables: None,
            checks: Vec::new(),
        };
        assert_eq!(report(true, true).status(), ExitStatus::Success);
        assert_eq!(report(true, false).status(), ExitStatus::NoSharedTables);
        assert_eq!(report(false, true).status(), ExitStatus::NoGuests);
    }

    #[test]
    fn proc_and_sysfs_texts_are_read() {
        let text = "MemTotal:  100 kB\nHugePages_Total:    7\n";
        assert_eq!(meminfo(text, "MemTotal"), Some(100 << 10));
        assert_eq!(meminfo(text, "HugePages_Total"), Some(7));
        assert_eq!(meminfo(text, "Mem"), None);
        assert_eq!(chosen("always [advise] never\n"), Some("advise"));
        assert_eq!(chosen(""), None);
    }
}
