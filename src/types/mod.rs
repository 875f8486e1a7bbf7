//! The identifiers and small values that every layer shares.
//!
//! Newtypes only: no behaviour beyond parsing and printing. Kept out: anything that knows a
//! protocol, a disk or a clock. The words are those of the glossary in ARCHITECTURE.md; one word,
//! one meaning.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Number of parts of the key space. Part of the disk format: it never changes.
pub const SLOTS: u16 = 4096;

/// Longest key in bytes; the shortest is one byte.
pub const KEY_BYTES_MAX: usize = 4096;

/// Keys that begin with these bytes, which are the last in key order, are the `binary` keys of the
/// encoded batch's dialect. No text in UTF-8 begins so, and the native dialect, whose keys are any
/// bytes, refuses and leaves out those that do.
pub const RESERVED_PREFIX: [u8; 8] = [0xFF; 8];

pub fn is_reserved(key: &[u8]) -> bool {
    key.starts_with(&RESERVED_PREFIX)
}

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[derive(Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        /// With its letter, as in logs and names of files; by `{:#}` the number alone, as operators
        /// write it.
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let prefix = if f.alternate() { "" } else { $prefix };
                write!(f, "{prefix}{}", self.0)
            }
        }
    };
}

number_id!(
    /// A process with a data directory, as the meta group numbers it. Bound to the directory, not
    /// to an address.
    NodeId, "n"
);
number_id!(
    /// A Raft group. Group 0 is the meta group, the others are shards. Never reused.
    GroupId, "g"
);
number_id!(
    /// One member of one group on one node. Given out by the meta group and never reused.
    ReplicaId, "r"
);
number_id!(
    /// Per-slot counter, bumped by every change in the slot; a key's ETag. Never reused.
    Revision, ""
);
number_id!(
    /// One slot (or run of slots) going from one shard to another. Only grows.
    MoveId, "m"
);
number_id!(
    /// Bumped by each accepted plan.
    PlanEpoch, ""
);
number_id!(
    /// Bumped by every change of the shard map.
    MapVersion, ""
);

/// One start of a node, drawn at random: two copies of a data directory never start alike.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct StartId(pub u64);

impl GroupId {
    /// The group that holds the view.
    pub const META: GroupId = GroupId(0);

    pub fn is_meta(self) -> bool {
        self == Self::META
    }

    /// Returns what it is called before operators.
    pub fn named(self) -> String {
        if self.is_meta() {
            "the meta group".to_owned()
        } else {
            format!("shard {self:#}")
        }
    }
}

/// The two kinds of replicas of a group.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReplicaKind {
    /// Keeps the log and the data that it applies.
    #[default]
    Data,
    /// Keeps the log alone: it votes, and serves nobody.
    Witness,
}

/// One of the [`SLOTS`] parts of the key space.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(try_from = "u16", into = "u16")]
pub struct Slot(u16);

impl Slot {
    pub fn new(number: u16) -> Option<Self> {
        (number < SLOTS).then_some(Self(number))
    }

    pub fn number(self) -> u16 {
        self.0
    }

    pub fn index(self) -> usize {
        usize::from(self.0)
    }

    /// Every slot, in order.
    pub fn all() -> impl DoubleEndedIterator<Item = Slot> + ExactSizeIterator {
        (0..SLOTS).map(Slot)
    }
}

impl TryFrom<u16> for Slot {
    type Error = String;

    fn try_from(number: u16) -> Result<Self, Self::Error> {
        Slot::new(number).ok_or_else(|| format!("slot {number} is past {}", SLOTS - 1))
    }
}

impl From<Slot> for u16 {
    fn from(slot: Slot) -> u16 {
        slot.0
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s{}", self.0)
    }
}

/// A position in a group's log. Ordered by term, then index.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct LogId {
    pub term: u64,
    pub index: u64,
}

impl fmt::Display for LogId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.term, self.index)
    }
}

/// The reason why a text is not an id or an address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    #[error("'{0}' is not 32 hexadecimal digits")]
    HexId(String),
    #[error("'{0}' is not an address: expected host:port with a port from 1 to 65535")]
    Address(String),
    #[error(
        "'{0}' has a zone ('%' and the name of an interface), which means nothing on another \
        machine: use an address without one"
    )]
    Zone(String),
}

