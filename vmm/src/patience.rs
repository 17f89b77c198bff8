//! Waiting that says what it waits for.
//!
//! A person who starts a guest hears within a second what became of it. Where
//! that takes longer, they hear what is waited for and for how long.

use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::Duration;

/// After this time somebody who waits wants to know for what.
const SOON: Duration = Duration::from_millis(500);

/// Tries for `limits[0]`; what is undecided then is tried once more, for
/// `limits[1]`, which `say` is told before.
pub fn try_twice<T>(
    limits: [Duration; 2],
    mut attempt: impl FnMut(Duration) -> T,
    undecided: impl Fn(&T) -> bool,
    say: impl FnOnce(&str),
) -> T {
    let first = attempt(limits[0]);
    if !undecided(&first) {
        return first;
    }
    say(&format!(
        "a probe guest of a few instructions is not done after {:?}: the host is busy, or its KVM \
         hangs; trying once more, for up to {:?}",
        limits[0], limits[1]
    ));
    attempt(limits[1])
}

/// Says something on standard error.
pub fn say(text: &str) {
    eprintln!("vmm: {text}");
}

/// A wait that says `text` if it takes more than half a second; over when it
/// is dropped.
#[derive(Debug)]
pub struct Wait(#[allow(dead_code, reason = "dropping it ends the thread")] Sender<()>);

impl Wait {
    /// Begins to wait.
    pub fn new(text: String) -> Self {
        Self::with(SOON, move || say(&text))
    }

    /// Begins to wait for the broker at `socket` to answer.
    pub fn broker(socket: &Path) -> Self {
        Self::new(format!(
            "waiting for the broker at {} to answer, for up to 10 seconds",
            socket.display()
        ))
    }

    fn with(delay: Duration, tell: impl FnOnce() + Send + 'static) -> Self {
        let (sender, over) = mpsc::channel::<()>();
        let thread = thread::Builder::new().name("wait".into());
        let spawned = thread.spawn(move || {
            if over.recv_timeout(delay) == Err(RecvTimeoutError::Timeout) {
                tell();
            }
        });
        if let Err(error) = spawned {
            log::debug!("nothing will be said about a wait: {error}");
        }
        Self(sender)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: [Duration; 2] = [Duration::from_millis(600), Duration::from_secs(5)];

    #[test]
    fn decided_attempt_is_the_only_one() {
        let mut tried = Vec::new();
        let attempt = |limit| tried.push(limit);
        try_twice(LIMITS, attempt, |()| false, |text| panic!("{text}"));
        assert_eq!(tried, LIMITS[..1]);
    }

    #[test]
    fn undecided_attempt_is_repeated_after_saying_so() {
        let events = std::cell::RefCell::new(Vec::new());
        let result = try_twice(
            LIMITS,
            |limit| {
                events.borrow_mut().push(format!("{limit:?}"));
                limit
            },
            |_| true,
            |text| events.borrow_mut().push(text.to_owned()),
        );
        assert_eq!(result, LIMITS[1]);
        let events = events.into_inner();
        assert_eq!([&events[0], &events[2]], ["600ms", "5s"]);
        assert!(events[1].contains("600ms") && events[1].contains("up to 5s"));
    }

    #[test]
    fn only_a_long_wait_is_told() {
        let (sender, told) = mpsc::channel();
        let tell = sender.clone();
        let wait = Wait::with(Duration::ZERO, move || tell.send("long").unwrap());
        assert_eq!(told.recv_timeout(Duration::from_secs(60)), Ok("long"));
        drop(wait);
        // A wait that is over drops what it would have said unsaid.
        drop(Wait::with(Duration::from_secs(3600), move || {
            sender.send("short").unwrap();
        }));
        let silence = told.recv_timeout(Duration::from_secs(60));
        assert_eq!(silence, Err(RecvTimeoutError::Disconnected));
    }
}
