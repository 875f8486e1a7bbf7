//! Targets for `fuzzing`: what nodes tell each other outside of groups.

use std::fmt::Debug;

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::peer::*;
use super::protocol::*;
use super::view_change::ChangeInProgress;
use crate::sm::cluster::view::View;
use crate::sm::codec;
use crate::sm::kv::{Action, Condition, Media, Operation, Write};
use crate::sm::starts::Starts;
use crate::sm::testing::view_of;
use crate::types::{
    Address, ClusterId, DirectoryId, GroupId, LogId, NodeId, ReplicaId, Revision, StartId,
};

/// Requests to shards, and their replies.
pub mod shard_calls {
    use super::*;

    pub fn samples() -> Vec<Vec<u8>> {
        let operation = |key: &'static str, condition, action| Operation {
            key: Bytes::from_static(key.as_bytes()),
            condition,
            action,
        };
        let put = Action::Put {
            media: Media::Other("image/png".into()),
            value: Bytes::from_static(b"value"),
        };
        let revisions = vec![Revision(1), Revision(300)];
        let write = Write {
            idempotency_key: Some(Bytes::from_static(b"once")),
            operations: vec![
                operation("a", Condition::RevisionIn(revisions), put),
                operation("{a}b", Condition::Absent, Action::Delete),
                operation("{a}c", Condition::None, Action::Get),
            ],
        };
        let request = |body| ShardRequest {
            cluster: ClusterId(7),
            shard: GroupId(3),
            timeout_ms: 5000,
            body,
        };
        let requests = [ShardBody::Count, ShardBody::Write(write)];
        let mut samples: Vec<Vec<u8>> = requests
            .into_iter()
            .map(|body| codec::encode(&request(body)).to_vec())
            .collect();
        let counted = ShardReply::Counted {
            keys: 3,
            slots: vec![],
        };
        samples.push(codec::encode(&counted).to_vec());
        samples
    }

    pub fn read(bytes: &[u8]) {
        let mut charged = 0;
        let mut charge = |bytes: usize| {
            charged += bytes;
            charged < 128 << 20
        };
        let request = codec::decode_charged::<ShardRequest>(bytes, "a request", &mut charge);
        if let Ok(request) = request {
            let again = codec::decode::<ShardRequest>(&codec::encode(&request), "a request");
            assert_eq!(again.expect("own encoding"), request);
        }
        if let Ok(reply) = codec::decode::<ShardReply>(bytes, "a reply") {
            let again = codec::decode::<ShardReply>(&codec::encode(&reply), "a reply");
            assert_eq!(again.expect("own encoding"), reply);
        }
    }
}

/// JSON between nodes, and between nodes and clients.
pub mod peer_messages {
    use super::*;
    use crate::sm::cluster::meta::MetaCommand;

    fn view() -> Box<View> {
        Box::new(view_of(3))
    }

    fn address(number: u128) -> Address {
        format!("node-{number}:1").parse().expect("an address")
    }

    pub fn samples() -> Vec<Vec<u8>> {
        let identity = |standing| Identity {
            directory: DirectoryId(5),
            address: address(5),
            public_address: Some(address(6)),
            standing,
            speaks: 2,
            level: 1,
            start: Some(Starts::first(StartId(8)).running()),
            holds_level: true,
        };
        let identities = [
            Standing::Fresh {
                view: vec![address(1)],
            },
            Standing::Promised {
                view: vec![address(1)],
                founder: DirectoryId(9),
            },
            Standing::Member { view: view() },
            Standing::Retired {
                cluster: ClusterId(7),
                members: vec![address(2)],
            },
        ];
        let greeting = Greeting {
            cluster: ClusterId(7),
            node: NodeId(2),
            directory: DirectoryId(5),
            address: address(5),
            starts: Starts::first(StartId(8)),
        };
        let promise = PromiseRequest {
            view: vec![address(1)],
            founder: DirectoryId(9),
            founder_address: address(1),
        };
        let announcement = Announcement {
            cluster: ClusterId(7),
            command: MetaCommand::Announce {
                node: NodeId(2),
                directory: DirectoryId(5),
                address: address(5),
                public_address: None,
            },
        };
        let replica = HostedReplica {
            group: GroupId(1),
            replica: ReplicaId(4),
            leader: Some(NodeId(1)),
            term: 3,
            applied: Some(LogId { term: 3, index: 9 }),
            keys: 1,
            bytes: 2,
            failed: Some("why".into()),
            is_witness: false,
            digest: Some(NotedDigest::new(LogId { term: 3, index: 9 }, 1, 2)),
            alarm: None,
        };
        let hosting = Hosting {
            directory: DirectoryId(5),
            replicas: vec![replica],
            failed: vec![],
            speaks: 2,
            holds_level: false,
            lacks_room: true,
            is_stopping: false,
        };
        let mut samples: Vec<Vec<u8>> = identities
            .into_iter()
            .map(|standing| json(&identity(standing)))
            .collect();
        samples.extend([
            json(&greeting),
            json(&GreetingReply::Welcome(greeting)),
            json(&GreetingReply::Outdated { number: 4 }),
            json(&promise),
            json(&announcement),
            json(&hosting),
            json(&view()),
        ]);
        samples
    }

    fn json(value: &impl Serialize) -> Vec<u8> {
        serde_json::to_vec(value).expect("JSON of our own types")
    }

    fn read_as<T: DeserializeOwned + Serialize + PartialEq + Debug>(bytes: &[u8]) {
        if let Ok(value) = serde_json::from_slice::<T>(bytes) {
            let again: T = serde_json::from_slice(&json(&value)).expect("own encoding");
            assert_eq!(again, value);
        }
    }

    pub fn read(bytes: &[u8]) {
        read_as::<Identity>(bytes);
        read_as::<Greeting>(bytes);
        read_as::<GreetingReply>(bytes);
        read_as::<PromiseRequest>(bytes);
        read_as::<PromiseReply>(bytes);
        read_as::<Announcement>(bytes);
        read_as::<Hosting>(bytes);
        read_as::<FailureReport>(bytes);
        read_as::<DiskReport>(bytes);
        read_as::<HoldRequest>(bytes);
        read_as::<View>(bytes);
        read_as::<ClusterStatus>(bytes);
        read_as::<ChangeInProgress>(bytes);
    }
}
