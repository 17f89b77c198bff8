//! Does kernel-mode code run properly? Some KVMs interpret it (they have no
//! hardware support underneath), slowly and without the instructions Linux
//! needs; user-mode code runs well on the same machine.

use std::fmt::Write;
use std::io;
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;
use serde::Serialize;

use super::guest::{CODE, CR4_OSXSAVE, Mode, Stop, TinyGuest};
use crate::arch::cpuid;
use crate::patience;

/// A probe takes a few milliseconds where code runs well; the limit is for a
/// guest that hangs, and leaves room for a busy host.
///
/// The second one is for another try, after a time-out: on a host that busy a
/// refusal would be wrong, and one that hangs is found out all the same.
pub(super) const LIMITS: [Duration; 2] = [Duration::from_millis(600), Duration::from_secs(5)];
/// What is said of an instruction that did not come back in time.
const TIMED_OUT: &str = "it does not come back";
/// Kernel code that runs slower is being interpreted.
const INTERPRETED_BELOW_MIPS: f64 = 20.0;
/// Instructions of the speed check: the loop below, two per turn.
const SPEED_LOOPS: u32 = 5_000;

/// Where CPUID says whether the CPU has something.
#[derive(Debug, Clone, Copy)]
struct CpuidBit {
    leaf: u32,
    register: Register,
    bit: u32,
}

#[derive(Debug, Clone, Copy)]
enum Register {
    Ebx,
    Ecx,
}

struct Snippet {
    name: &'static str,
    /// None: every CPU has it.
    needs: Option<CpuidBit>,
    code: &'static [u8],
}

const fn leaf1(bit: u32) -> Option<CpuidBit> {
    Some(CpuidBit {
        leaf: 1,
        register: Register::Ecx,
        bit,
    })
}

const XSAVE_BIT: u32 = 26;
const XSAVE: &str = "xsave/xrstor";

/// What Linux executes in kernel mode early on. Each ends with a store to the
/// port (appended below).
const SNIPPETS: [Snippet; 5] = [
    Snippet {
        name: "cmpxchg16b",
        needs: leaf1(13),
        // lock cmpxchg16b [rdi]
        code: &[0xf0, 0x48, 0x0f, 0xc7, 0x0f],
    },
    Snippet {
        name: "popcnt",
        needs: leaf1(23),
        // popcnt rax, rdi
        code: &[0xf3, 0x48, 0x0f, 0xb8, 0xc7],
    },
    Snippet {
        name: "stac/clac",
        needs: Some(CpuidBit {
            leaf: 7,
            register: Register::Ebx,
            bit: 20,
        }),
        // stac; clac
        code: &[0x0f, 0x01, 0xcb, 0x0f, 0x01, 0xca],
    },
    Snippet {
        name: XSAVE,
        needs: leaf1(XSAVE_BIT),
        code: &[
            0xb8, 3, 0, 0, 0, // mov eax, 3
            0x31, 0xd2, // xor edx, edx
            0x31, 0xc9, // xor ecx, ecx
            0x0f, 0x01, 0xd1, // xsetbv
            0x48, 0x0f, 0xae, 0x27, // xsave64 [rdi]
            0x48, 0x0f, 0xae, 0x2f, // xrstor64 [rdi]
        ],
    },
    Snippet {
        name: "int3",
        needs: None,
        // int3, whose handler returns
        code: &[0xcc],
    },
];

/// What became of one instruction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It works.
    Works,
    /// The CPU does not have it, so Linux does not use it.
    NotOnThisCpu,
    /// It does not work.
    Fails(String),
}

/// What the probe found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct KernelCode {
    /// Each instruction and its outcome.
    pub instructions: Vec<(&'static str, Outcome)>,
    /// Whether the CPU's XCR0 register keeps what a guest stores in it, if the
    /// guest has one. If not, the VMM hides XSAVE and AVX from guests.
    pub keeps_xcr0: Option<bool>,
    /// Million kernel-mode instructions in a second, if it could be measured.
    pub mips: Option<f64>,
    /// Why the probe could not run at all.
    pub error: Option<String>,
}