macro_rules! random_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(pub u128);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:032x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = ParseError;

            fn from_str(text: &str) -> Result<Self, ParseError> {
                let hex = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
                let value = hex.then(|| u128::from_str_radix(text, 16).ok()).flatten();
                value.map(Self).ok_or_else(|| ParseError::HexId(text.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = ParseError;

            fn try_from(text: String) -> Result<Self, ParseError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.to_string()
            }
        }
    };
}

random_id!(
    /// The random identity of a cluster, drawn by its founder.
    ClusterId
);
random_id!(
    /// The random identity of a data directory, drawn when it is created.
    DirectoryId
);

/// `host:port` as others call a node. Compared as text: two spellings of one host are two
/// addresses.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Address(String);

impl Address {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub fn host(&self) -> &str {
        self.0
            .rsplit_once(':')
            .map_or(self.0.as_str(), |(host, _)| host)
    }

    pub fn port(&self) -> u16 {
        self.0
            .rsplit_once(':')
            .and_then(|(_, port)| port.parse().ok())
            .unwrap_or(0)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Address {
    type Err = ParseError;

    /// Of what people say: an address with a zone could be reached by nobody else.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        if text.contains('%') {
            return Err(ParseError::Zone(text.to_owned()));
        }
        text.to_owned().try_into()
    }
}

impl TryFrom<String> for Address {
    type Error = ParseError;

    /// Of what was written once: earlier programs took zones that are numbers.
    fn try_from(text: String) -> Result<Self, ParseError> {
        let error = || ParseError::Address(text.clone());
        let (host, port) = text.rsplit_once(':').ok_or_else(error)?;
        let port_ok =
            port.parse::<u16>().is_ok_and(|p| p > 0) && port.bytes().all(|b| b.is_ascii_digit());
        let bracketed = host.starts_with('[') && host.ends_with(']') && host.len() > 2;
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
        let in_brackets = |b: u8| b.is_ascii_hexdigit() || matches!(b, b':' | b'.' | b'%');
        let host_ok = if bracketed {
            host[1..host.len() - 1].bytes().all(in_brackets)
        } else {
            !host.is_empty() && host.bytes().all(plain)
        };
        if port_ok && host_ok {
            Ok(Address(text))
        } else {
            Err(error())
        }
    }
}

impl From<Address> for String {
    fn from(address: Address) -> String {
        address.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_host_and_port() {
        for good in [
            "127.0.0.1:13800",
            "node-1.example:80",
            "[::1]:9000",
            "a_b:1",
        ] {
            let address: Address = good.parse().expect("a good address");
            assert_eq!(address.to_string(), good);
        }
        for bad in [
            "",
            "a",
            "a:",
            ":1",
            "a:0",
            "a:65536",
            "a:+1",
            "a b:1",
            "a:1:2",
            "http://a:1",
            "[]:1",
            "a,b:1",
        ] {
            assert!(
                bad.parse::<Address>().is_err(),
                "{bad} was taken for an address"
            );
        }
        for zoned in [
            "[fe80::1%eth0]:9000",
            "[fe80::1%1]:9000",
            "fe80::1%eth0:9000",
            "fe80::1%1",
        ] {
            let error = zoned
                .parse::<Address>()
                .expect_err("it is nobody else's")
                .to_string();
            assert!(error.contains("a zone") && error.contains(zoned), "{error}");
        }
        assert!(
            Address::try_from("[fe80::1%1]:9000".to_owned()).is_ok(),
            "a view may have it"
        );
    }

    #[test]
    fn random_ids_print_as_they_parse() {
        let id = DirectoryId(0x1f);
        assert_eq!(id.to_string(), "0000000000000000000000000000001f");
        assert_eq!(id.to_string().parse(), Ok(id));
        assert!("1f".parse::<DirectoryId>().is_err());
        assert!(
            "+000000000000000000000000000001f"
                .parse::<ClusterId>()
                .is_err()
        );
    }

    #[test]
    fn log_ids_order_by_term_first() {
        assert!(LogId { term: 2, index: 1 } > LogId { term: 1, index: 9 });
    }
}
