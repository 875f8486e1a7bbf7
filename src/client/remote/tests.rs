//! A remote store over nodes that are dead, have left, or do not answer.

use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use http::Response;
use tokio::net::TcpListener;

use super::*;
use crate::api::peer::{Identity, Standing};
use crate::api::store::{GetOutcome, Routing, Store, WriteFailure};
use crate::client::testing::{answer, bind, json, nobody, problem, problem_with, serve, status};
use crate::sm::codec;
use crate::sm::kv::{Condition, Media, Operation, OperationOutcome, WriteOutcome};
use crate::types::Revision;

fn options() -> Options {
    Options {
        consistency: Consistency::Linearizable,
        routing: Routing::Proxy,
        timeout: Duration::from_secs(20),
    }
}

fn put() -> Vec<Operation> {
    let action = Action::Put {
        media: Media::Text,
        value: Bytes::from_static(b"v"),
    };
    vec![Operation {
        key: Bytes::from_static(b"k"),
        condition: Condition::None,
        action,
    }]
}

/// A node that tells this status, and answers the shard's requests so; none: drops the connection.
fn node(
    listener: TcpListener,
    status: ClusterStatus,
    reply: impl Fn(ShardRequest) -> Option<ShardReply> + Send + Sync + 'static,
) {
    let reply = Arc::new(reply);
    serve(listener, move |request| {
        let (status, reply) = (status.clone(), Arc::clone(&reply));
        async move {
            if request.uri().path() == "/v1/cluster" {
                return Some(json(&status));
            }
            assert_eq!(request.uri().path(), "/peer/shard");
            let asked: ShardRequest =
                codec::decode(request.body(), "a shard request").expect("a request");
            assert_eq!((asked.cluster, asked.shard), (status.cluster, GroupId(1)));
            assert!(asked.timeout_ms > 0 && asked.timeout_ms < 20_000);
            reply(asked).map(|reply| Response::new(codec::encode(&reply)))
        }
    });
}

fn written() -> ShardReply {
    let outcome = OperationOutcome::Put {
        revision: Revision(1),
        created: true,
    };
    ShardReply::Written(WriteOutcome::Applied(vec![outcome]))
}

#[tokio::test]
async fn a_request_finds_the_leader_past_dead_nodes_and_old_hints() {
    let (follower, following) = bind().await;
    let (leader, leading) = bind().await;
    let nodes = [nobody().await, follower.clone(), leader.clone()];
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    // The map says that the dead one leads.
    node(following, status(1, Some(0), &nodes), move |_| {
        count.fetch_add(1, Ordering::Relaxed);
        Some(ShardReply::Failed(Failure::Elsewhere {
            shard: GroupId(1),
            address: leader.clone(),
        }))
    });
    node(
        leading,
        status(1, Some(0), &nodes),
        |request| match request.body {
            ShardBody::Write(_) => Some(written()),
            _ => Some(ShardReply::Got(GetOutcome {
                record: None,
                staleness: None,
            })),
        },
    );
    let store = RemoteStore::connect(vec![nobody().await, follower]).expect("a client");
    assert!(store.write(put(), None, options()).await[0].is_ok());
    assert_eq!(
        store
            .get(Bytes::from_static(b"k"), options())
            .await
            .expect("served")
            .record,
        None
    );
    assert_eq!(asked.load(Ordering::Relaxed), 1, "the leader is remembered");
}

#[tokio::test]
async fn a_leader_that_can_not_be_connected_to_is_asked_by_way_of_another_node() {
    let (relay, relaying) = bind().await;
    let leader = nobody().await;
    let nodes = [leader.clone(), relay.clone()];
    let status = status(1, Some(0), &nodes);
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    serve(relaying, move |request| {
        let reply = match (request.uri().path(), request.uri().query()) {
            ("/v1/cluster", _) => json(&status),
            (_, Some("relay=1")) => Response::new(codec::encode(&written())),
            _ => {
                count.fetch_add(1, Ordering::Relaxed);
                let elsewhere = Failure::Elsewhere {
                    shard: GroupId(1),
                    address: leader.clone(),
                };
                Response::new(codec::encode(&ShardReply::Failed(elsewhere)))
            }
        };
        async move { Some(reply) }
    });
    let store = RemoteStore::connect(vec![relay]).expect("a client");
    for _ in 0..3 {
        assert!(store.write(put(), None, options()).await[0].is_ok());
    }
    assert_eq!(asked.load(Ordering::Relaxed), 1, "the way is remembered");
}

