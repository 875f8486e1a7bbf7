//! [`PeerCaller`]: asks other nodes by their address, in JSON. The messages are `api::peer`.

use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use http::header::{ETAG, IF_NONE_MATCH};
use http::{HeaderValue, StatusCode};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};

use super::call::silence;
use super::reply::{self, ReplyError, SMALL_BYTES_MAX, VIEW_BYTES_MAX};
use super::transport::{HttpTransport, NodeCall, NodeReply, SendError, SetUpError, Transport};
use crate::api::peer::{
    Announcement, DiskReport, FailureReport, Greeting, GreetingReply, HoldRequest, HostedReplica,
    Hosting, Identity, PromiseReply, PromiseRequest,
};
use crate::sm::cluster::meta;
use crate::sm::cluster::view::{NodeSpec, View};
use crate::sm::level::{LEVEL, TooOld};
use crate::types::{Address, ClusterId};

/// Nodes that are asked at once who they are: they must cost few descriptors.
const IDENTITIES_AT_ONCE: usize = 32;

/// A node that does not even take a connection in this time is given up: others wait for their
/// turn.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// Nodes whose last word is kept, with the view in it: a node that waits asks a few members.
const KNOWN_MAX: usize = 32;

/// A reason why a node gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    #[error("{}", silence(.address, .source))]
    NoAnswer {
        address: Address,
        #[source]
        source: SendError,
    },
    #[error("{address} answered {status}: is it a quorate node?")]
    Status { address: Address, status: u16 },
    #[error("{address} was not asked in time: too many others were waited for")]
    NotAsked { address: Address },
    #[error("{address} answered, but {source}")]
    Unreadable {
        address: Address,
        #[source]
        source: ReplyError,
    },
    #[error("another node has the address {address} now")]
    AnotherNode { address: Address },
    /// It belongs to a cluster that uses more than this program knows.
    #[error("{address}: {too_old}")]
    TooOld { address: Address, too_old: TooOld },
    #[error("{address} says of itself what this program can't read: {reason}")]
    Strange { address: Address, reason: String },
}

/// Reads what a node says of itself. Of one that can't be read the level is looked for, which says
/// why.
fn read_identity(address: &Address, text: &str) -> Result<Identity, PeerError> {
    #[derive(Deserialize)]
    struct Head {
        #[serde(default)]
        level: u16,
    }
    serde_json::from_str(text).map_err(|error| match serde_json::from_str::<Head>(text) {
        Ok(Head { level }) if level > LEVEL => PeerError::TooOld {
            address: address.clone(),
            too_old: TooOld::new(level, LEVEL),
        },
        Ok(_) | Err(_) => PeerError::Strange {
            address: address.clone(),
            reason: error.to_string(),
        },
    })
}

/// Calls other nodes by their address.
#[derive(Debug, Clone)]
pub struct PeerCaller {
    transport: Arc<dyn Transport>,
    identities: Arc<Semaphore>,
    known: Arc<Mutex<BTreeMap<Address, KnownIdentity>>>,
}

/// The last identity of a node, which it need not send again.
#[derive(Debug, Clone)]
struct KnownIdentity {
    etag: HeaderValue,
    identity: Arc<Identity>,
}

impl PeerCaller {
    /// # Errors
    ///
    /// Fails if the HTTP client can't be set up.
    pub fn new() -> Result<Self, SetUpError> {
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_idle_timeout(Duration::from_secs(10));
        Ok(Self::over(HttpTransport::build(http)?))
    }

    /// Returns one that calls by way of `transport`.
    pub fn over(transport: Arc<dyn Transport>) -> Self {
        Self {
            transport,
            identities: Arc::new(Semaphore::new(IDENTITIES_AT_ONCE)),
            known: Arc::default(),
        }
    }

    /// Returns a caller that asks so many at once who they are, and waits for nobody who asks with
    /// this one: addresses out of requests may all be silent, and are no reason for a node not to
    /// know who its peers are.
    pub fn with_turns(&self, identities_at_once: usize) -> Self {
        Self {
            transport: self.transport.clone(),
            identities: Arc::new(Semaphore::new(identities_at_once)),
            known: Arc::clone(&self.known),
        }
    }

