//! Guests of a few instructions, for what KVM and the shared tables do
//! together without any Linux in between.
//!
//! A [`TinyVm`] has 2 MiB of RAM, one vCPU in 64-bit mode at CPL 0 and one PUD
//! entry of its own that links the first GiB of a region:
//!
//! ```text
//! guest-physical                         guest-virtual
//! 0x00500  GDT                           0..2 MiB        identity
//! 0x01000  IDT (#PF only)                REGION_VA       the linked region
//! 0x02000  PML4 -+-> 0x03000 -> 0x04000 (identity)
//!                +-> 0x05000 [0] = link | rights
//!                            [1] = 0x06000 -> 2 MiB at will   REGION_VA + 1 GiB
//! 0x10000  program, 0x11000 #PF handler
//! 0x20000  mailbox: what the program reports
//! 0x80000  stack (grows down)
//! ```

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY, kvm_regs, kvm_segment,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

/// Bytes of RAM.
const RAM: usize = 2 << 20;
const GDT: u64 = 0x500;
const IDT: u64 = 0x1000;
const PML4: u64 = 0x2000;
const PDPT_LOW: u64 = 0x3000;
const PD_LOW: u64 = 0x4000;
const PDPT_REGION: u64 = 0x5000;
const PD_DIRECT: u64 = 0x6000;
const CODE: u64 = 0x1_0000;
const FAULT_HANDLER: u64 = 0x1_1000;
const MAILBOX: u64 = 0x2_0000;
const STACK: u64 = 0x8_0000;
/// Port that the #PF handler writes to.
const FAULT_PORT: u16 = 0xf9;

/// Where the region appears: slot 0 of its own PUD page.
pub const REGION_VA: u64 = 0x1000_0000_0000;

/// A PUD entry that lets the region's own entries decide about writes.
pub const LINK_RW: u64 = 0x67;
/// A PUD entry that forbids writes whatever the entries below say.
pub const LINK_RO: u64 = 0x65;

/// Byte offsets in the mailbox.
mod slot {
    pub const ITERATIONS: u64 = 0;
    pub const LAST: u64 = 8;
    pub const STOP: u64 = 40;
}

/// What the vCPU does until it faults or is told to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// Loads a word of the region again and again and reports it.
    Read,
    /// Stores a counter to a word of the region again and again.
    Write,
}

impl Program {
    const fn code(self) -> &'static [u8] {
        match self {
            // loop: mov rax,[rbx]; mov [rdi+8],rax; inc qword [rdi];
            //       cmp qword [rdi+40],0; je loop; hlt
            Self::Read => &[
                0x48, 0x8b, 0x03, 0x48, 0x89, 0x47, 0x08, 0x48, 0xff, 0x07, 0x48, 0x83, 0x7f, 0x28,
                0x00, 0x74, 0xef, 0xf4,
            ],
            // loop: mov [rbx],rcx; mov [rdi+8],rcx; inc rcx; inc qword [rdi];
            //       cmp qword [rdi+40],0; je loop; hlt
            Self::Write => &[
                0x48, 0x89, 0x0b, 0x48, 0x89, 0x4f, 0x08, 0x48, 0xff, 0xc1, 0x48, 0xff, 0x07, 0x48,
                0x83, 0x7f, 0x28, 0x00, 0x74, 0xec, 0xf4,
            ],
        }
    }
}

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The program was told to stop.
    Stopped,
    /// A page fault at this address with this error code.
    Fault {
        /// CR2.
        address: u64,
        /// As pushed by the CPU: bit 0 present, bit 1 write.
        code: u64,
    },
    /// An access to guest-physical memory that no slot backs.
    Mmio {
        /// Guest-physical address.
        gpa: u64,
        /// Whether it was a store.
        write: bool,
    },
    /// Anything else, as KVM names it.
    Other(&'static str),
}

/// The guest's RAM; unmapped when the last user is gone.
#[derive(Debug)]
struct Ram(NonNull<u8>);

// SAFETY: the mapping is shared memory that is only accessed through atomics
// and whole-page copies before the vCPU runs; it lives as long as the value.
unsafe impl Send for Ram {}
// SAFETY: as above.
unsafe impl Sync for Ram {}

impl Ram {
    fn new() -> io::Result<Self> {
        // SAFETY: a new anonymous mapping at an address the kernel chooses
        // aliases nothing.
        let address = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                RAM,
                rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE,
                rustix::mm::MapFlags::PRIVATE,
            )?
        };
        NonNull::new(address.cast())
            .map(Self)
            .ok_or_else(|| io::Error::other("mmap returned a null mapping"))
    }

    fn word(&self, gpa: u64) -> &AtomicU64 {
        let offset = usize::try_from(gpa).unwrap_or(usize::MAX);
        assert!(
            offset.is_multiple_of(8) && offset < RAM,
            "{gpa:#x} is no word of RAM"
        );
        // SAFETY: the offset is aligned and inside the mapping, which lives as
        // long as `self`; every access to it is atomic from here on.
        unsafe { AtomicU64::from_ptr(self.0.as_ptr().add(offset).cast()) }
    }

    fn copy_in(&self, gpa: u64, bytes: &[u8]) {
        for (i, chunk) in bytes.chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.word(gpa + 8 * i as u64)
                .store(u64::from_le_bytes(word), Ordering::Relaxed);
        }
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this length and nothing
        // refers to it any more.
        let _ = unsafe { rustix::mm::munmap(self.0.as_ptr().cast(), RAM) };
    }
}