/// Whoever answers there knows who leads, and has a connection to it.
#[tokio::test]
async fn a_cluster_behind_one_address_is_asked_to_pass_requests_on() {
    let (balancer, balancing) = bind().await;
    let mut status = status(1, None, &[nobody().await, nobody().await]);
    for node in &mut status.nodes {
        node.public_address = balancer.clone();
    }
    let named = status.nodes[1].address.clone();
    serve(balancing, move |request| {
        let elsewhere = Failure::Elsewhere {
            shard: GroupId(1),
            address: named.clone(),
        };
        let reply = match (request.uri().path(), request.uri().query()) {
            ("/v1/cluster", _) => json(&status),
            (_, Some("relay=1")) => Response::new(codec::encode(&written())),
            _ => Response::new(codec::encode(&ShardReply::Failed(elsewhere))),
        };
        async move { Some(reply) }
    });
    let store = RemoteStore::connect(vec![balancer]).expect("a client");
    assert!(store.write(put(), None, options()).await[0].is_ok());
}

#[tokio::test]
async fn an_unanswered_write_is_unknown_and_repeated_only_with_a_key() {
    let (address, listener) = bind().await;
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let nodes = [address.clone()];
    node(listener, status(1, Some(0), &nodes), move |_| {
        (count.fetch_add(1, Ordering::Relaxed) > 1).then(written)
    });
    let store = RemoteStore::connect(vec![address]).expect("a client");
    let lost = store.write(put(), None, options()).await;
    assert!(
        matches!(&lost[0], Err(WriteFailure::Failed(Failure::Unknown { .. }))),
        "{lost:?}"
    );
    assert_eq!(asked.load(Ordering::Relaxed), 1);
    let kept = store
        .write(put(), Some(Bytes::from_static(b"once")), options())
        .await;
    assert!(kept[0].is_ok(), "{kept:?}");
    assert_eq!(asked.load(Ordering::Relaxed), 3);
}

#[tokio::test]
async fn a_change_is_followed_past_nodes_that_have_left() {
    let (left, leaving) = bind().await;
    let (member, staying) = bind().await;
    for (listener, status, knows) in [
        (leaving, status(1, None, std::slice::from_ref(&left)), false),
        (
            staying,
            status(2, None, &[nobody().await, member.clone()]),
            true,
        ),
    ] {
        serve(listener, move |request| {
            let status = status.clone();
            async move {
                Some(match request.uri().path() {
                    "/v1/cluster" => json(&status),
                    "/v1/cluster/operations/4" if knows => answer(200, DONE),
                    _ => problem_with(404, serde_json::json!({ "code": "unknown_operation" })),
                })
            }
        });
    }
    let store = RemoteStore::connect(vec![left, member]).expect("a client");
    let found = store
        .operation(PlanEpoch(4), options())
        .await
        .expect("an answer")
        .expect("it is known");
    assert!(found.is_over());
    assert_eq!(store.operation(PlanEpoch(5), options()).await, Ok(None));
}

const DONE: &str =
    r#"{"id":4,"phase":"done","replicas_left":0,"slots_left":0,"bytes_left":0,"waiting_for":[]}"#;

#[tokio::test]
async fn a_node_that_left_tells_who_stayed() {
    let (left, leaving) = bind().await;
    let (stayed, staying) = bind().await;
    let nodes = [stayed.clone()];
    node(staying, status(1, Some(0), &nodes), |_| Some(written()));
    let identity = Identity {
        directory: crate::types::DirectoryId(1),
        address: left.clone(),
        public_address: None,
        standing: Standing::Retired {
            cluster: crate::types::ClusterId(1),
            members: vec![stayed],
        },
        speaks: 0,
        level: 0,
        start: None,
        holds_level: false,
    };
    serve(leaving, move |request| {
        let told = if request.uri().path() == "/peer/identity" {
            json(&identity)
        } else {
            answer(503, "a spare")
        };
        async move { Some(told) }
    });
    let store = RemoteStore::connect(vec![nobody().await, left]).expect("a client");
    assert!(store.write(put(), None, options()).await[0].is_ok());
}