impl KernelCode {
    /// Why Linux would not boot, if so.
    pub fn obstacle(&self) -> Option<String> {
        if let Some(error) = &self.error {
            return Some(format!(
                "a guest of a few instructions does not run: {error}"
            ));
        }
        let failing = self.failing();
        if failing.is_empty() {
            return None;
        }
        let mut text = format!("kernel-mode code lacks {}", failing.join(", "));
        if let Some(mips) = self.mips.filter(|_| self.interpreted()) {
            // Writing to a String cannot fail.
            let _ = write!(
                text,
                " and is interpreted at {mips:.1} million instructions a second"
            );
        }
        Some(text)
    }

    /// The instructions that do not work.
    pub fn failing(&self) -> Vec<&'static str> {
        self.instructions
            .iter()
            .filter(|(_, outcome)| matches!(outcome, Outcome::Fails(_)))
            .map(|(name, _)| *name)
            .collect()
    }

    fn timed_out(&self) -> bool {
        let timed_out = Outcome::Fails(TIMED_OUT.to_owned());
        self.instructions.iter().any(|i| i.1 == timed_out)
    }

    /// Whether kernel code is too slow to be run by hardware.
    pub fn interpreted(&self) -> bool {
        self.mips.is_some_and(|mips| mips < INTERPRETED_BELOW_MIPS)
    }
}

/// Probes kernel-mode code. Where that takes more than a moment, it says so.
pub fn probe(kvm: &Kvm) -> KernelCode {
    let attempt = |limit| probe_within(kvm, limit);
    patience::try_twice(LIMITS, attempt, KernelCode::timed_out, patience::say)
}

fn probe_within(kvm: &Kvm, limit: Duration) -> KernelCode {
    let mut result = KernelCode {
        instructions: Vec::new(),
        keeps_xcr0: None,
        mips: None,
        error: None,
    };
    if let Err(error) = run(kvm, limit, &mut result) {
        result.error = Some(error.to_string());
    }
    result
}

fn run(kvm: &Kvm, limit: Duration, result: &mut KernelCode) -> io::Result<()> {
    let supported = cpuid::supported(kvm).map_err(io::Error::other)?;
    let has = |needs: &CpuidBit| {
        supported.iter().any(|e| {
            let register = match needs.register {
                Register::Ebx => e.ebx,
                Register::Ecx => e.ecx,
            };
            e.function == needs.leaf && e.index == 0 && register & (1 << needs.bit) != 0
        })
    };
    let cr4 = if leaf1(XSAVE_BIT).as_ref().is_some_and(has) {
        CR4_OSXSAVE
    } else {
        0
    };
    let mut guest = TinyGuest::new(kvm, limit)?;
    // One stretch of code: a snippet that reports falls through to the next.
    let mut code = Vec::new();
    let mut starts = Vec::new();
    for snippet in &SNIPPETS {
        let present = snippet.needs.as_ref().is_none_or(has);
        starts.push((snippet.name, CODE + code.len() as u64, present));
        if present {
            code.extend(snippet.code);
            code.extend(REPORT);
        }
    }
    guest.copy(CODE, &code);
    let mut in_place = false;
    for (name, start, present) in starts {
        let outcome = if present {
            if !in_place {
                guest.set_registers(Mode::Kernel, cr4, start, 0)?;
            }
            let stop = guest.run();
            in_place = matches!(stop, Stop::Ok(_));
            outcome(stop)
        } else {
            Outcome::NotOnThisCpu
        };
        result.instructions.push((name, outcome));
    }
    let works = |name| {
        let mut all = result.instructions.iter();
        all.any(|i| *i == (name, Outcome::Works))
    };
    if works(XSAVE) {
        result.keeps_xcr0 = Some(keeps_xcr0(&mut guest, cr4)?);
    }
    result.mips = measure(&mut guest)?;
    guest.retire();
    Ok(())
}

fn outcome(stop: Stop) -> Outcome {
    match stop {
        Stop::Ok(_) => Outcome::Works,
        Stop::Exception(vector) => Outcome::Fails(format!("exception {vector}")),
        Stop::InternalError => Outcome::Fails("KVM cannot interpret it".into()),
        Stop::TimeOut => Outcome::Fails(TIMED_OUT.into()),
        Stop::Other(what) => Outcome::Fails(what),
    }
}

