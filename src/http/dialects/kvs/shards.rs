//! `GET /kvs/key-count`, `/kvs/shards` and `/kvs/shards/<id>`.
//!
//! - `/kvs/key-count`: 200 `{"message":"Key count retrieved successfully","key-count":N}`; in C4
//!   also `"shard-id":"1"`.
//! - `/kvs/shards`: 200 `{"message":"Shard membership retrieved successfully","shards":["1","2"]}`.
//! - `/kvs/shards/<id>`: 200 `{"message":"Shard information retrieved successfully",` and then
//!   `"shard-id":"1","key-count":4,"replicas":["a:1"]}`.
//! - An unknown id: 404 `{"error":"Shard does not exist","message":"Error in GET"}`.
//!
//! A node counts the keys of the shards that are at home on it, in C4 those of the shard that it
//! belongs to. A gateway is no node, and counts them all.

use std::sync::Arc;

use futures::future::try_join_all;
use http::{Method, StatusCode};
use tokio::time::timeout;

use super::refusal;
use super::response::{KvsResponse, ResponseContent, ShardJson};
use crate::api::shard_map::{ShardMap, ShardPlace};
use crate::api::store::Failure;
use crate::http::App;
use crate::http::dialects::error::DialectError;
use crate::http::dialects::request::{ANSWER_TIMEOUT, options};
use crate::sm::cluster::view::Layout;
use crate::types::{Address, GroupId, NodeId};

pub async fn key_count(app: &App) -> Result<KvsResponse, DialectError> {
    let counted = in_time(app, async {
        let map = app.store.map(options()).await?;
        match (app.store.this_node(), map.layout) {
            (Some(here), Layout::Spread) => Ok((count_at_home(app, &map, here).await?, None)),
            (Some(here), Layout::Exclusive) => match map
                .shards()
                .find(|(_, place)| place.replicas.contains(&here))
            {
                Some((shard, _)) => Ok((
                    app.store.count_shard(shard, options()).await?,
                    Some(id_of(shard)),
                )),
                // A node left over by the layout belongs to no shard.
                None => Ok((0, None)),
            },
            (None, _) => {
                let counts = app.store.count(options()).await?;
                Ok((counts.into_iter().map(|(_, keys)| keys).sum(), None))
            }
        }
    });
    let (key_count, shard_id) = counted.await?;
    let content = ResponseContent::KeyCount {
        message: "Key count retrieved successfully",
        key_count,
        shard_id,
    };
    Ok(KvsResponse::new(StatusCode::OK, content))
}

async fn count_at_home(app: &App, map: &ShardMap, home: NodeId) -> Result<u64, Failure> {
    let at_home = map.shards().filter(|(_, place)| place.home == home);
    let counts =
        try_join_all(at_home.map(|(shard, _)| app.store.count_shard(shard, options()))).await?;
    Ok(counts.into_iter().sum())
}

pub async fn all(app: &App) -> Result<KvsResponse, DialectError> {
    let map = in_time(app, app.store.map(options())).await?;
    let shards = map.shards().map(|(shard, _)| id_of(shard)).collect();
    Ok(KvsResponse::new(
        StatusCode::OK,
        ResponseContent::Shards {
            message: "Shard membership retrieved successfully",
            shards,
        },
    ))
}

pub async fn one(app: &App, id: &str) -> Result<KvsResponse, DialectError> {
    let found = in_time(app, async {
        let map: Arc<ShardMap> = app.store.map(options()).await?;
        let Some((shard, place)) = map.shards().find(|(shard, _)| id_of(*shard) == id) else {
            return Ok(None);
        };
        let key_count = app.store.count_shard(shard, options()).await?;
        Ok(Some(ShardJson {
            shard_id: id_of(shard),
            key_count,
            replicas: addresses(&map, place),
        }))
    });
    Ok(match found.await? {
        None => KvsResponse::failed(StatusCode::NOT_FOUND, "Shard does not exist", &Method::GET),
        Some(shard) => KvsResponse::new(
            StatusCode::OK,
            ResponseContent::Shard {
                message: "Shard information retrieved successfully",
                shard,
            },
        ),
    })
}

/// Returns a shard's id as these dialects write it.
pub fn id_of(shard: GroupId) -> String {
    shard.0.to_string()
}

pub fn addresses(map: &ShardMap, place: &ShardPlace) -> Vec<Address> {
    place
        .replicas
        .iter()
        .filter_map(|node| map.node(*node))
        .map(|node| node.address.clone())
        .collect()
}

/// Runs several questions within the time of one answer.
async fn in_time<T>(
    app: &App,
    requested: impl Future<Output = Result<T, Failure>>,
) -> Result<T, DialectError> {
    let late = |_| {
        Err(Failure::Unavailable {
            reason: "it took too long".to_owned(),
            retry_after_ms: 1000,
        })
    };
    timeout(ANSWER_TIMEOUT, requested)
        .await
        .unwrap_or_else(late)
        .map_err(|failure| refusal(app, failure))
}
