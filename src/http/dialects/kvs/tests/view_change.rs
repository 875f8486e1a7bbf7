//! Changes of the view.

use std::sync::Arc;

use super::*;
use crate::http::testing::FakeStore;

#[tokio::test]
async fn a_view_change_is_waited_for_and_counted() {
    let site = spread().await;
    fill(&site, 30).await;
    site.store.take_time(3);
    site.store.set_epoch(2);
    let change = r#"{"view":"d:4,a:1,c:3"}"#;
    let reply = site.put("/kvs/view-change", change).await;
    let shards = reply.json()["shards"].clone();
    let keys: Vec<u64> = (0..3)
        .map(|at| shards[at]["key-count"].as_u64().expect("a number"))
        .collect();
    let text = format!(
        concat!(
            r#"{{"message":"View change successful","shards":[{{"address":"d:4","key-count":{}}},"#,
            r#"{{"address":"a:1","key-count":{}}},{{"address":"c:3","key-count":{}}}]}}"#
        ),
        keys[0], keys[1], keys[2]
    );
    assert_eq!(told(&reply), (200, text.clone()));
    assert_eq!(keys.iter().sum::<u64>(), 30);
    check(
        &site,
        &[
            ("PUT /kvs/view-change", change, 200, &text),
            ("PUT /proxy/view-change", change, 200, "{}"),
            ("PUT /proxy/view-change", change, 200, "{}"),
        ],
    )
    .await;
    // A plan that has taken over with the same nodes is as good.
    site.store.supersede();
    check(&site, &[("PUT /kvs/view-change", change, 200, &text)]).await;
    site.stop().await;
}

/// The node that answers may learn of the end later than the one that leads the change: before, it
/// would tell of the shards as they were.
#[tokio::test]
async fn a_view_change_is_not_told_as_it_was_before() {
    let site = spread().await;
    site.store.set_epoch(1);
    let (store, learns_at) = (site.store.clone(), std::time::Duration::from_millis(300));
    let asked = tokio::time::Instant::now();
    let learning = tokio::spawn(async move {
        tokio::time::sleep(learns_at).await;
        store.set_epoch(2);
    });
    let reply = site
        .put("/kvs/view-change", r#"{"view":"a:1,b:2,c:3"}"#)
        .await;
    assert_eq!(reply.status, 200, "{reply:?}");
    assert!(
        asked.elapsed() >= learns_at,
        "it did not wait until it knew"
    );
    learning.await.expect("no panic");
    site.stop().await;
}

#[tokio::test]
async fn a_view_change_may_ask_for_a_replication_factor() {
    let site = spread().await;
    fill(&site, 30).await;
    site.store.set_epoch(2);
    let reply = site
        .put(
            "/kvs/view-change",
            r#"{"view":"a:1,b:2,c:3,d:4","repl-factor":2}"#,
        )
        .await;
    let keys = |at: usize| {
        reply.json()["shards"][at]["key-count"]
            .as_u64()
            .expect("a number")
    };
    let text = format!(
        concat!(
            r#"{{"message":"View change successful","shards":["#,
            r#"{{"shard-id":"1","key-count":{},"replicas":["a:1","b:2"]}},"#,
            r#"{{"shard-id":"2","key-count":{},"replicas":["c:3","d:4"]}}]}}"#
        ),
        keys(0),
        keys(1)
    );
    assert_eq!(told(&reply), (200, text));
    assert_eq!(keys(0) + keys(1), 30);
    site.stop().await;
}

#[tokio::test]
async fn a_bad_view_change_is_refused_and_changes_nothing() {
    let site = spread().await;
    let before = site.get("/v1/cluster").await.text();
    for body in [
        "",
        "{",
        "[]",
        "\"a:1\"",
        "{}",
        r#"{"view":""}"#,
        r#"{"view":null}"#,
        r#"{"view":["a:1","b:2"]}"#,
        r#"{"view":7}"#,
        r#"{"view":"a:1,"}"#,
        r#"{"view":",a:1"}"#,
        r#"{"view":"a:1,a:1"}"#,
        r#"{"view":"a:1,b"}"#,
        r#"{"view":"a:1,b:0"}"#,
        r#"{"view":"a:1,b:99999"}"#,
        r#"{"view":"a:1,http://b:2"}"#,
        r#"{"view":"a:1;b:2"}"#,
        r#"{"view":"a:1,b:2\ud800"}"#,
        r#"{"view":"a:1,b:2","repl-factor":3}"#,
        r#"{"view":"a:1,b:2","repl-factor":0}"#,
        r#"{"view":"a:1,b:2","repl-factor":-1}"#,
        r#"{"view":"a:1,b:2","repl-factor":1.5}"#,
        r#"{"view":"a:1,b:2","repl-factor":"2"}"#,
        r#"{"view":"a:1,b:2","repl-factor":null}"#,
        r#"{"view":"a:1,b:2","repl-factor":99999999999999999999}"#,
    ] {
        for path in ["/kvs/view-change", "/proxy/view-change"] {
            let reply = site.put(path, body).await;
            assert_eq!(reply.status, 400, "{body}: {reply:?}");
            let json = reply.json();
            let fields: Vec<&str> = json
                .as_object()
                .expect("an object")
                .keys()
                .map(String::as_str)
                .collect();
            assert_eq!(
                (fields, json["message"].as_str()),
                (vec!["error", "message"], Some("Error in PUT"))
            );
        }
    }
    let unable = r#"{"error":"Unable to satisfy request","message":"Error in PUT"}"#;
    check(
        &site,
        &[(
            "PUT /kvs/view-change",
            r#"{"view":"silent:1,a:1"}"#,
            503,
            unable,
        )],
    )
    .await;
    assert_eq!(site.get("/v1/cluster").await.text(), before);
    site.stop().await;
}

#[tokio::test]
async fn a_spare_passes_a_view_change_on() {
    let site = Site::start().await;
    let cluster = Arc::new(FakeStore::default());
    cluster.set_epoch(2);
    site.store.set_network(cluster.clone());
    site.store.set_here(None);
    let none = concat!(
        r#"{"message":"View change successful","shards":["#,
        r#"{"address":"a:1","key-count":0},{"address":"e:5","key-count":0}]}"#
    );
    check(
        &site,
        &[("PUT /kvs/view-change", r#"{"view":"a:1,e:5"}"#, 200, none)],
    )
    .await;
    assert_eq!(cluster.nodes(), ["a:1", "e:5"]);
    assert_eq!(
        site.store.nodes(),
        ["a:1", "b:2", "c:3"],
        "its own view is nobody's"
    );
    site.stop().await;
}

#[tokio::test]
async fn a_node_that_is_left_out_asks_others_for_the_end() {
    let site = spread().await;
    let cluster = Arc::new(FakeStore::default());
    cluster.set_nodes(&["b:2", "c:3"]);
    cluster.set_epoch(2);
    site.store.set_network(cluster);
    site.store.take_time(u64::MAX);
    let reply = site.put("/kvs/view-change", r#"{"view":"b:2,c:3"}"#).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(site.store.nodes(), ["b:2", "c:3"], "it was asked for here");
    site.stop().await;
}
