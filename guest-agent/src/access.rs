//! Accesses that may fault.
//!
//! Three tiny routines in assembly do every access to a region. They use no
//! stack, so when one of them faults, the signal handler can make it return at
//! once: it sets the return registers to the fault and the instruction pointer
//! to a `ret`. Nothing is jumped over but the routine itself, so no Rust frame
//! is skipped and no destructor lost, as `siglongjmp` would.

use std::io;
use std::mem::MaybeUninit;
use std::ptr;

use mshare_protocol::agent::Fault;

// Return value in rax:rdx: rax = 0 on success, otherwise the signal in the low
// half and si_code in the high half; rdx = the word read, or the address.
core::arch::global_asm!(
    ".pushsection .text.agent_access, \"ax\", @progbits",
    ".global agent_access_begin",
    "agent_access_begin:",
    ".global agent_access_load",
    "agent_access_load:",
    "    mov rdx, [rdi]",
    "    xor eax, eax",
    "    ret",
    ".global agent_access_store",
    "agent_access_store:",
    "    mov [rdi], rsi",
    "    xor eax, eax",
    "    ret",
    // Writes without changing anything, whoever else writes there.
    ".global agent_access_touch",
    "agent_access_touch:",
    "    lock or qword ptr [rdi], 0",
    "    xor eax, eax",
    "    ret",
    ".global agent_access_copy",
    "agent_access_copy:",
    "    mov rcx, rdx",
    "    rep movsq",
    "    xor eax, eax",
    ".global agent_access_end",
    "agent_access_end:",
    "    ret",
    ".popsection",
);

#[repr(C)]
struct Outcome {
    status: u64,
    value: u64,
}

// SAFETY: the signatures are those of the routines above, System V ABI; the
// two statics are labels of which only the address is used.
unsafe extern "C" {
    fn agent_access_load(addr: *const u64) -> Outcome;
    fn agent_access_store(addr: *mut u64, value: u64) -> Outcome;
    fn agent_access_touch(addr: *mut u64) -> Outcome;
    fn agent_access_copy(to: *mut u64, from: *const u64, words: u64) -> Outcome;
    static agent_access_begin: u8;
    static agent_access_end: u8;
}

impl Outcome {
    fn check(self) -> Result<u64, Fault> {
        if self.status == 0 {
            return Ok(self.value);
        }
        let [low, high] = [self.status & 0xffff_ffff, self.status >> 32];
        Err(Fault {
            signal: i32::try_from(low).unwrap_or(0),
            code: i32::try_from(high).unwrap_or(0),
            addr: self.value,
        })
    }
}

/// Reads the word at `addr`.
///
/// # Errors
/// The fault that the access raised.
///
/// # Safety
/// [`install`] has been called. No Rust object lives at `addr`: it lies in a
/// mapping made for the purpose, or is not mapped.
pub unsafe fn load(addr: u64) -> Result<u64, Fault> {
    // SAFETY: by contract nothing but shared bytes are there, and a fault
    // returns through the handler.
    unsafe { agent_access_load(pointer(addr)) }.check()
}

/// Writes the word at `addr`.
///
/// # Errors
/// The fault that the access raised.
///
/// # Safety
/// As [`load`].
pub unsafe fn store(addr: u64, value: u64) -> Result<(), Fault> {
    // SAFETY: see `load`.
    unsafe { agent_access_store(pointer(addr), value) }
        .check()
        .map(drop)
}

/// Makes a write access at `addr` that leaves the contents as they are.
///
/// # Errors
/// The fault that the access raised.
///
/// # Safety
/// As [`load`].
pub unsafe fn touch_write(addr: u64) -> Result<(), Fault> {
    // SAFETY: see `load`.
    unsafe { agent_access_touch(pointer(addr)) }
        .check()
        .map(drop)
}

/// Copies `words` to memory at `addr`.
///
/// # Errors
/// The fault that the access raised; words below its address are written.
///
/// # Safety
/// As [`load`], for the whole range.
pub unsafe fn write(addr: u64, words: &[u64]) -> Result<(), Fault> {
    // SAFETY: the source is a slice of that length; for the rest see `load`.
    unsafe { agent_access_copy(pointer(addr), words.as_ptr(), words.len() as u64) }
        .check()
        .map(drop)
}