#[tokio::test]
async fn calls_say_whether_they_can_have_done_anything() {
    let caller = ShardCaller::new().expect("a client");
    let body = ShardBody::Count;
    let request = ShardRequest {
        cluster: crate::types::ClusterId(1),
        shard: GroupId(1),
        timeout_ms: 1000,
        body,
    };
    let dead = caller
        .call(&nobody().await, &request, Duration::from_secs(20))
        .await
        .expect_err("nobody is there");
    assert!(dead.certainly_not_done(), "{dead}");
    for (code, certain) in [
        (429, true),
        (503, true),
        (404, true),
        (413, true),
        (500, false),
        (504, false),
        (200, false),
    ] {
        let (address, listener) = bind().await;
        serve(listener, move |_| async move {
            Some(problem(code, "not a reply"))
        });
        let error = caller
            .call(&address, &request, Duration::from_secs(20))
            .await
            .expect_err("no reply");
        assert_eq!(error.certainly_not_done(), certain, "{code}: {error}");
    }
}

const PLANNED: &str = r#"{"base":1,"is_same":false,"nodes_added":[],"nodes_removed":[],
    "replicas_added":1,"replicas_removed":0,"shards_added":0,"shards_removed":0,
    "slots_moved":0,"slots_kept":4096,"bytes_moved":0}"#;

/// Two members that tell their status, and answer what else is asked by its number, counted over
/// both from 0.
async fn two_members(
    status: impl Fn(&[Address]) -> ClusterStatus,
    reply: impl Fn(usize, &http::Request<Bytes>) -> Option<Response<Bytes>> + Send + Sync + 'static,
) -> Vec<Address> {
    let ((first, one), (second, two)) = (bind().await, bind().await);
    let nodes = vec![first, second];
    let (reply, asked) = (Arc::new(reply), Arc::new(AtomicUsize::new(0)));
    for listener in [one, two] {
        let (status, reply, asked) = (status(&nodes), Arc::clone(&reply), Arc::clone(&asked));
        serve(listener, move |request| {
            let answer = match request.uri().path() {
                "/v1/cluster" => Some(json(&status)),
                _ => reply(asked.fetch_add(1, Ordering::Relaxed), &request),
            };
            async move { answer }
        });
    }
    nodes
}

#[tokio::test]
async fn a_dry_run_that_one_server_drops_is_tried_at_the_next() {
    let nodes = two_members(
        |nodes| status(1, None, nodes),
        |asked, _| (asked > 0).then(|| answer(200, PLANNED)),
    )
    .await;
    let store = RemoteStore::connect(nodes).expect("a client");
    let planned = store.plan_view(ViewChange::default(), options()).await;
    assert_eq!(planned.map(|planned| planned.replicas_added), Ok(1));
}

#[tokio::test]
async fn a_look_at_a_change_is_repeated_until_somebody_can_tell() {
    let no_leader = "unavailable: the meta group has no leader now";
    let reply = move |asked, _: &_| {
        Some(if asked < 5 {
            problem(503, no_leader)
        } else {
            answer(200, DONE)
        })
    };
    let nodes = two_members(|nodes| status(1, None, nodes), reply).await;
    let store = RemoteStore::connect(nodes).expect("a client");
    let found = store
        .operation(PlanEpoch(4), options())
        .await
        .expect("an answer in the end")
        .expect("it is known");
    assert!(found.is_over());
}

#[tokio::test]
async fn a_guarded_change_is_asked_for_again_and_known_by_what_the_view_is_asked_to_be() {
    let changed = |nodes: &[Address]| ClusterStatus {
        epoch: PlanEpoch(4),
        ..status(2, None, nodes)
    };
    let reply = |asked, request: &http::Request<Bytes>| {
        let late = serde_json::json!({
            "code": "epoch_changed",
            "detail": "the view is that of plan 4 by now",
            "epoch": 4,
        });
        match (request.method(), asked) {
            (&http::Method::PUT, 0) => None,
            (&http::Method::PUT, _) => Some(problem_with(412, late)),
            _ => Some(answer(200, DONE)),
        }
    };
    let nodes = two_members(changed, reply).await;
    let store = RemoteStore::connect(nodes.clone()).expect("a client");
    let wanted = ViewChange {
        nodes: Some(nodes.clone()),
        ..ViewChange::default()
    };
    let accepted = store
        .change_view(wanted, Some(PlanEpoch(3)), options())
        .await;
    assert_eq!(accepted.map(|accepted| accepted.id), Ok(PlanEpoch(4)));

    // Of another change nobody can say so.
    for (only_if, fewer) in [(Some(PlanEpoch(3)), 1), (None, 2)] {
        let nodes = two_members(changed, reply).await;
        let store = RemoteStore::connect(nodes.clone()).expect("a client");
        let wanted = ViewChange {
            nodes: Some(nodes[..fewer].to_vec()),
            ..ViewChange::default()
        };
        let told = store.change_view(wanted, only_if, options()).await;
        assert!(
            matches!(
                told,
                Err(ViewChangeFailure::Failed(Failure::Unknown { .. }))
            ),
            "{told:?}"
        );
    }
}

