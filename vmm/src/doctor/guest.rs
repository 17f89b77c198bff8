//! A guest of a few instructions, for finding out what KVM does.
//!
//! ```text
//! 0x00500 GDT (kernel and user segments)   0x01000 page tables: 4 MiB mapped
//! 0x06000 IDT                              0x10000 code
//! 0x0f000 exception handlers               0x20000 data
//! 0x04000, 0x05000, 0x07000, and all pages from 0x30000: for the probe
//! ```
//!
//! Guest and probe talk through ports: [`PORT_OK`] carries a byte of the
//! probe's choice, [`PORT_EXCEPTION`] the vector of an exception. Every run is
//! bounded by a timer that takes the thread out of the guest.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, kvm_enable_cap, kvm_regs, kvm_segment,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use crate::arch::layout;
use crate::vstate::memory::{Access, Mapping, memory_file};
use crate::vstate::vcpu::{install_kick_handler, kick_signal};

/// Where code goes.
pub const CODE: u64 = 0x1_0000;
/// Scratch memory, aligned for XSAVE.
pub const DATA: u64 = 0x2_0000;
/// The second GiB of the guest's virtual addresses belongs to the probe: its
/// page directory, ...
pub const PROBE_PMD: u64 = 0x4000;
/// ... and its first page table.
pub const PROBE_PTE: u64 = 0x5000;
/// First virtual address of the probe's GiB.
pub const PROBE_VA: u64 = 1 << 30;
/// The guest has made it.
pub const PORT_OK: u16 = 0xf8;
const PORT_EXCEPTION: u16 = 0xf9;

const LEN: u64 = 4 << 20;
const GDT: u64 = 0x500;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const IDT: u64 = 0x6000;
const HANDLERS: u64 = 0xf000;
const STACK: u64 = 0x1_f000;
const VECTORS: u64 = 32;
const HANDLER_LEN: u64 = 8;
const BREAKPOINT: u64 = 3;

const PRESENT_RW_USER: u64 = 7;
const LARGE: u64 = 1 << 7;
/// Present interrupt gate.
const GATE: u64 = 0x8e00;
const DESCRIPTORS: [u64; 6] = [
    0,
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00af_fb00_0000_ffff,
    0x00cf_f300_0000_ffff,
];

/// PE, MP, ET, NE, WP, AM, PG.
const CR0: u64 = 0x8005_0033;
/// PAE, OSFXSR, OSXMMEXCPT.
const CR4: u64 = (1 << 5) | (3 << 9);
/// OSXSAVE.
pub const CR4_OSXSAVE: u64 = 1 << 18;
/// LME, LMA.
const EFER: u64 = 0x500;
/// Port I/O for user code.
const RFLAGS_IOPL_3: u64 = 3 << 12;

/// How a run of the guest ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// It wrote this to [`PORT_OK`].
    Ok(u8),
    /// It met an exception.
    Exception(u8),
    /// KVM gave up.
    InternalError,
    /// The time ran out.
    TimeOut,
    /// Something else.
    Other(String),
}

/// Whether code runs in kernel or in user mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Privilege level 0.
    Kernel,
    /// Privilege level 3, with access to ports.
    User,
}

/// The guest.
#[derive(Debug)]
pub struct TinyGuest {
    // In the order in which they must go: the machine before its memory.
    vcpu: VcpuFd,
    vm: VmFd,
    file: File,
    memory: Arc<Mapping>,
    watchdog: Watchdog,
}

