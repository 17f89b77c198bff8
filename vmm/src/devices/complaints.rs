//! A limit on the log lines that a guest can cause.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};

/// Lines about one device that are worth logging.
const MAX_COMPLAINTS: u32 = 16;

/// Warnings about what a guest does to one device. After the first few there
/// are none, for a guest can repeat any mistake as often as it likes.
#[derive(Debug, Default)]
pub struct Complaints(AtomicU32);

impl Complaints {
    /// Logs `what` as a warning, if there have not been too many.
    pub fn warn(&self, what: fmt::Arguments<'_>) {
        match self.count() {
            MAX_COMPLAINTS.. => {}
            n if n + 1 == MAX_COMPLAINTS => log::warn!("{what} (the last warning of its kind)"),
            _ => log::warn!("{what}"),
        }
    }

    /// How many there were before this one, which is counted; at the limit the
    /// number stays.
    fn count(&self) -> u32 {
        let more = |n: u32| (n < MAX_COMPLAINTS).then_some(n + 1);
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
            .unwrap_or_else(|n| n)
    }

    /// Lines logged so far.
    #[cfg(test)]
    pub(crate) fn lines(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_end_at_the_limit() {
        let complaints = Complaints::default();
        let before: Vec<_> = (0..20).map(|_| complaints.count()).collect();
        let expected: Vec<_> = (0..MAX_COMPLAINTS).chain([MAX_COMPLAINTS; 4]).collect();
        assert_eq!(before, expected);
        assert_eq!(complaints.lines(), MAX_COMPLAINTS);
    }
}