#[tokio::test]
async fn no_server_is_told_to_wait_for_longer_than_it_lets_itself_be_told() {
    let reply = |_, request: &http::Request<Bytes>| {
        let query = request.uri().query().unwrap_or_default().split('&');
        let told = query.filter_map(|part| {
            part.strip_prefix("timeout=")?
                .strip_suffix("ms")?
                .parse::<u64>()
                .ok()
        });
        let fits = told.max().is_some_and(|ms| ms <= 60_000);
        Some(if fits {
            answer(200, PLANNED)
        } else {
            answer(400, r#"{"code":"invalid_query"}"#)
        })
    };
    let nodes = two_members(|nodes| status(1, None, nodes), reply).await;
    let store = RemoteStore::connect(nodes).expect("a client");
    let options = Options {
        timeout: Duration::from_secs(300),
        ..options()
    };
    assert!(
        store
            .plan_view(ViewChange::default(), options)
            .await
            .is_ok()
    );
}

#[tokio::test]
async fn what_a_server_lacks_is_told_rather_than_that_another_is_dead() {
    let (member, listener) = bind().await;
    let nodes = [nobody().await, member.clone(), nobody().await];
    let told = ClusterStatus {
        answered_by: NodeId(2),
        ..status(1, None, &nodes)
    };
    serve(listener, move |request| {
        let lacks = "unavailable: the meta group has no leader now";
        let answer = if request.uri().path() == "/v1/cluster" {
            json(&told)
        } else {
            problem(503, lacks)
        };
        async move { Some(answer) }
    });
    let store = RemoteStore::connect(vec![member]).expect("a client");
    let options = Options {
        timeout: Duration::from_millis(700),
        ..options()
    };
    let told = store
        .plan_view(ViewChange::default(), options)
        .await
        .expect_err("no quorum")
        .to_string();
    assert_eq!(told, "unavailable: the meta group has no leader now");
}

/// A cluster of three of which the first knows everything and hangs when it is to hand over.
async fn hanging_transfer(
    others: fn(usize) -> Option<Response<Bytes>>,
    timeout: Duration,
) -> (Result<Address, Failure>, usize) {
    let bound = [bind().await, bind().await, bind().await];
    let nodes = bound.each_ref().map(|(address, _)| address.clone());
    let asked = Arc::new(AtomicUsize::new(0));
    for (at, (_, listener)) in bound.into_iter().enumerate() {
        let (told, asked) = (status(1, Some(0), &nodes), Arc::clone(&asked));
        serve(listener, move |request| {
            let (told, asked) = (told.clone(), Arc::clone(&asked));
            async move {
                if request.uri().path() == "/v1/cluster" {
                    return Some(json(&told));
                }
                asked.fetch_add(1, Ordering::Relaxed);
                if at == 0 {
                    std::future::pending::<()>().await;
                }
                others(at)
            }
        });
    }
    let store = RemoteStore::connect(nodes.to_vec()).expect("a client");
    let told = store
        .transfer_leader(
            GroupId(1),
            None,
            Options {
                timeout,
                ..options()
            },
        )
        .await;
    (told, asked.load(Ordering::Relaxed))
}

#[tokio::test]
async fn a_hand_over_that_one_node_may_have_done_is_not_called_undone() {
    let (others, timeout) = (|_| Some(problem(503, "no quorum")), Duration::from_secs(3));
    let (told, asked) = hanging_transfer(others, timeout).await;
    assert!(matches!(told, Err(Failure::Unknown { .. })), "{told:?}");
    assert_eq!(asked, 3, "the others were asked in what time was left");
    let (told, _) = hanging_transfer(|_| Some(problem(400, "no such replica")), timeout).await;
    assert!(matches!(told, Err(Failure::Unknown { .. })), "{told:?}");
}
