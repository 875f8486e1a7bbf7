//! [`LogChange`]: what an operation changes of a replica's log.

use std::io;

use super::record::{SMALL_RECORD_BYTES_MAX, entry_len};
use super::{LogEntry, Vote};
use crate::types::LogId;

pub(super) enum LogChange {
    Create,
    Wipe,
    Append(Vec<LogEntry>),
    Vote(Vote),
    Truncate(Option<LogId>),
    Purge(LogId),
    /// Changes nothing: done once all before it is.
    Nothing,
}

impl LogChange {
    /// Bytes that the operation takes in the log, or a little more.
    pub fn bytes(&self) -> usize {
        match self {
            LogChange::Append(entries) => entries.iter().map(entry_len).sum(),
            LogChange::Create
            | LogChange::Wipe
            | LogChange::Vote(_)
            | LogChange::Truncate(_)
            | LogChange::Purge(_)
            | LogChange::Nothing => SMALL_RECORD_BYTES_MAX,
        }
    }
}

/// Builds the error of an operation that asks for the impossible.
pub(super) fn invalid(reason: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, reason)
}
