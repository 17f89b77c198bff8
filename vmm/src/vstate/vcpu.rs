//! Virtual CPUs: each has one thread, named `vcpu0`, `vcpu1` and so on, that
//! runs the guest and serves its accesses to devices.
//!
//! **Stopping.** [`VcpuHandle::stop_all`] sets a flag, stores 1 to the
//! `immediate_exit` byte that the vCPU shares with KVM and sends the thread
//! the kick signal. If the thread is in the guest, the signal brings it out;
//! if it is about to enter, KVM sees the byte and returns at once. There is no
//! moment at which a stop can be missed.

use std::mem::offset_of;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{io, ptr};

use kvm_bindings::{CpuId, kvm_run};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::memory::{Access, Mapping, PAGE_SIZE};
use super::vm::{self, Vm};
use crate::arch::{msrs, regs};
use crate::devices::bus::{MmioBus, PioBus};
use crate::exit::{Crash, Exit, GuestExit};

/// `KVM_INTERNAL_ERROR_EMULATION`: an instruction KVM cannot interpret.
const SUBERROR_EMULATION: u32 = 1;
/// `KVM_SYSTEM_EVENT_*` types.
const SYSTEM_SHUTDOWN: u32 = 1;
const SYSTEM_RESET: u32 = 2;

/// RIP of a CPU after reset.
const RESET_RIP: u64 = 0xfff0;