impl TinyGuest {
    /// Makes a guest that may run for `limit` in all.
    ///
    /// # Errors
    ///
    /// The host has no memory, or KVM refuses.
    pub fn new(kvm: &Kvm, limit: Duration) -> io::Result<Self> {
        let file = memory_file("doctor", LEN).map_err(io::Error::other)?;
        let memory = Mapping::new(&file, 0, LEN, Access::ReadWrite).map_err(io::Error::other)?;
        let memory = Arc::new(memory);
        let errno = |e: kvm_ioctls::Error| io::Error::from_raw_os_error(e.errno());
        let vm = kvm.create_vm().map_err(errno)?;
        let tss = usize::try_from(layout::TSS).unwrap_or(usize::MAX);
        vm.set_tss_address(tss).map_err(errno)?;
        // A vCPU without a local APIC in KVM makes KVM patch its own code, for
        // all machines of the host.
        let mut split = kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            ..Default::default()
        };
        split.args[0] = u64::from(layout::IOAPIC_PINS);
        vm.enable_cap(&split).map_err(errno)?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: LEN,
            userspace_addr: memory.as_ptr() as u64,
        };
        // SAFETY: the mapping lives in the value beside the machine and is
        // dropped after it (order of the fields).
        unsafe { vm.set_user_memory_region(region) }.map_err(errno)?;
        let vcpu = vm.create_vcpu(0).map_err(errno)?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(errno)?;
        vcpu.set_cpuid2(&cpuid).map_err(errno)?;
        let guest = Self {
            vcpu,
            vm,
            file,
            memory,
            watchdog: Watchdog::new(limit)?,
        };
        guest.write_tables();
        Ok(guest)
    }

    fn write_tables(&self) {
        for (address, descriptor) in (GDT..).step_by(8).zip(DESCRIPTORS) {
            self.store(address, descriptor);
        }
        self.store(PML4, PDPT | PRESENT_RW_USER);
        self.store(PDPT, PD | PRESENT_RW_USER);
        self.store(PDPT + 8, PROBE_PMD | PRESENT_RW_USER);
        for i in 0..LEN >> 21 {
            self.store(PD + 8 * i, (i << 21) | LARGE | PRESENT_RW_USER);
        }
        for vector in 0..VECTORS {
            let handler = HANDLERS + vector * HANDLER_LEN;
            let gate = (handler & 0xffff) | (0x10 << 16) | (GATE << 32) | (handler >> 16 << 48);
            self.store(IDT + 16 * vector, gate);
            #[allow(clippy::cast_possible_truncation)] // below 32
            let number = vector as u8;
            let code: &[u8] = if vector == BREAKPOINT {
                // iretq
                &[0x48, 0xcf]
            } else {
                // mov al, vector; out PORT_EXCEPTION, al; hlt
                &[0xb0, number, 0xe6, 0xf9, 0xf4]
            };
            self.copy(handler, code);
        }
    }

    /// Stores a 64-bit value as one store that a page walker may see.
    ///
    /// `address` is a multiple of 8 inside the guest's memory; anything else
    /// is ignored.
    pub fn store(&self, address: u64, value: u64) {
        if address.is_multiple_of(8) && address < LEN {
            let at = self
                .memory
                .as_ptr()
                .wrapping_add(index(address))
                .cast::<u64>();
            // SAFETY: aligned and inside the mapping, which this value keeps.
            unsafe { AtomicU64::from_ptr(at) }.store(value, Ordering::Release);
        }
    }

    /// Copies bytes into the guest's memory; what does not fit is ignored.
    pub fn copy(&self, address: u64, bytes: &[u8]) {
        for (address, byte) in (address..LEN).zip(bytes) {
            let at = self.memory.as_ptr().wrapping_add(index(address));
            // SAFETY: inside the mapping, which this value keeps.
            unsafe { AtomicU8::from_ptr(at) }.store(*byte, Ordering::Release);
        }
    }

    /// Gives the page at `address` back to the host, so that it disappears
    /// from the guest's second-stage tables.
    ///
    /// # Errors
    ///
    /// The host refuses.
    pub fn punch(&self, address: u64) -> io::Result<()> {
        use rustix::fs::FallocateFlags;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.file, flags, address, 4096).map_err(Into::into)
    }

    /// Sets all registers: execution goes on at `rip` with `rbx`, `rcx` and
    /// RDI pointing at [`DATA`].
    ///
    /// # Errors
    ///
    /// KVM refuses.
    pub fn set_registers(&self, mode: Mode, cr4: u64, rip: u64, rbx: u64) -> io::Result<()> {
        let errno = |e: kvm_ioctls::Error| io::Error::from_raw_os_error(e.errno());
        let mut sregs = self.vcpu.get_sregs().map_err(errno)?;
        let dpl = if mode == Mode::User { 3 } else { 0 };
        let segment = |selector: u16, type_, l, db| kvm_segment {
            limit: u32::MAX,
            selector: selector | u16::from(dpl),
            type_,
            present: 1,
            dpl,
            s: 1,
            l,
            db,
            g: 1,
            ..Default::default()
        };
        let (code, data) = if mode == Mode::User {
            (0x20, 0x28)
        } else {
            (0x10, 0x18)
        };
        sregs.cs = segment(code, 0xb, 1, 0);
        let data = segment(data, 0x3, 0, 1);
        (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
        (sregs.fs, sregs.gs) = (data, data);
        sregs.gdt.base = GDT;
        sregs.gdt.limit = 47;
        sregs.idt.base = IDT;
        sregs.idt.limit = 511;
        (sregs.cr0, sregs.cr3, sregs.cr4) = (CR0, PML4, CR4 | cr4);
        sregs.efer = EFER;
        self.vcpu.set_sregs(&sregs).map_err(errno)?;
        let regs = kvm_regs {
            rip,
            rbx,
            rdi: DATA,
            rsp: STACK,
            rflags: 2 | if mode == Mode::User { RFLAGS_IOPL_3 } else { 0 },
            ..Default::default()
        };
        self.vcpu.set_regs(&regs).map_err(errno)
    }

    /// Ends the guest without waiting: KVM takes its time to take a machine
    /// apart, and whoever probed wants to go on.
    pub fn retire(self) {
        let Self {
            vcpu,
            vm,
            file,
            memory,
            watchdog,
        } = self;
        // The timer is this thread's.
        drop(watchdog);
        let parts = (vcpu, vm, file, memory);
        let thread = std::thread::Builder::new().name("probe-end".into());
        // Without a thread, the closure is dropped here, and its parts with it.
        if let Err(error) = thread.spawn(move || drop(parts)) {
            log::debug!("a probe's guest was taken apart on the spot: {error}");
        }
    }

    /// Runs the guest until it says something.
    pub fn run(&mut self) -> Stop {
        loop {
            if self.watchdog.expired() {
                return Stop::TimeOut;
            }
            return match self.vcpu.run() {
                Ok(VcpuExit::IoOut(PORT_OK, data)) => Stop::Ok(first(data)),
                Ok(VcpuExit::IoOut(PORT_EXCEPTION, data)) => Stop::Exception(first(data)),
                Ok(VcpuExit::InternalError) => Stop::InternalError,
                Ok(VcpuExit::Intr) => continue,
                Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => continue,
                Ok(VcpuExit::Shutdown) => Stop::Other("triple fault".into()),
                Ok(other) => Stop::Other(format!("{other:?}")),
                Err(e) => Stop::Other(e.to_string()),
            };
        }
    }
}

