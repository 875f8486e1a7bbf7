//! What a shard understands: its commands, what it answers, and [`apply`], which turns an entry
//! into an answer and a batch.
//!
//! `command` has the commands and their outcomes, `record` is how a value is stored, `entry` the
//! map as an entry sees it while it is applied, `apply` what an entry does, `answers` what its gets
//! return, `read` what is read outside of the log. Where things are in the map is in `slots`, the
//! memory of answered requests in `requests`.
//!
//! The commands of slot moves are in `sm::moves`.

mod answers;
mod apply;
#[cfg(test)]
mod bounds_tests;
pub(in crate::sm) mod command;
pub(in crate::sm) mod entry;
#[cfg(test)]
pub(in crate::sm) mod model_tests;
#[cfg(test)]
mod page_tests;
mod read;
pub(in crate::sm) mod record;
#[cfg(test)]
pub(in crate::sm) mod tests;

pub use self::answers::{ANSWER_BYTES_MAX, Audience};
pub use self::apply::{GetsWeight, answer_gets, apply, apply_for, refused_by_place, weigh_gets};
pub use self::command::{
    Action, Condition, KvCommand, KvOutcome, Media, Operation, OperationOutcome, Record, Write,
    WriteOutcome, WriteRejection,
};
pub use self::read::{
    FindOutcome, FoundKey, KeyCounts, PageRequest, PageScan, ReadOutcome, ScanPage, count, find,
    read, read_only, scan_page, scan_page_charged,
};
pub use self::record::{decode_record, encode_record};
