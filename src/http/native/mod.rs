//! The native dialect, `/v1/...`: HTTP as RFC 9110 means it, over raw bytes.
//!
//! - A key is the percent-decoded rest of the path: any bytes (`%2F`, `%00`, `%FF`), empty
//!   segments, dots and trailing slashes included. Only those that begin with eight bytes `FF` are
//!   refused, and never listed: another dialect has them to itself. In JSON a key or value that is
//!   not UTF-8 stands in base64, and `key_encoding` or `encoding` says so.
//! - A revision is an ETag. Conditions are `If-Match` and `If-None-Match`; `Idempotency-Key` makes
//!   a write safe to repeat.
//! - A key that another node leads is answered 307, before anything of a body is read;
//!   `?proxy=true` has this node fetch the answer. Listings and batches span shards, so this node
//!   always gathers them itself.
//! - `?timeout=2s` (or `500ms`) bounds the wait; `?consistency=stale` reads what is at hand, and
//!   `Quorate-Staleness` says how long ago that was all that its leader had committed: an estimate,
//!   because a leader that is cut off learns late of the next one.
//! - A parameter that a route does not know is an error, not ignored: a misspelt condition must not
//!   pass for none.

mod batch;
mod cluster;
mod conditions;
mod headers;
mod json;
mod key;
mod kv;
mod list;
mod query;
mod scrub;
#[cfg(test)]
mod tests;
mod view;

pub(super) use batch::batch;
pub(super) use cluster::{cluster, transfer_leader};
pub(super) use headers::{STALENESS, staleness};
pub(super) use key::{PREFIX as KEY_PREFIX, unescape};
pub(super) use kv::kv;
pub(super) use list::list;
pub(super) use scrub::{begin_scrub, scrub_status};
pub(super) use view::{change, operation, view};
