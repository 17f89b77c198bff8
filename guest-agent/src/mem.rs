//! Timed, written and verified ranges of a mapping.

use std::ops::Range;
use std::time::Instant;

use mshare_protocol::agent::{Fault, Touched, Verified, pattern_word};

use crate::access;

/// Words moved at a time: one page, so that progress is exact to a page.
const CHUNK: usize = 512;

/// Accesses one word every `stride` bytes of `range`.
///
/// # Errors
/// The first fault.
///
/// # Safety
/// As [`access::load`], for the range.
pub unsafe fn touch(range: Range<u64>, stride: u64, write: bool) -> Result<Touched, Fault> {
    let before = faults();
    let begun = Instant::now();
    let mut accesses = 0;
    let mut addr = range.start;
    while addr < range.end {
        if write {
            // SAFETY: inside the caller's range.
            unsafe { access::touch_write(addr) }?;
        } else {
            // SAFETY: inside the caller's range.
            unsafe { access::load(addr) }?;
        }
        accesses += 1;
        addr = addr.saturating_add(stride);
    }
    let elapsed = begun.elapsed();
    let after = faults();
    Ok(Touched {
        accesses,
        elapsed_ns: u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX),
        minflt: after.0.saturating_sub(before.0),
        majflt: after.1.saturating_sub(before.1),
    })
}

/// Writes the pattern of `seed`; `offset` is that of the range in its slot.
///
/// # Errors
/// The first fault.
///
/// # Safety
/// As [`access::load`], for the range.
pub unsafe fn fill(range: Range<u64>, offset: u64, seed: u64) -> Result<(), Fault> {
    let mut words = [0; CHUNK];
    for (addr, len) in chunks(range.clone()) {
        let at = offset + (addr - range.start);
        for (word, o) in words[..len].iter_mut().zip((at..).step_by(8)) {
            *word = pattern_word(seed, o);
        }
        // SAFETY: inside the caller's range.
        unsafe { access::write(addr, &words[..len]) }?;
    }
    Ok(())
}

/// Compares with the pattern of `seed`, or with zero.
///
/// # Errors
/// The first fault.
///
/// # Safety
/// As [`access::load`], for the range.
pub unsafe fn verify(range: Range<u64>, offset: u64, seed: Option<u64>) -> Result<Verified, Fault> {
    let mut words = [0; CHUNK];
    let mut seen = Verified {
        words: 0,
        bad: 0,
        first_bad: None,
    };
    for (addr, len) in chunks(range.clone()) {
        // SAFETY: inside the caller's range.
        unsafe { access::read(addr, &mut words[..len]) }?;
        let at = offset + (addr - range.start);
        for (&word, o) in words[..len].iter().zip((at..).step_by(8)) {
            if word != seed.map_or(0, |seed| pattern_word(seed, o)) {
                seen.bad += 1;
                seen.first_bad.get_or_insert(o);
            }
        }
        seen.words += len as u64;
    }
    Ok(seen)
}

/// Addresses and word counts of the pieces of `range`.
fn chunks(range: Range<u64>) -> impl Iterator<Item = (u64, usize)> {
    let step = CHUNK * 8;
    range.clone().step_by(step).map(move |addr| {
        let left = usize::try_from(range.end - addr).unwrap_or(step);
        (addr, left.min(step) / 8)
    })
}

/// Minor and major faults of this process so far.
fn faults() -> (u64, u64) {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the kernel fills the structure; all-zero is valid for it too.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr());
        usage.assume_init()
    };
    (
        u64::try_from(usage.ru_minflt).unwrap_or(0),
        u64::try_from(usage.ru_majflt).unwrap_or(0),
    )
}