    /// Asks who is at an address, as one of a few at a time. `timeout` includes the wait for a
    /// turn, so that many can be asked together; who gets none while there is time left for an
    /// answer is not asked. What it has said before is not sent again.
    pub async fn identity(
        &self,
        address: &Address,
        timeout: Duration,
    ) -> Result<Identity, PeerError> {
        let deadline = Instant::now() + timeout;

        // A quarter of the time is kept for the answer: a question with less would only seem
        // unanswered.
        let Ok(Ok(_turn)) = timeout_at(deadline - timeout / 4, self.identities.acquire()).await
        else {
            return Err(PeerError::NotAsked {
                address: address.clone(),
            });
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let mut get = NodeCall::get(address, "/peer/identity", left);

        // The whole view is in an identity, so it is sent only when it has changed.
        let known = self.known.lock().get(address).cloned();
        if let Some(known) = &known {
            get = get.header(IF_NONE_MATCH, known.etag.clone());
        }

        let no_answer = |source| PeerError::NoAnswer {
            address: address.clone(),
            source,
        };
        let response = self.transport.send(get).await.map_err(no_answer)?;
        let etag = response.headers().get(ETAG).cloned();

        // Only with the tag that was asked about: another program may be there by now, which says
        // so of whatever it has.
        let is_unchanged = |known: &KnownIdentity| {
            response.status() == StatusCode::NOT_MODIFIED && etag.as_ref() == Some(&known.etag)
        };
        if let Some(known) = known.filter(is_unchanged) {
            return Ok((*known.identity).clone());
        }
        let text: Box<RawValue> = read_answer(address, response, VIEW_BYTES_MAX).await?;
        let identity = read_identity(address, text.get())?;
        self.note_identity(address, etag, &identity);
        Ok(identity)
    }

    fn note_identity(&self, address: &Address, etag: Option<HeaderValue>, identity: &Identity) {
        let mut known = self.known.lock();
        // The first programs give no tag.
        let Some(etag) = etag else {
            known.remove(address);
            return;
        };
        if known.len() >= KNOWN_MAX && !known.contains_key(address) {
            known.clear();
        }
        let identity = Arc::new(identity.clone());
        known.insert(address.clone(), KnownIdentity { etag, identity });
    }

    pub async fn promise(
        &self,
        address: &Address,
        request: &PromiseRequest,
        timeout: Duration,
    ) -> Result<PromiseReply, PeerError> {
        let post = NodeCall::post(address, "/peer/promise", timeout).json(request);
        self.answer(address, post, VIEW_BYTES_MAX).await
    }

    /// As [`PeerCaller::identity`], of the node with this directory.
    pub async fn identity_of(
        &self,
        node: &NodeSpec,
        timeout: Duration,
    ) -> Result<Identity, PeerError> {
        let identity = self.identity(&node.address, timeout).await?;
        if identity.directory != node.directory {
            return Err(PeerError::AnotherNode {
                address: node.address.clone(),
            });
        }
        Ok(identity)
    }

    /// Asks a node to hold the level of its cluster, or to do so no more. Done durably when it
    /// returns.
    pub async fn hold_level(
        &self,
        address: &Address,
        request: &HoldRequest,
        timeout: Duration,
    ) -> Result<(), PeerError> {
        let post = NodeCall::post(address, "/peer/hold", timeout).json(request);
        self.answer(address, post, SMALL_BYTES_MAX).await
    }

    /// Asks the node with this directory for its replicas.
    pub async fn replicas(
        &self,
        node: &NodeSpec,
        timeout: Duration,
    ) -> Result<Vec<HostedReplica>, PeerError> {
        self.hosting(node, timeout)
            .await
            .map(|hosting| hosting.replicas)
    }

    /// As [`PeerCaller::replicas`], with what the node says of itself besides.
    pub async fn hosting(&self, node: &NodeSpec, timeout: Duration) -> Result<Hosting, PeerError> {
        let address = &node.address;
        let get = NodeCall::get(address, "/peer/replicas", timeout);
        let hosting: Hosting = self.answer(address, get, VIEW_BYTES_MAX).await?;
        if hosting.directory != node.directory {
            return Err(PeerError::AnotherNode {
                address: address.clone(),
            });
        }
        Ok(hosting)
    }

    /// Asks the node that leads the meta group of the cluster for the view as it is now, not as it
    /// may have been.
    pub async fn view(
        &self,
        address: &Address,
        cluster: ClusterId,
        timeout: Duration,
    ) -> Result<View, PeerError> {
        let get = NodeCall::get(address, "/peer/view", timeout);
        let view: View = self.answer(address, get, VIEW_BYTES_MAX).await?;
        if view.cluster != cluster {
            return Err(PeerError::AnotherNode {
                address: address.clone(),
            });
        }
        Ok(view)
    }

    /// Asks the node that leads the meta group to apply an announcement.
    pub async fn announce(
        &self,
        address: &Address,
        announcement: &Announcement,
        timeout: Duration,
    ) -> Result<meta::MetaOutcome, PeerError> {
        let post = NodeCall::post(address, "/peer/announce", timeout).json(announcement);
        self.answer(address, post, SMALL_BYTES_MAX).await
    }

    /// Tells a node that may lead the meta group that replicas have failed here.
    pub async fn report_failures(
        &self,
        address: &Address,
        report: &FailureReport,
        timeout: Duration,
    ) -> Result<(), PeerError> {
        let post = NodeCall::post(address, "/peer/failures", timeout).json(report);
        self.answer(address, post, SMALL_BYTES_MAX).await
    }

    /// Tells a node how full the disk is here. Programs that know no such reports answer with a
    /// status that says so.
    pub async fn report_disk(
        &self,
        address: &Address,
        report: &DiskReport,
        timeout: Duration,
    ) -> Result<(), PeerError> {
        let post = NodeCall::post(address, "/peer/disk", timeout).json(report);
        self.answer(address, post, SMALL_BYTES_MAX).await
    }

    /// Greets a member. Programs of the first release answer with a status that says that they know
    /// no greetings.
    pub async fn greet(
        &self,
        address: &Address,
        greeting: &Greeting,
        timeout: Duration,
    ) -> Result<GreetingReply, PeerError> {
        let post = NodeCall::post(address, "/peer/greet", timeout).json(greeting);
        self.answer(address, post, SMALL_BYTES_MAX).await
    }

    /// Tells a node that waits whom to ask: a view names it.
    pub async fn invite(
        &self,
        address: &Address,
        members: &[Address],
        timeout: Duration,
    ) -> Result<(), PeerError> {
        let post = NodeCall::post(address, "/peer/invite", timeout).json(members);
        self.answer(address, post, SMALL_BYTES_MAX).await
    }

    /// Returns whether a connection to a node can be made, within `at_most`. Nothing is sent over
    /// it.
    pub async fn connects(&self, address: &Address, at_most: Duration) -> bool {
        self.transport.connects(address.clone(), at_most).await
    }

    /// Sends a request and reads its answer. `bytes_max`: the longest that an answer of this kind
    /// is.
    async fn answer<T: DeserializeOwned>(
        &self,
        address: &Address,
        call: NodeCall,
        bytes_max: usize,
    ) -> Result<T, PeerError> {
        let no_answer = |source| PeerError::NoAnswer {
            address: address.clone(),
            source,
        };
        let response = self.transport.send(call).await.map_err(no_answer)?;
        read_answer(address, response, bytes_max).await
    }
}

async fn read_answer<T: DeserializeOwned>(
    address: &Address,
    response: NodeReply,
    bytes_max: usize,
) -> Result<T, PeerError> {
    if !response.status().is_success() {
        return Err(PeerError::Status {
            address: address.clone(),
            status: response.status().as_u16(),
        });
    }
    let read = reply::read_json(response, bytes_max).await;
    read.map_err(|source| PeerError::Unreadable {
        address: address.clone(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use futures::future::join_all;
    use tokio::net::TcpListener;

    use super::*;
    use crate::client::testing::nobody;
    use crate::types::DirectoryId;

    /// Each address of the loopback network is another node to who asks, and one listener to this
    /// test.
    #[tokio::test]
    async fn of_many_addresses_few_are_dialled_at_once_and_all_are_done_with_in_time() {
        let listener = TcpListener::bind("0.0.0.0:0").await.expect("a free port");
        let port = listener.local_addr().expect("a bound address").port();
        let addresses: Vec<Address> = (1..=100)
            .map(|node| {
                format!("127.0.0.{node}:{port}")
                    .parse()
                    .expect("an address")
            })
            .collect();

        let caller = PeerCaller::new().expect("a client");
        let (mut dialled, asked_for) = (Vec::new(), Duration::from_secs(1));
        let accept = async {
            // They are answered by nobody, so that none is done with before its time is up.
            while let Ok((stream, _)) = listener.accept().await {
                dialled.push(stream);
            }
        };
        let asked = join_all(
            addresses
                .iter()
                .map(|address| caller.identity(address, asked_for)),
        );
        let answers = tokio::select! {
            () = accept => unreachable!("a listener goes on"),
            answers = asked => answers,
        };

        assert!(answers.iter().all(Result::is_err));
        let not_asked = answers
            .iter()
            .filter(|answer| matches!(answer, Err(PeerError::NotAsked { .. })))
            .count();
        assert_eq!(
            (dialled.len(), not_asked),
            (IDENTITIES_AT_ONCE, 100 - IDENTITIES_AT_ONCE)
        );
        assert_eq!(caller.identities.available_permits(), IDENTITIES_AT_ONCE);
    }

    #[tokio::test]
    async fn addresses_out_of_a_request_keep_nobody_else_waiting() {
        let silent = nobody().await;
        let caller = PeerCaller::new().expect("a client");
        let request = caller.with_turns(1);
        let _turn = request.identities.acquire().await.expect("it is open");
        let not_asked = request.identity(&silent, Duration::from_millis(20)).await;
        assert!(
            matches!(not_asked, Err(PeerError::NotAsked { .. })),
            "{not_asked:?}"
        );
        for other in [&caller, &caller.with_turns(1)] {
            let asked = other.identity(&silent, Duration::from_secs(20)).await;
            assert!(
                matches!(asked, Err(PeerError::NoAnswer { .. })),
                "nobody listens there any more: {asked:?}"
            );
        }
    }

    #[test]
    fn an_identity_of_a_later_level_says_so_and_one_of_the_first_programs_is_read() {
        let address: Address = "a:1".parse().expect("an address");
        let read = |text: &str| read_identity(&address, text).map_err(|error| error.to_string());
        let text = format!(
            concat!(
                r#"{{"directory":"{:032x}","address":"a:1","public_address":null,"#,
                r#""standing":{{"fresh":{{"view":[]}}}}}}"#
            ),
            7
        );
        let first = read(&text).expect("of a first program");
        assert_eq!(
            (
                first.directory,
                first.speaks,
                first.level,
                first.holds_level
            ),
            (DirectoryId(7), 0, 0, false)
        );
        let later = text.replace("fresh", "unheard-of").replacen(
            '{',
            &format!("{{\"level\":{},", LEVEL + 3),
            1,
        );
        let sentence = format!(
            "a:1: this cluster uses level {}, this program knows {LEVEL}: start a newer one",
            LEVEL + 3
        );
        assert_eq!(read(&later), Err(sentence));
        let strange = read(&text.replace("fresh", "unheard-of")).expect_err("not readable");
        assert!(
            strange.starts_with("a:1 says of itself what this program can't read: "),
            "{strange}"
        );
    }
}
