//! Takes a console apart: the program's lines and the kernel's, and what the
//! kernel complained about.

use mshare_protocol::klog::complains;

/// Lines that hold such words and mean nothing by them.
const HARMLESS: [&str; 4] = [
    // They repeat our own words.
    "Command line:",
    "Kernel command line:",
    // A selftest writes them, to see whether its own look at the log finds them.
    "] mshare selftest: ",
    // A selftest poisons a page of its own.
    "MCE: Killing mshare_",
];

/// The agent's line before a watched program starts (`guest-agent watch`).
const SETTING: &str = "guest: cpus ";
/// Before each of the kernel's lines while a program is watched.
const KERNEL: &str = "kernel: ";
/// The one failure of the emulator that is known and not ours: code that the
/// kernel patches while another CPU runs it.
const KNOWN_RACE: &str = "Oops: int3";

/// A console, taken apart.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Console<'a> {
    /// What the program printed.
    pub program: Vec<&'a str>,
    /// What the kernel said.
    pub kernel: Vec<&'a str>,
    /// How the guest was set up: "0-3 flags la57 pti".
    pub setting: Option<&'a str>,
}

impl<'a> Console<'a> {
    /// Takes one apart.
    pub fn new(text: &'a str) -> Self {
        let mut console = Self::default();
        for line in text.lines() {
            let line = line.trim_end();
            if let Some(rest) = line.strip_prefix(KERNEL) {
                console.kernel.push(rest);
            } else if is_kernel(line) {
                console.kernel.push(line);
            } else if let Some(setting) = line.strip_prefix(SETTING) {
                console.setting = Some(setting);
            } else if console.setting.is_some() && !line.starts_with("agent: ") {
                console.program.push(line);
            }
        }
        console
    }

    /// The kernel's complaints.
    pub fn complaints(&self) -> Vec<&'a str> {
        let complains = |line: &&&str| {
            complains(without_time(line)) && !HARMLESS.iter().any(|word| line.contains(word))
        };
        self.kernel.iter().filter(complains).copied().collect()
    }

    /// Whether the emulator's known race killed the guest.
    pub fn lost_race(&self) -> bool {
        self.kernel.iter().any(|line| line.contains(KNOWN_RACE))
    }

    /// Whether a line of the kernel holds this.
    pub fn kernel_said(&self, text: &str) -> bool {
        self.kernel.iter().any(|line| line.contains(text))
    }

    /// Whether the guest's CPUs have this flag.
    pub fn has_flag(&self, flag: &str) -> bool {
        self.setting
            .and_then(|setting| setting.split_once("flags"))
            .is_some_and(|(_, flags)| flags.split_whitespace().any(|word| word == flag))
    }
}

/// The text of "[    1.234567] text", which is how the kernel's lines begin.
fn timed(line: &str) -> Option<&str> {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let (time, text) = line.strip_prefix('[')?.split_once(']')?;
    let (seconds, micros) = time.trim().split_once('.')?;
    (digits(seconds) && digits(micros)).then(|| text.trim_start())
}

fn is_kernel(line: &str) -> bool {
    timed(line).is_some()
}

fn without_time(line: &str) -> &str {
    timed(line).unwrap_or(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "[    0.000000] Command line: page_table_check=on\r\n\
        [    1.000000] Dynamic Preempt: full\r\n\
        agent: ready\r\n\
        guest: cpus 0-1 flags la57 pti\r\n\
        TAP version 13\r\n\
        # BUG: is what this test is about\r\n\
        kernel: [    2.000001] BUG: Bad page map in process x\r\n\
        [    3.000000] WARNING: CPU: 0\r\n\
        kernel: [    3.100000] mshare selftest: WARNING: made up\r\n\
        agent: exit 0\r\n";

    #[test]
    fn console_falls_into_its_parts() {
        let console = Console::new(TEXT);
        assert_eq!(
            console.program,
            ["TAP version 13", "# BUG: is what this test is about"]
        );
        assert_eq!(console.complaints().len(), 2, "{:?}", console.complaints());
        assert!(console.has_flag("pti") && !console.has_flag("pt"));
        assert!(console.kernel_said("Dynamic Preempt: full"));
        assert!(!console.lost_race());
    }

    #[test]
    fn program_that_imitates_no_time_is_not_the_kernel() {
        assert!(is_kernel("[   12.345678] x") && is_kernel("[12345.678901] x"));
        for line in ["[x] y", "[1] y", "[ 1.] y", "[.5] y", "1.5] y", "["] {
            assert!(!is_kernel(line), "{line}");
        }
    }
}