/// Whether XCR0, which says what XSAVE covers, survives an exit. Some software
/// emulations of SVM do not tell KVM that a guest changes it, and KVM then
/// restores the old value.
fn keeps_xcr0(guest: &mut TinyGuest, cr4: u64) -> io::Result<bool> {
    let code = [
        0xb8, 3, 0, 0, 0, // mov eax, 3
        0x31, 0xd2, // xor edx, edx
        0x31, 0xc9, // xor ecx, ecx
        0x0f, 0x01, 0xd1, // xsetbv
        0xe6, 0xf8, // out PORT_OK, al
        0x0f, 0x01, 0xd0, // xgetbv
        0xe6, 0xf8, // out PORT_OK, al
    ];
    guest.copy(CODE, &code);
    guest.set_registers(Mode::Kernel, cr4, CODE, 0)?;
    Ok(guest.run() == Stop::Ok(3) && guest.run() == Stop::Ok(3))
}

/// mov al, 1; out PORT_OK, al
const REPORT: [u8; 4] = [0xb0, 1, 0xe6, 0xf8];

/// Measures the speed of kernel-mode code, best of three if it looks slow: the
/// host may just be busy.
fn measure(guest: &mut TinyGuest) -> io::Result<Option<f64>> {
    // mov ecx, SPEED_LOOPS; 1: dec ecx; jnz 1b
    let mut code = vec![0xb9];
    code.extend(SPEED_LOOPS.to_le_bytes());
    code.extend([0xff, 0xc9, 0x75, 0xfc]);
    code.extend(REPORT);
    guest.copy(CODE, &code);
    let mut best: Option<f64> = None;
    for _ in 0..3 {
        guest.set_registers(Mode::Kernel, 0, CODE, 0)?;
        let start = Instant::now();
        if !matches!(guest.run(), Stop::Ok(_)) {
            break;
        }
        let instructions = f64::from(SPEED_LOOPS) * 2.0;
        let mips = instructions / start.elapsed().as_secs_f64() / 1e6;
        best = Some(best.map_or(mips, |b| b.max(mips)));
        if mips >= INTERPRETED_BELOW_MIPS {
            break;
        }
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(outcomes: &[Outcome], mips: Option<f64>) -> KernelCode {
        KernelCode {
            instructions: ["a", "b", "c"]
                .into_iter()
                .zip(outcomes.iter().cloned())
                .collect(),
            keeps_xcr0: None,
            mips,
            error: None,
        }
    }

    #[test]
    fn working_or_absent_instructions_are_no_obstacle() {
        let found = found(&[Outcome::Works, Outcome::NotOnThisCpu], Some(1.0));
        assert_eq!(found.obstacle(), None);
    }

    #[test]
    fn obstacle_names_what_fails_and_the_speed() {
        let fails = || Outcome::Fails("x".into());
        let text = found(&[fails(), Outcome::Works, fails()], Some(1.6))
            .obstacle()
            .unwrap();
        assert!(
            text.contains("a, c") && text.contains("1.6 million"),
            "{text}"
        );
        let text = found(&[fails()], Some(1000.0)).obstacle().unwrap();
        assert!(!text.contains("interpreted"), "{text}");
    }

    #[test]
    fn only_a_time_out_leaves_the_probe_undecided() {
        let fails = |why: &str| found(&[Outcome::Works, Outcome::Fails(why.into())], None);
        assert!(fails(TIMED_OUT).timed_out());
        assert!(!fails("exception 6").timed_out());
        assert!(!found(&[Outcome::Works, Outcome::NotOnThisCpu], None).timed_out());
    }

    #[test]
    fn probe_keeps_to_its_limit_on_any_host() {
        let Ok(kvm) = Kvm::new() else {
            return crate::doctor::tests::no_kvm_is_reported();
        };
        // What making and ending a guest takes on a busy host.
        const AROUND: Duration = Duration::from_secs(5);
        for limit in [Duration::from_millis(1), LIMITS[1]] {
            let start = Instant::now();
            let found = probe_within(&kvm, limit);
            assert!(start.elapsed() < limit + AROUND, "{found:?}");
            assert_eq!(found.error, None);
            assert_eq!(found.instructions.len(), SNIPPETS.len());
        }
    }
}
