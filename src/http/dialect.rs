//! [`Dialect`], the contract that a request follows.

/// The contract that a request follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    Native,
    EncodedBatch,
    LoadBalancer,
    Kvs,
    PlainBatch,
    Peer,
    /// For paths of no dialect.
    Other,
}

impl Dialect {
    pub const ALL: [Dialect; 7] = [
        Dialect::Native,
        Dialect::EncodedBatch,
        Dialect::LoadBalancer,
        Dialect::Kvs,
        Dialect::PlainBatch,
        Dialect::Peer,
        Dialect::Other,
    ];

    pub fn label(self) -> &'static str {
        match self {
            Dialect::Native => "native",
            Dialect::EncodedBatch => "encoded-batch",
            Dialect::LoadBalancer => "load-balancer",
            Dialect::Kvs => "kvs",
            Dialect::PlainBatch => "plain-batch",
            Dialect::Peer => "peer",
            Dialect::Other => "other",
        }
    }
}
