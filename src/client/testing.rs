//! A server for the tests of the clients: answers whatever it is told to.

use std::future::Future;
use std::sync::Arc;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

use crate::api::protocol::{ClusterStatus, NodeStatus, ReplicaHealth, ReplicaStatus, ShardStatus};
use crate::routing::problem::{MEDIA_TYPE, TYPE_PREFIX};
use crate::sm::cluster::view::{PlacementSpec, SlotTable};
use crate::types::{
    Address, ClusterId, DirectoryId, GroupId, MapVersion, NodeId, PlanEpoch, ReplicaId,
};

/// A listener on a port of its own, not yet served.
pub async fn bind() -> (Address, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener
        .local_addr()
        .expect("a bound address")
        .to_string()
        .parse()
        .expect("an address");
    (address, listener)
}

/// An address where nobody listens.
pub async fn nobody() -> Address {
    bind().await.0
}

/// Serves until the test's runtime ends. A handler that returns none drops the connection.
pub fn serve<H, F>(listener: TcpListener, handler: H)
where
    H: Fn(Request<Bytes>) -> F + Send + Sync + 'static,
    F: Future<Output = Option<Response<Bytes>>> + Send + 'static,
{
    let handler = Arc::new(handler);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let handler = Arc::clone(&handler);
            let service = service_fn(move |request: Request<hyper::body::Incoming>| {
                let handler = Arc::clone(&handler);
                async move {
                    let (parts, body) = request.into_parts();
                    let body = body
                        .collect()
                        .await
                        .map(|body| body.to_bytes())
                        .unwrap_or_default();
                    match handler(Request::from_parts(parts, body)).await {
                        Some(response) => Ok(response.map(Full::new)),
                        None => Err("dropped"),
                    }
                }
            });
            tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
        }
    });
}

pub fn answer(status: u16, body: impl Into<Bytes>) -> Response<Bytes> {
    Response::builder()
        .status(status)
        .body(body.into())
        .expect("a response")
}

/// An error answer as nodes give it.
pub fn problem(status: u16, detail: &str) -> Response<Bytes> {
    problem_with(status, serde_json::json!({ "code": "x", "detail": detail }))
}

/// The same with these fields.
pub fn problem_with(status: u16, mut fields: serde_json::Value) -> Response<Bytes> {
    fields["type"] = format!("{TYPE_PREFIX}x").into();
    let problem = Response::builder()
        .status(status)
        .header(CONTENT_TYPE, MEDIA_TYPE);
    problem.body(fields.to_string().into()).expect("a response")
}

/// A cluster of these nodes, with one shard that owns every slot and has a replica on each.
pub fn status(version: u64, leader: Option<usize>, nodes: &[Address]) -> ClusterStatus {
    let id = |at: usize| NodeId(at as u64 + 1);
    let node = |(at, address): (usize, &Address)| NodeStatus {
        id: id(at),
        address: address.clone(),
        public_address: address.clone(),
        directory: DirectoryId(0),
        reachable: true,
        leaving: false,
        speaks: None,
        holds_level: false,
        failed: vec![],
    };
    let replica = |at: usize| ReplicaStatus {
        id: ReplicaId(at as u64),
        node: id(at),
        health: ReplicaHealth::Following,
        applied: None,
        leaving: false,
    };
    let shard = ShardStatus {
        id: GroupId(1),
        home: NodeId(1),
        leader: leader.map(id),
        term: Some(2),
        keys: Some(3),
        bytes: Some(40),
        slots: 4096,
        replicas: (0..nodes.len()).map(replica).collect(),
        witness: None,
        alarm: None,
    };
    ClusterStatus {
        cluster: ClusterId(1),
        epoch: PlanEpoch(1),
        version: MapVersion(version),
        level: 0,
        asked: PlacementSpec::default(),
        answered_by: NodeId(1),
        meta_leader: Some(NodeId(1)),
        nodes: nodes.iter().enumerate().map(node).collect(),
        shards: vec![shard],
        moves: vec![],
        slots_astray: 0,
        settled: true,
        slots: SlotTable::new(|_| GroupId(1)),
    }
}

pub fn json(value: &impl serde::Serialize) -> Response<Bytes> {
    answer(200, serde_json::to_vec(value).expect("it serializes"))
}
