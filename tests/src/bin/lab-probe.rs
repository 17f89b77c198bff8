//! What the lab's own tests run inside the lab: small acts with a known result.

use std::fs;
use std::io::{self, Write};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use clap::Parser;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit};
use mshare_tests::plain::{EXIT_BASE, EXIT_PORT};

/// Small acts with a known result.
#[derive(Debug, Parser)]
enum Act {
    /// Return a status.
    Exit { status: u8 },
    /// Die of SIGABRT.
    Abort,
    /// Copy standard input to standard output, and a line to standard error.
    Copy,
    /// Print the working directory, a variable and how many lines.
    Show { variable: String, lines: usize },
    /// Make a directory with a file in it that holds every byte.
    Bytes { dir: String },
    /// Sleep.
    Sleep { seconds: u64 },
    /// Leave a process behind that keeps standard output open.
    Orphan,
    /// Make the kernel panic, after a line on its console.
    Panic { line: String },
    /// As PID 1 of a plain boot: end the machine with a status.
    Tell { status: u8 },
    /// As PID 1 of a plain boot: say a line and return, which is a panic.
    Say { line: String },
    /// Make, run and destroy guests that add two numbers, on several threads.
    Guests { threads: usize, rounds: usize },
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<ExitCode, Failure> {
    match Act::parse() {
        Act::Exit { status } => return Ok(ExitCode::from(status)),
        Act::Abort => std::process::abort(),
        Act::Copy => {
            io::copy(&mut io::stdin().lock(), &mut io::stdout().lock())?;
            eprintln!("copied");
        }
        Act::Show { variable, lines } => {
            println!("{}", std::env::current_dir()?.display());
            println!("{}", std::env::var(variable)?);
            let mut out = io::stdout().lock();
            for line in 0..lines {
                writeln!(out, "line {line}")?;
            }
        }
        Act::Bytes { dir } => {
            fs::create_dir_all(format!("{dir}/inner"))?;
            let all: Vec<u8> = (0..=u8::MAX).cycle().take(100_000).collect();
            fs::write(format!("{dir}/inner/all"), all)?;
        }
        Act::Sleep { seconds } => thread::sleep(Duration::from_secs(seconds)),
        Act::Orphan => {
            let me = std::env::current_exe()?;
            std::process::Command::new(me)
                .args(["sleep", "1000"])
                .spawn()?;
        }
        Act::Panic { line } => {
            fs::write("/dev/kmsg", format!("<0>{line}"))?;
            fs::write("/proc/sysrq-trigger", "c")?;
        }
        Act::Tell { status } => tell(EXIT_BASE + status)?,
        Act::Say { line } => println!("{line}"),
        Act::Guests { threads, rounds } => guests(threads, rounds)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn tell(value: u8) -> io::Result<()> {
    // SAFETY: iopl takes no pointers. It lets this process reach I/O ports.
    if unsafe { libc::iopl(3) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the port belongs to the emulator's exit device, which stops the
    // machine; no memory is touched.
    unsafe { core::arch::asm!("out dx, al", in("dx") EXIT_PORT, in("al") value) };
    Ok(())
}

fn guests(threads: usize, rounds: usize) -> Result<(), Failure> {
    let workers: Vec<_> = (0..threads)
        .map(|_| {
            thread::spawn(move || -> Result<(), Failure> {
                for round in 0..rounds {
                    let number = u8::try_from(round % 100)?;
                    let sum = add(number, 5)?;
                    if sum != number + 5 {
                        return Err(format!("{number} + 5 gave {sum}").into());
                    }
                }
                Ok(())
            })
        })
        .collect();
    for worker in workers {
        worker.join().map_err(|_| "a thread panicked")??;
    }
    println!("{} guests ran", threads * rounds);
    Ok(())
}

const LEN: usize = 4096;

#[repr(align(4096))]
struct Page([u8; LEN]);

/// Adds two numbers in a real-mode guest of four instructions.
fn add(a: u8, b: u8) -> Result<u8, Failure> {
    const AT: u64 = 0x1000;
    // mov dx, 0x3f8; add al, bl; out dx, al; hlt
    const CODE: [u8; 7] = [0xba, 0xf8, 0x03, 0x00, 0xd8, 0xee, 0xf4];

    let vm = Kvm::new()?.create_vm()?;
    vm.create_irq_chip()?;
    // Page-aligned, as a memslot must be.
    let mut memory = Box::new(Page([0; LEN]));
    memory.0[..CODE.len()].copy_from_slice(&CODE);
    let slot = kvm_userspace_memory_region {
        slot: 0,
        guest_phys_addr: AT,
        memory_size: LEN as u64,
        userspace_addr: (&raw const *memory) as u64,
        flags: 0,
    };
    // SAFETY: `memory` is mapped at this address for this length and lives
    // longer than the guest; nothing else uses it while the guest runs.
    unsafe { vm.set_user_memory_region(slot)? };
    let mut vcpu = vm.create_vcpu(0)?;
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rax, regs.rbx, regs.rflags) = (AT, a.into(), b.into(), 2);
    vcpu.set_regs(&regs)?;
    match vcpu.run()? {
        VcpuExit::IoOut(0x3f8, &[sum]) => Ok(sum),
        other => Err(format!("the guest stopped with {other:?}").into()),
    }
}
