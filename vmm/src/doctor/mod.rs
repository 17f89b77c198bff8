//! Finds out what this host can do: by asking where the host tells, by trying
//! where it does not. Every trial is bounded in time.

pub mod guest;
pub mod kernel_code;
mod render;
pub mod tables;

use kvm_bindings::{KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_SLOT_ZAP_ALL};
use kvm_ioctls::Kvm;
use serde::Serialize;

use crate::config::MemorySize;
use crate::exit::ExitStatus;
use crate::host;
use crate::vstate::memory::memory_file;
use kernel_code::{KernelCode, Outcome};
use tables::{Edits, Tables};

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
    fn new(name: &'static str, state: State, found: impl Into<String>) -> Self {
        Self {
            name,
            state,
            found: found.into(),
            advice: None,
        }
    }

    fn advise(mut self, advice: &'static str) -> Self {
        if self.state != State::Good {
            self.advice = Some(advice);
        }
        self
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

/// Looks at everything, in less than 300 ms.
pub fn probe() -> Report {
    let mut report = Report {
        can_boot_linux: false,
        shared_tables: false,
        kernel_code: None,
        tables: None,
        checks: Vec::new(),
    };
    match host::open_kvm() {
        Ok(kvm) => probe_kvm(&kvm, &mut report),
        Err(error) => {
            let mut text = error.to_string();
            if let Some(cause) = std::error::Error::source(&error) {
                text = format!("{text}: {cause}");
            }
            report.checks.push(Check::new("KVM", State::Bad, text));
        }
    }
    report.checks.push(check_memfd());
    report.checks.push(check_memory());
    report.checks.push(check_huge_pages());
    report
}

fn probe_kvm(kvm: &Kvm, report: &mut Report) {
    let found = format!(
        "/dev/kvm opens, API version {}, up to {} vCPUs and {} memory slots",
        kvm.get_api_version(),
        kvm.get_max_vcpus(),
        kvm.get_nr_memslots()
    );
    report.checks.push(Check::new("KVM", State::Good, found));
    let machine = crate::vstate::vm::Vm::new(kvm);
    let capabilities = match &machine {
        Ok(_) => Check::new("capabilities", State::Good, "all that is needed"),
        Err(error) => Check::new("capabilities", State::Bad, error.to_string())
            .advise("use a newer host kernel (6.1 or later)"),
    };
    report.checks.push(capabilities);
    drop(machine);

    let code = kernel_code::probe(kvm);
    let tables = tables::probe(kvm);
    report.checks.push(check_kernel_code(&code));
    report.checks.push(check_speed(&code));
    report.checks.push(check_paging(&tables));
    report.checks.push(check_edits(&tables));
    report.checks.push(check_quirk(kvm));
    report.can_boot_linux = code.obstacle().is_none()
        && report
            .checks
            .iter()
            .all(|c| c.name != "capabilities" || c.state == State::Good);
    report.shared_tables = tables.shareable();
    report.kernel_code = Some(code);
    report.tables = Some(tables);
}

fn check_kernel_code(code: &KernelCode) -> Check {
    let name = "kernel-mode code";
    if let Some(error) = &code.error {
        return Check::new(name, State::Bad, format!("no guest runs: {error}"));
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
    Check::new(name, state, found).advise(
        "use a host whose CPU runs guests in hardware (VT-x, SVM), or the lab, an emulated machine",
    )
}

fn check_speed(code: &KernelCode) -> Check {
    let name = "kernel-mode speed";
    match code.mips {
        Some(mips) if code.interpreted() => Check::new(
            name,
            State::Fair,
            format!("{mips:.1} million instructions a second: interpreted, not run"),
        )
        .advise("as for kernel-mode code"),
        Some(mips) => {
            let found = format!("{mips:.0} million instructions a second");
            Check::new(name, State::Good, found)
        }
        None => Check::new(name, State::Fair, "could not be measured"),
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
    )
    .advise("load kvm_intel with ept=1 or kvm_amd with npt=1, on a CPU that has it")
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
    Check::new("table edits", state, found)
        .advise("guests attach regions privately: data is shared, page tables are not")
}

fn check_quirk(kvm: &Kvm) -> Check {
    let offered = kvm.check_extension_raw(KVM_CAP_DISABLE_QUIRKS2.into());
    let zap = i64::from(offered) & i64::from(KVM_X86_QUIRK_SLOT_ZAP_ALL) != 0;
    let (state, found) = if zap {
        (State::Good, "removes one slot's mappings only")
    } else {
        (State::Fair, "removes the mappings of all slots")
    };
    Check::new("detach", state, found)
        .advise("nothing is wrong, but detaching is cheaper on a host with Linux 6.12 or later")
}

fn check_memfd() -> Check {
    match memory_file("doctor", 1 << 21) {
        Ok(_) => Check::new("memfd", State::Good, "works, with seals"),
        Err(error) => {
            let cause = std::error::Error::source(&error);
            let cause = cause.map(ToString::to_string).unwrap_or_default();
            Check::new("memfd", State::Bad, format!("{error}: {cause}"))
                .advise("use a kernel with CONFIG_MEMFD_CREATE and CONFIG_TMPFS")
        }
    }
}

/// A value of /proc/meminfo in bytes.
fn meminfo(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find(|l| l.split(':').next() == Some(key))?;
    let mut words = line.split_whitespace().skip(1);
    let number: u64 = words.next()?.parse().ok()?;
    Some(if words.next() == Some("kB") {
        number << 10
    } else {
        number
    })
}

fn check_memory() -> Check {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = host::total_memory();
    let available = meminfo(&text, "MemAvailable");
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
    Check::new("memory", state, found).advise("free some memory: a small guest takes 128 MiB")
}

/// The choice in brackets of a sysfs file such as `always [madvise] never`.
fn chosen(text: &str) -> Option<&str> {
    text.split_whitespace()
        .find_map(|word| word.strip_prefix('[')?.strip_suffix(']'))
}

fn check_huge_pages() -> Check {
    let path = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let mode = chosen(&text).unwrap_or("not available").to_owned();
    let meminfo_text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let reserved = meminfo(&meminfo_text, "HugePages_Total").unwrap_or(0);
    let state = if matches!(mode.as_str(), "always" | "within_size" | "advise" | "force") {
        State::Good
    } else {
        State::Fair
    };
    let found = format!("shared memory: {mode}; reserved: {reserved}");
    Check::new("huge pages", state, found)
        .advise("for speed only: echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probe_is_quick_and_consistent() {
        let start = std::time::Instant::now();
        let report = probe();
        let took = start.elapsed();
        assert!(took.as_millis() < 1000, "{took:?}");
        assert_eq!(
            report.status() == ExitStatus::NoGuests,
            !report.can_boot_linux
        );
        let text = report.to_string();
        for check in &report.checks {
            assert!(text.contains(check.name));
            assert!(
                check.state != State::Bad
                    || check.advice.is_some()
                    || check.name == "KVM"
                    || check.name == "kernel-mode code"
            );
        }
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