/// How often a thread that is to stop is kicked, and how long it is waited for.
const KICK_INTERVAL: Duration = Duration::from_millis(5);
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// A vCPU that could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM did not create it.
    #[error(transparent)]
    Vm(#[from] vm::Error),
    /// KVM refuses a part of its state.
    #[error("KVM refuses the {what} of vCPU {vcpu}")]
    State {
        /// Which part.
        what: &'static str,
        /// The vCPU.
        vcpu: u8,
        /// What KVM says.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM refuses a model-specific register.
    #[error("KVM refuses an MSR of vCPU {0}")]
    Msrs(u8, #[source] msrs::Error),
    /// The run structure could not be mapped.
    #[error("cannot map the run structure of vCPU {0}")]
    RunPage(u8, #[source] super::memory::Error),
    /// No thread.
    #[error("cannot start the thread of vCPU {0}")]
    Thread(u8, #[source] io::Error),
    /// The kick signal could not be set up.
    #[error("cannot set up the signal that stops vCPUs")]
    Signal(#[source] io::Error),
}

/// What a vCPU reaches when it leaves the guest.
#[derive(Debug, Clone)]
pub struct Buses {
    /// Memory-mapped devices.
    pub mmio: Arc<MmioBus>,
    /// Port I/O devices.
    pub pio: Arc<PioBus>,
}

/// A vCPU that is not running yet.
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
    id: u8,
    control: Arc<Control>,
}

/// What the thread of a vCPU shares with the one that stops it.
#[derive(Debug)]
struct Control {
    stop: AtomicBool,
    /// First page of the vCPU's `kvm_run`, mapped once more.
    run_page: Mapping,
}

impl Control {
    fn immediate_exit(&self) -> &AtomicU8 {
        let byte = self
            .run_page
            .as_ptr()
            .wrapping_add(offset_of!(kvm_run, immediate_exit));
        // SAFETY: the byte lies in the first page of `kvm_run`, which this
        // value keeps mapped; KVM reads it with a single load and the VMM
        // touches it through this function only.
        unsafe { AtomicU8::from_ptr(byte) }
    }
}

impl Vcpu {
    /// Creates vCPU `id` with the features `cpuid`.
    ///
    /// # Errors
    ///
    /// KVM refuses.
    pub fn new(vm: &Vm, id: u8, cpuid: &CpuId) -> Result<Self, Error> {
        let state = |what| {
            move |source| Error::State {
                what,
                vcpu: id,
                source,
            }
        };
        let fd = vm.create_vcpu(id)?;
        fd.set_cpuid2(cpuid).map_err(state("CPUID"))?;
        msrs::set_boot_msrs(&fd).map_err(|e| Error::Msrs(id, e))?;
        // SAFETY: the descriptor is open as long as `fd` lives, which is
        // longer than this borrow.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
        let run_page = Mapping::new(borrowed, 0, PAGE_SIZE, Access::ReadWrite)
            .map_err(|e| Error::RunPage(id, e))?;
        let mut lapic = fd.get_lapic().map_err(state("local APIC"))?;
        connect_lints(&mut lapic);
        fd.set_lapic(&lapic).map_err(state("local APIC"))?;
        Ok(Self {
            fd,
            id,
            control: Arc::new(Control {
                stop: AtomicBool::new(false),
                run_page,
            }),
        })
    }

    /// Makes this the boot processor, which starts at guest-physical `entry`.
    /// The others wait in KVM until the guest starts them.
    ///
    /// # Errors
    ///
    /// KVM refuses the registers.
    pub fn set_entry(&self, entry: u64) -> Result<(), Error> {
        let state = |what| {
            move |source| Error::State {
                what,
                vcpu: self.id,
                source,
            }
        };
        let mut sregs = self.fd.get_sregs().map_err(state("segment registers"))?;
        regs::set_boot_sregs(&mut sregs);
        self.fd
            .set_sregs(&sregs)
            .map_err(state("segment registers"))?;
        self.fd
            .set_regs(&regs::boot_regs(entry))
            .map_err(state("registers"))
    }

    /// Starts the thread. It ends when the guest does, which it reports to
    /// `exit`, or when [`VcpuHandle::stop_all`] is called.
    ///
    /// # Errors
    ///
    /// The host gives no thread.
    pub fn start(self, buses: Buses, exit: Exit) -> Result<VcpuHandle, Error> {
        let id = self.id;
        let control = Arc::clone(&self.control);
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{id}"))
            .spawn(move || {
                let guard = exit.unless_panic(format!("the thread of vCPU {id}"));
                if let Some(reason) = self.run(&buses) {
                    exit.report(reason);
                }
                drop(guard);
            })
            .map_err(|e| Error::Thread(id, e))?;
        Ok(VcpuHandle {
            id,
            control,
            thread,
        })
    }

    /// Runs the guest until it ends (a reason) or is to stop (none).
    fn run(mut self, buses: &Buses) -> Option<GuestExit> {
        loop {
            if self.control.stop.load(Ordering::Acquire) {
                log::debug!("vCPU {} stops at RIP {:#x}", self.id, self.rip());
                return None;
            }
            let vcpu = self.id;
            let exit = match self.fd.run() {
                Ok(exit) => exit,
                Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => continue,
                Err(e) => {
                    let error = e.to_string();
                    return Some(GuestExit::Crashed(Crash::Run { vcpu, error }));
                }
            };
            match exit {
                VcpuExit::IoOut(port, data) => {
                    if !buses.pio.write(port, data) {
                        log::trace!("vCPU {vcpu}: nobody takes {data:x?} at port {port:#x}");
                    }
                }
                VcpuExit::IoIn(port, data) => {
                    if !buses.pio.read(port, data) {
                        log::trace!("vCPU {vcpu}: nobody answers at port {port:#x}");
                    }
                }
                VcpuExit::MmioRead(address, data) => {
                    if !buses.mmio.read(address, data) {
                        log::debug!("vCPU {vcpu}: nobody answers at {address:#x}");
                    }
                }
                VcpuExit::MmioWrite(address, data) => {
                    if !buses.mmio.write(address, data) {
                        log::debug!("vCPU {vcpu}: nobody takes {data:x?} at {address:#x}");
                    }
                }
                // No input of the I/O APIC has a line that could be asserted still.
                VcpuExit::IoapicEoi(_) | VcpuExit::Intr | VcpuExit::IrqWindowOpen => {}
                VcpuExit::SystemEvent(SYSTEM_SHUTDOWN, _) => return Some(GuestExit::PoweredOff),
                VcpuExit::SystemEvent(SYSTEM_RESET, _) => return Some(GuestExit::Rebooted),
                VcpuExit::Shutdown => {
                    // With SVM, KVM resets the vCPU before it reports this.
                    let rip = Some(self.rip()).filter(|&rip| rip != RESET_RIP);
                    return Some(GuestExit::Crashed(Crash::TripleFault { vcpu, rip }));
                }
                VcpuExit::InternalError => return Some(GuestExit::Crashed(self.internal_error())),
                VcpuExit::FailEntry(reason, _) => {
                    return Some(GuestExit::Crashed(Crash::FailedEntry { vcpu, reason }));
                }
                VcpuExit::MemoryFault { gpa, .. } => {
                    return Some(GuestExit::Crashed(Crash::MemoryFault { vcpu, gpa }));
                }
                other => {
                    let exit = format!("{other:?}");
                    return Some(GuestExit::Crashed(Crash::Unknown { vcpu, exit }));
                }
            }
        }
    }

    fn rip(&self) -> u64 {
        // For a message about a guest that is gone: a failure changes nothing.
        self.fd.get_regs().map_or(0, |regs| regs.rip)
    }

    fn internal_error(&mut self) -> Crash {
        let rip = self.rip();
        // SAFETY: KVM_RUN returned KVM_EXIT_INTERNAL_ERROR, for which this
        // member of the union is the valid one.
        let suberror = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
        Crash::Internal {
            vcpu: self.id,
            suberror,
            rip,
            hint: match suberror {
                SUBERROR_EMULATION => ", an instruction it cannot interpret (see `vmm doctor`)",
                _ => "",
            },
        }
    }
}

/// Offsets of the local interrupt registers (Intel SDM volume 3, table 11-1).
const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
const DELIVERY_MODE: u32 = 0b111 << 8;
const DELIVERY_NMI: u32 = 0b100 << 8;
const DELIVERY_EXTINT: u32 = 0b111 << 8;

/// Connects LINT0 to the (absent) 8259 and LINT1 to NMI, as firmware does.
fn connect_lints(lapic: &mut kvm_bindings::kvm_lapic_state) {
    for (register, mode) in [
        (APIC_LVT_LINT0, DELIVERY_EXTINT),
        (APIC_LVT_LINT1, DELIVERY_NMI),
    ] {
        let mut bytes = [0; 4];
        for (byte, reg) in bytes.iter_mut().zip(&lapic.regs[register..]) {
            *byte = reg.cast_unsigned();
        }
        let value = (u32::from_le_bytes(bytes) & !DELIVERY_MODE) | mode;
        for (byte, reg) in value.to_le_bytes().iter().zip(&mut lapic.regs[register..]) {
            *reg = byte.cast_signed();
        }
    }
}

/// A running vCPU.
#[derive(Debug)]
pub struct VcpuHandle {
    id: u8,
    control: Arc<Control>,
    thread: JoinHandle<()>,
}

impl VcpuHandle {
    /// Stops all of `vcpus` and waits for their threads. A thread that does
    /// not stop within two seconds (it would have to hang in a host call) is
    /// left behind.
    pub fn stop_all(vcpus: Vec<Self>) {
        let deadline = Instant::now() + STOP_TIMEOUT;
        for vcpu in &vcpus {
            vcpu.control.stop.store(true, Ordering::Release);
            vcpu.control.immediate_exit().store(1, Ordering::Release);
        }
        let mut running = vcpus;
        loop {
            running.retain(|vcpu| !vcpu.thread.is_finished());
            if running.is_empty() {
                return;
            }
            if Instant::now() >= deadline {
                let ids: Vec<_> = running.iter().map(|v| v.id).collect();
                log::error!("vCPUs {ids:?} do not stop; leaving them behind");
                return;
            }
            for vcpu in &running {
                vcpu.kick();
            }
            std::thread::sleep(KICK_INTERVAL);
        }
    }

    fn kick(&self) {
        // SAFETY: the handle of a thread that has not been joined stays valid
        // even after the thread has ended.
        unsafe { libc::pthread_kill(self.thread.as_pthread_t(), kick_signal()) };
    }
}

/// The signal that takes a thread out of `KVM_RUN`.
pub fn kick_signal() -> i32 {
    libc::SIGRTMIN()
}

/// Installs the handler of the kick signal, which does nothing: the point is
/// that the system call returns.
///
/// # Errors
///
/// The host refuses.
pub fn install_kick_handler() -> Result<(), Error> {
    extern "C" fn nothing(_: i32) {}
    // SAFETY: an all-zero sigaction is valid: no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = nothing as extern "C" fn(i32) as usize;
    // SAFETY: the handler touches nothing, so it may run at any point of any
    // thread; the pointers are valid for the call.
    let result = unsafe { libc::sigaction(kick_signal(), &raw const action, ptr::null_mut()) };
    if result == 0 {
        Ok(())
    } else {
        Err(Error::Signal(io::Error::last_os_error()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connect_lints_sets_the_delivery_modes_only() {
        let mut lapic = kvm_bindings::kvm_lapic_state::default();
        // Masked, delivery mode 5.
        lapic.regs[APIC_LVT_LINT0 + 1] = 5;
        lapic.regs[APIC_LVT_LINT0 + 2] = 1;
        connect_lints(&mut lapic);
        assert_eq!(lapic.regs[APIC_LVT_LINT0..][..4], [0, 7, 1, 0]);
        assert_eq!(lapic.regs[APIC_LVT_LINT1..][..4], [0, 4, 0, 0]);
    }
}
