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

/// Whether `failure` carries `errno`.
pub(crate) fn is(failure: &Failure, errno: Errno) -> bool {
    failure.errno == errno.raw_os_error()
}

/// A name as people may read it in a message.
pub(crate) fn show(name: &[u8]) -> String {
    format!("'{}'", name.escape_ascii())
}