/// One guest.
#[derive(Debug)]
pub struct TinyVm {
    vcpu: Option<VcpuFd>,
    vm: VmFd,
    ram: Arc<Ram>,
}

/// A vCPU that runs on its own thread.
#[derive(Debug)]
pub struct Running {
    thread: JoinHandle<(VcpuFd, End)>,
    ram: Arc<Ram>,
}

impl TinyVm {
    /// Creates a guest whose first GiB of region is linked at `link_gpa` with
    /// the attribute bits `link_bits`.
    ///
    /// # Errors
    /// Whatever KVM refuses.
    pub fn new(kvm: &Kvm, link_gpa: u64, link_bits: u64) -> io::Result<Self> {
        let ram = Arc::new(Ram::new()?);
        let vm = kvm.create_vm().map_err(os)?;
        vm.set_tss_address(0xfffb_d000).map_err(os)?;
        let slot = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: RAM as u64,
            userspace_addr: ram.0.as_ptr().addr() as u64,
        };
        // SAFETY: `ram` outlives the VM: both are dropped with `self`, `vm`
        // first, as the order of the fields has it.
        unsafe { vm.set_user_memory_region(slot) }.map_err(os)?;
        let vcpu = vm.create_vcpu(0).map_err(os)?;
        let cpuid: CpuId = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(os)?;
        vcpu.set_cpuid2(&cpuid).map_err(os)?;
        let tiny = Self {
            vcpu: Some(vcpu),
            vm,
            ram,
        };
        tiny.build_tables(link_gpa | link_bits);
        tiny.set_system_registers()?;
        Ok(tiny)
    }

    fn build_tables(&self, link: u64) {
        let store = |gpa, value| self.ram.word(gpa).store(value, Ordering::Relaxed);
        store(PML4, PDPT_LOW | 3);
        store(PDPT_LOW, PD_LOW | 3);
        store(PD_LOW, 0x83);
        store(PML4 + 8 * (REGION_VA >> 39 & 511), PDPT_REGION | 7);
        store(PDPT_REGION, link);
        store(GDT + 0x10, 0x00af_9b00_0000_ffff);
        store(GDT + 0x18, 0x00cf_9300_0000_ffff);
        // 64-bit interrupt gate, selector 0x10 (AMD APM volume 2, 4.8.4).
        store(
            IDT + 14 * 16,
            (FAULT_HANDLER & 0xffff)
                | 0x10 << 16
                | 0x8e << 40
                | (FAULT_HANDLER >> 16 & 0xffff) << 48,
        );
        store(IDT + 14 * 16 + 8, FAULT_HANDLER >> 32);
        self.ram.copy_in(FAULT_HANDLER, &[0xe6, 0xf9, 0xf4]); // out 0xf9,al; hlt
    }

    fn set_system_registers(&self) -> io::Result<()> {
        let vcpu = self.vcpu()?;
        let mut sregs = vcpu.get_sregs().map_err(os)?;
        let code = kvm_segment {
            limit: !0,
            selector: 0x10,
            type_: 11,
            present: 1,
            s: 1,
            l: 1,
            g: 1,
            ..Default::default()
        };
        let data = kvm_segment {
            selector: 0x18,
            type_: 3,
            db: 1,
            l: 0,
            ..code
        };
        sregs.cs = code;
        (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
        (sregs.gdt.base, sregs.gdt.limit) = (GDT, 0x1f);
        (sregs.idt.base, sregs.idt.limit) = (IDT, 0xfff);
        sregs.cr3 = PML4;
        sregs.cr4 = 0x20; // PAE
        sregs.cr0 = 0x8001_0033; // PG, WP, NE, ET, MP, PE
        sregs.efer = 0xd00; // NXE, LMA, LME
        vcpu.set_sregs(&sregs).map_err(os)
    }

    fn vcpu(&self) -> io::Result<&VcpuFd> {
        self.vcpu
            .as_ref()
            .ok_or_else(|| io::Error::other("the vCPU is running"))
    }

    /// Replaces the link.
    pub fn set_link(&self, link: u64) {
        self.ram.word(PDPT_REGION).store(link, Ordering::Release);
    }

    /// Maps the 2 MiB around `gpa` at another address, as a kernel does that
    /// looks at memory itself; returns the offset of `gpa` from [`REGION_VA`].
    #[must_use]
    pub fn map_directly(&self, gpa: u64) -> u64 {
        let inside = gpa % (2 << 20);
        let leaf = (gpa - inside) | 0x83;
        self.ram.word(PD_DIRECT).store(leaf, Ordering::Release);
        let link = self.ram.word(PDPT_REGION + 8);
        link.store(PD_DIRECT | 3, Ordering::Release);
        (1 << 30) + inside
    }

    /// Adds (or with `len` 0 removes) a memslot.
    ///
    /// # Errors
    /// Whatever KVM refuses.
    ///
    /// # Safety
    /// `[address, address + len)` must stay mapped until the slot is removed
    /// or the guest dropped.
    pub unsafe fn set_slot(
        &self,
        slot: u32,
        gpa: u64,
        address: *mut u8,
        len: u64,
        read_only: bool,
    ) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: if read_only { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: gpa,
            memory_size: len,
            userspace_addr: address.addr() as u64,
        };
        // SAFETY: the caller keeps the range mapped.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(os)
    }

    /// Starts `program` on the word at byte `offset` of the region.
    ///
    /// # Errors
    /// Whatever KVM refuses; also if the vCPU runs already.
    pub fn start(&mut self, program: Program, offset: u64) -> io::Result<Running> {
        for word in 0..8 {
            self.ram
                .word(MAILBOX + 8 * word)
                .store(0, Ordering::Relaxed);
        }
        self.ram.copy_in(CODE, program.code());
        self.vcpu()?
            .set_regs(&kvm_regs {
                rip: CODE,
                rsp: STACK,
                rflags: 2,
                rbx: REGION_VA + offset,
                rcx: 1,
                rdi: MAILBOX,
                ..Default::default()
            })
            .map_err(os)?;
        let mut vcpu = self
            .vcpu
            .take()
            .ok_or_else(|| io::Error::other("the vCPU is running"))?;
        let ram = Arc::clone(&self.ram);
        let thread_ram = Arc::clone(&ram);
        let thread = thread::Builder::new()
            .name("tiny-vcpu".to_owned())
            .spawn(move || {
                let end = run(&mut vcpu, &thread_ram);
                (vcpu, end)
            })?;
        Ok(Running { thread, ram })
    }

    /// Waits for the vCPU and takes it back.
    ///
    /// # Errors
    /// If the thread panicked.
    pub fn finish(&mut self, running: Running) -> io::Result<End> {
        let (vcpu, end) = running
            .thread
            .join()
            .map_err(|_| io::Error::other("the vCPU thread panicked"))?;
        self.vcpu = Some(vcpu);
        Ok(end)
    }
}