fn first(data: &[u8]) -> u8 {
    data.first().copied().unwrap_or_default()
}

/// An address below [`LEN`] as an index.
fn index(address: u64) -> usize {
    usize::try_from(address).unwrap_or(usize::MAX)
}

/// A timer that interrupts the thread that made it, again and again, once a
/// time has passed.
#[derive(Debug)]
struct Watchdog {
    timer: libc::timer_t,
    end: Instant,
}

impl Watchdog {
    fn new(limit: Duration) -> io::Result<Self> {
        install_kick_handler().map_err(io::Error::other)?;
        // SAFETY: all-zero bytes are a valid sigevent.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = kick_signal();
        // SAFETY: gettid has no preconditions.
        event.sigev_notify_thread_id = unsafe { libc::gettid() };
        let mut timer = std::ptr::null_mut();
        // SAFETY: both pointers are valid for the call.
        let result =
            unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        let watchdog = Self {
            timer,
            end: Instant::now() + limit,
        };
        let spec = libc::itimerspec {
            it_value: timespec(limit),
            // Again, in case the first one came just before entering the guest.
            it_interval: timespec(Duration::from_millis(5)),
        };
        // SAFETY: the timer exists and the pointers are valid for the call.
        let result =
            unsafe { libc::timer_settime(timer, 0, &raw const spec, std::ptr::null_mut()) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(watchdog)
    }

    fn expired(&self) -> bool {
        Instant::now() >= self.end
    }
}

fn timespec(time: Duration) -> libc::timespec {
    libc::timespec {
        tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: time.subsec_nanos().into(),
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        // SAFETY: the timer exists and is deleted once.
        unsafe { libc::timer_delete(self.timer) };
    }
}
