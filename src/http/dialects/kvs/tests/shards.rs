//! Counts and shards.

use super::*;

#[tokio::test]
async fn each_node_counts_what_is_at_home_on_it() {
    let site = spread().await;
    fill(&site, 60).await;
    let mut sum = 0;
    for here in 1..=3 {
        site.store.set_here(Some(here));
        let reply = site.get("/kvs/key-count").await;
        let keys = reply.json()["key-count"].as_u64().expect("a number");
        let text =
            format!(r#"{{"message":"Key count retrieved successfully","key-count":{keys}}}"#);
        assert_eq!(told(&reply), (200, text));
        sum += keys;
    }
    assert_eq!(sum, 60);
    site.store.set_here(Some(9));
    let none = r#"{"message":"Key count retrieved successfully","key-count":0}"#;
    check(&site, &[("GET /kvs/key-count", "", 200, none)]).await;
    site.store.set_here(None);
    let all = r#"{"message":"Key count retrieved successfully","key-count":60}"#;
    check(&site, &[("GET /kvs/key-count", "", 200, all)]).await;
    site.stop().await;
}

#[tokio::test]
async fn shards_are_listed_and_counted() {
    let site = exclusive().await;
    fill(&site, 40).await;
    let shards = r#"{"message":"Shard membership retrieved successfully","shards":["1","2"]}"#;
    let no_shard = r#"{"error":"Shard does not exist","message":"Error in GET"}"#;
    check(
        &site,
        &[
            ("GET /kvs/shards", "", 200, shards),
            ("GET /kvs/shards/0", "", 404, no_shard),
            ("GET /kvs/shards/3", "", 404, no_shard),
            ("GET /kvs/shards/", "", 404, no_shard),
            ("GET /kvs/shards/01", "", 404, no_shard),
            ("GET /kvs/shards/1/", "", 404, no_shard),
            ("GET /kvs/shards/-1", "", 404, no_shard),
            ("GET /kvs/shards/99999999999999999999999", "", 404, no_shard),
            ("GET /kvs/shards/%31", "", 404, no_shard),
        ],
    )
    .await;
    let keys = |id: &str| {
        let path = format!("/kvs/shards/{id}");
        let site = &site;
        async move {
            site.get(&path).await.json()["key-count"]
                .as_u64()
                .expect("a number")
        }
    };
    let (first, second) = (keys("1").await, keys("2").await);
    assert_eq!(first + second, 40);
    let shard = |id, keys, replicas: &str| {
        format!(
            concat!(
                r#"{{"message":"Shard information retrieved successfully","shard-id":"{id}","#,
                r#""key-count":{keys},"replicas":[{replicas}]}}"#
            ),
            id = id,
            keys = keys,
            replicas = replicas
        )
    };
    check(
        &site,
        &[
            (
                "GET /kvs/shards/1",
                "",
                200,
                &shard(1, first, r#""a:1","b:2""#),
            ),
            (
                "GET /kvs/shards/2",
                "",
                200,
                &shard(2, second, r#""c:3","d:4""#),
            ),
        ],
    )
    .await;
    for (here, id, keys) in [(1, 1, first), (2, 1, first), (3, 2, second), (4, 2, second)] {
        site.store.set_here(Some(here));
        let text = format!(
            concat!(
                r#"{{"message":"Key count retrieved successfully","#,
                r#""key-count":{keys},"shard-id":"{id}"}}"#
            ),
            keys = keys,
            id = id
        );
        check(&site, &[("GET /kvs/key-count", "", 200, &text)]).await;
    }
    // One shard without a quorum takes nothing from the other.
    site.store.fail(
        1,
        Failure::Unavailable {
            reason: "no quorum".into(),
            retry_after_ms: 1000,
        },
    );
    assert_eq!(site.get("/kvs/key-count").await.status, 200);
    assert_eq!(site.get("/kvs/shards/1").await.status, 503);
    site.stop().await;
}
