//! [`Readiness`] tells whether the process should be given requests.

use std::fmt;

/// Tells whether the process should be given requests.
pub trait Readiness: Send + Sync + 'static {
    fn ready(&self) -> Result<(), NotReady>;

    /// Returns what people should know of a process that is ready.
    fn note(&self) -> Option<String> {
        None
    }
}

/// The reason why not: a stable `code` for scripts (`spare`, `starting`, ...) and a text for
/// people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotReady {
    pub code: &'static str,
    pub reason: String,
}

impl fmt::Display for NotReady {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.reason)
    }
}