impl Running {
    /// Passes through the program's loop so far.
    #[must_use]
    pub fn iterations(&self) -> u64 {
        self.ram
            .word(MAILBOX + slot::ITERATIONS)
            .load(Ordering::Acquire)
    }

    /// The word last loaded or stored.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.ram.word(MAILBOX + slot::LAST).load(Ordering::Acquire)
    }

    /// Whether the vCPU has left its loop.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits until the program has gone around `more` times, at most `limit`.
    #[must_use]
    pub fn wait_iterations(&self, more: u64, limit: Duration) -> bool {
        let from = self.iterations();
        let start = Instant::now();
        while self.iterations() < from + more {
            if start.elapsed() > limit || self.has_ended() {
                return false;
            }
            thread::sleep(Duration::from_micros(100));
        }
        true
    }

    /// Tells the program to stop.
    pub fn stop(&self) {
        self.ram
            .word(MAILBOX + slot::STOP)
            .store(1, Ordering::Release);
    }
}

fn run(vcpu: &mut VcpuFd, ram: &Ram) -> End {
    loop {
        let end = match vcpu.run() {
            Ok(VcpuExit::Hlt) => End::Stopped,
            Ok(VcpuExit::IoOut(FAULT_PORT, _)) => End::Fault {
                address: 0,
                code: 0,
            },
            Ok(VcpuExit::MmioRead(gpa, _)) => End::Mmio { gpa, write: false },
            Ok(VcpuExit::MmioWrite(gpa, _)) => End::Mmio { gpa, write: true },
            Ok(VcpuExit::Shutdown) => End::Other("shutdown"),
            Ok(VcpuExit::FailEntry(..)) => End::Other("failed entry"),
            Ok(VcpuExit::InternalError) => End::Other("internal error"),
            Ok(_) => End::Other("unexpected exit"),
            Err(e) if e.errno() == libc::EINTR => continue,
            Err(_) => End::Other("KVM_RUN failed"),
        };
        return match end {
            End::Fault { .. } => match (vcpu.get_sregs(), vcpu.get_regs()) {
                (Ok(sregs), Ok(regs)) => End::Fault {
                    address: sregs.cr2,
                    code: ram.word(regs.rsp).load(Ordering::Acquire),
                },
                _ => End::Other("registers cannot be read after a fault"),
            },
            end => end,
        };
    }
}

fn os(e: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(e.errno())
}
