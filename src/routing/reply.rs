//! Reads the bodies of replies, within limits: whoever answers at an address need not be who was
//! meant, nor be well.
//!
//! Each kind of reply has its own bound, and what is read is charged to a budget that all replies
//! of the process share, as it comes. How long a reply may take is set with its request.

use std::sync::{Arc, LazyLock};

use bytes::{Bytes, BytesMut};
use serde::de::DeserializeOwned;

use super::call::describe;
use super::transport::{NodeReply, SendError};
use crate::budget::{Budget, Share};

/// A view, or what a node says of all its replicas: of a thousand nodes and some thousands of
/// groups it is a few mebibytes of JSON.
pub const VIEW_BYTES_MAX: usize = 16 << 20;
/// An outcome, a promise kept or refused, a leader's address.
pub const SMALL_BYTES_MAX: usize = 256 << 10;
/// Bytes that are kept of the text of an error.
pub const PROBLEM_BYTES_MAX: usize = 64 << 10;
/// The replies that are read at once: hundreds of pages of listings, or of the largest values some
/// thirty.
const REPLIES_BYTES_MAX: usize = 256 << 20;

static REPLIES: LazyLock<Arc<Budget>> = LazyLock::new(|| Budget::new(REPLIES_BYTES_MAX));

/// Returns what all replies are charged to while they are read.
pub fn budget() -> &'static Arc<Budget> {
    &REPLIES
}

/// A reason why a reply can't be read.
#[derive(Debug, thiserror::Error)]
pub enum ReplyError {
    #[error("{}", describe(.0))]
    Broken(#[from] SendError),
    #[error("the reply has more than {bytes_max} bytes, which none of its kind has")]
    TooLong { bytes_max: usize },
    #[error("replies of {REPLIES_BYTES_MAX} bytes are read already: try again in a moment")]
    Overloaded,
    #[error("the reply does not make sense: {0}")]
    Malformed(String),
}

/// The bytes of a reply, charged for as long as this lives.
#[derive(Debug)]
pub struct Reply {
    pub bytes: Bytes,
    _share: Share,
}

/// Reads a reply that has at most so many bytes.
///
/// # Errors
///
/// Fails if it is longer, breaks off, or there is no room for it.
pub async fn read(response: NodeReply, bytes_max: usize) -> Result<Reply, ReplyError> {
    read_charged(response, bytes_max, budget()).await
}

async fn read_charged(
    mut response: NodeReply,
    bytes_max: usize,
    budget: &Arc<Budget>,
) -> Result<Reply, ReplyError> {
    let too_long = || ReplyError::TooLong { bytes_max };
    // Refused by its head, before any of it is read.
    if response
        .content_length()
        .is_some_and(|length| length > bytes_max as u64)
    {
        return Err(too_long());
    }

    let (mut share, mut bytes) = (budget.empty_share(), BytesMut::new());
    while let Some(chunk) = response.chunk().await? {
        // The head need not state a length, nor the true one.
        if bytes.len() + chunk.len() > bytes_max {
            return Err(too_long());
        }

        // Charged as it comes: the stated length of a reply that never comes would take room from
        // others.
        if !share.grow(chunk.len()) {
            return Err(ReplyError::Overloaded);
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(Reply {
        bytes: bytes.freeze(),
        _share: share,
    })
}

/// Reads a reply in JSON that has at most so many bytes.
///
/// # Errors
///
/// As [`read`], and when it is not what is awaited.
pub async fn read_json<T: DeserializeOwned>(
    response: NodeReply,
    bytes_max: usize,
) -> Result<T, ReplyError> {
    let reply = read(response, bytes_max).await?;
    serde_json::from_slice(&reply.bytes).map_err(|error| ReplyError::Malformed(error.to_string()))
}

/// Reads the text of an error; nothing if it can't be read.
pub async fn read_problem(response: NodeReply) -> Bytes {
    read(response, PROBLEM_BYTES_MAX)
        .await
        .map(|reply| reply.bytes)
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::api::peer::{Identity, Standing};
    use crate::client::testing::{answer, bind, serve};
    use crate::routing::transport::{HttpTransport, NodeCall};
    use crate::sm::cluster::view::{NodeSpec, PlacementSpec, View};
    use crate::sm::level::LEVEL;
    use crate::sm::placement::first_view;
    use crate::types::{ClusterId, DirectoryId, NodeId, SLOTS};

    async fn get(body: &'static [u8]) -> NodeReply {
        let (address, listener) = bind().await;
        serve(listener, move |_| async move { Some(answer(200, body)) });
        let transport = HttpTransport::build(reqwest::Client::builder()).expect("a client");
        let get = NodeCall::get(&address, "/", Duration::from_secs(20));
        transport.send(get).await.expect("an answer")
    }

    #[tokio::test]
    async fn a_reply_is_read_up_to_its_bound_and_within_the_budget() {
        let budget = Budget::new(10);
        let reply = read_charged(get(b"12345678").await, 8, &budget)
            .await
            .expect("it fits");
        assert_eq!((&reply.bytes[..], budget.used()), (&b"12345678"[..], 8));
        let crowded = read_charged(get(b"123").await, 8, &budget).await;
        assert!(
            matches!(crowded, Err(ReplyError::Overloaded)),
            "{crowded:?}"
        );
        drop(reply);
        let long = read_charged(get(b"123456789").await, 8, &budget).await;
        assert!(
            matches!(long, Err(ReplyError::TooLong { bytes_max: 8 })),
            "{long:?}"
        );
        assert_eq!(budget.used(), 0);
        assert!(read_json::<u64>(get(b"nonsense").await, 100).await.is_err());
        assert_eq!(
            read_json::<u64>(get(b"12").await, 100)
                .await
                .expect("a number"),
            12
        );
    }

    /// Returns the first view of so many nodes and shards.
    fn view(nodes: u16, shards: u16, replication_factor: u8) -> View {
        let node = |at: u16| NodeSpec {
            address: format!("node-{at:04}.some-zone.example.com:13800")
                .parse()
                .expect("an address"),
            public_address: None,
            directory: DirectoryId(u128::MAX - u128::from(at)),
        };
        let asked = PlacementSpec::from_flags(Some(replication_factor), Some(shards));
        first_view(ClusterId(u128::MAX), asked, (1..=nodes).map(node).collect()).expect("a view")
    }

    fn identity_bytes(view: &View) -> usize {
        let identity = Identity {
            directory: DirectoryId(u128::MAX),
            address: view.nodes[&NodeId(1)].address.clone(),
            public_address: None,
            standing: Standing::Member {
                view: Box::new(view.clone()),
            },
            speaks: LEVEL,
            level: view.level,
            start: None,
            holds_level: false,
        };
        serde_json::to_vec(&identity).expect("JSON").len()
    }

    /// The figures are in ARCHITECTURE.md. There is a shard to a slot at most.
    #[test]
    fn a_view_of_as_many_shards_as_there_can_be_fits_in_a_reply() {
        let usual = view(10, 4000, 3);
        let (entry, json) = (usual.encode().len(), identity_bytes(&usual));
        println!("10 nodes, 4000 shards: {entry} bytes, as JSON {json}");
        assert!(entry < 256 << 10, "{entry}");
        assert!(json < 2 << 20, "{json}");

        let large = view(200, SLOTS, 7);
        let (entry, json) = (large.encode().len(), identity_bytes(&large));
        println!("200 nodes, 4096 shards of 7 replicas: {entry} bytes, as JSON {json}");
        assert!(entry < 1 << 20, "{entry}");
        assert!(json < VIEW_BYTES_MAX, "{json}");
    }
}