/// Fills `words` from memory at `addr`.
///
/// # Errors
/// The fault that the access raised; then `words` is filled in part.
///
/// # Safety
/// As [`load`], for the whole range.
pub unsafe fn read(addr: u64, words: &mut [u64]) -> Result<(), Fault> {
    // SAFETY: the destination is a slice of that length; else see `load`.
    unsafe { agent_access_copy(words.as_mut_ptr(), pointer(addr), words.len() as u64) }
        .check()
        .map(drop)
}

fn pointer(addr: u64) -> *mut u64 {
    // u64 and usize are the same on x86-64, the only target of the agent.
    ptr::with_exposed_provenance_mut(usize::try_from(addr).unwrap_or(0))
}

/// Installs the handler for SIGSEGV and SIGBUS. A fault anywhere but in the
/// routines of this module kills the process as ever.
///
/// # Errors
/// What `sigaction` reports.
pub fn install() -> io::Result<()> {
    for signal in [libc::SIGSEGV, libc::SIGBUS] {
        // SAFETY: an all-zero sigaction is a valid value of this C structure.
        let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
        let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = on_fault;
        action.sa_sigaction = handler as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: `action` is complete, and the handler does only what is
        // allowed in one (see there).
        if unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Async-signal-safe: reads its arguments, writes registers of the saved
/// context, calls at most `signal`.
extern "C" fn on_fault(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let context = context.cast::<libc::ucontext_t>();
    // SAFETY: the kernel passes valid, aligned pointers to a SA_SIGINFO
    // handler, and nobody else refers to what is behind them while it runs.
    let (info, registers) = unsafe { (&*info, &mut (*context).uc_mcontext.gregs) };
    let begin = (&raw const agent_access_begin).expose_provenance();
    let end = (&raw const agent_access_end).expose_provenance();
    let at = usize::try_from(registers[libc::REG_RIP as usize]).unwrap_or(0);
    // A code of zero or less is a signal that somebody sent: not an access.
    if info.si_code <= 0 || !(begin..end).contains(&at) {
        // Restore the default; the access is made again and kills.
        // SAFETY: `signal` is async-signal-safe and takes no pointer to data.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        return;
    }
    // SAFETY: SIGSEGV and SIGBUS with a positive code carry an address.
    let addr = unsafe { info.si_addr() }.expose_provenance();
    registers[libc::REG_RAX as usize] = i64::from(info.si_code) << 32 | i64::from(signal);
    registers[libc::REG_RDX as usize] = addr.cast_signed() as i64;
    registers[libc::REG_RIP as usize] = end.cast_signed() as i64;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_to_unmapped_read_only_and_truncated_memory_report_the_fault() {
        install().unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        // SAFETY: a fresh mapping of a fresh file, two pages, one in the file.
        let base = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                8192,
                rustix::mm::ProtFlags::READ,
                rustix::mm::MapFlags::SHARED,
                &file,
                0,
            )
        }
        .unwrap()
        .expose_provenance() as u64;
        // SAFETY: accesses to that mapping and to the never-mapped page 0.
        unsafe {
            assert_eq!(load(base), Ok(0));
            let fault = store(base, 1).unwrap_err();
            assert_eq!(
                (fault.signal, fault.code, fault.addr),
                (libc::SIGSEGV, 2, base)
            );
            assert_eq!(touch_write(base + 8).unwrap_err().addr, base + 8);
            let mut words = [1; 1024];
            let fault = read(base, &mut words).unwrap_err();
            assert_eq!(
                (fault.signal, fault.code, fault.addr),
                (libc::SIGBUS, 2, base + 4096)
            );
            assert_eq!(words[..512], [0; 512]);
            assert_eq!(load(8).unwrap_err().code, 1);
            assert_eq!(write(8, &words).unwrap_err().addr, 8);
        }
    }
}
