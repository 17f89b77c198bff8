//! Building the answers to requests that fail.

use mshare_protocol::broker::Failure;
use rustix::io::Errno;

/// A failure with `errno` and a message that says what was wrong and what
/// would be right.
pub(crate) fn failure(errno: Errno, message: impl Into<String>) -> Failure {
    Failure {
        errno: errno.raw_os_error(),
        message: message.into(),
    }
}

/// An error with all its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}

/// Whether `failure` carries `errno`.
pub(crate) fn is(failure: &Failure, errno: Errno) -> bool {
    failure.errno == errno.raw_os_error()
}

/// A name as people may read it in a message.
pub(crate) fn show(name: &[u8]) -> String {
    format!("'{}'", name.escape_ascii())
}
