//! The native dialect over a real connection and a store in memory.

use std::time::Duration;

use serde_json::{Value, json};

use crate::api::store::{Consistency, Failure, Routing};
use crate::http::Limits;
use crate::http::testing::{Site, request};
use crate::sm::kv::Media;
use crate::types::{Address, GroupId};

fn elsewhere() -> Failure {
    let address: Address = "leader:7".parse().expect("an address");
    Failure::Elsewhere {
        shard: GroupId(1),
        address,
    }
}

fn unavailable() -> Failure {
    Failure::Unavailable {
        reason: "no quorum".into(),
        retry_after_ms: 2500,
    }
}

#[tokio::test]
async fn a_value_is_kept_with_its_type_and_revision() {
    let site = Site::start().await;
    let put = site
        .ask("PUT /v1/kv/a\ncontent-type: image/png", b"\x89PNG")
        .await;
    assert_eq!(
        (put.status, put.header("etag"), put.header("content-type")),
        (201, "\"1\"", "application/json")
    );
    assert_eq!(
        put.text(),
        "{\"key\":\"a\",\"revision\":1,\"created\":true}\n",
        "one line, so that a terminal's prompt begins another"
    );
    let put = site
        .ask("PUT /v1/kv/a\ncontent-type: image/png", b"\x89PNG2")
        .await;
    assert_eq!(
        (put.status, put.json()),
        (200, json!({ "key": "a", "revision": 2, "created": false }))
    );
    let got = site.get("/v1/kv/a").await;
    assert_eq!((got.status, &got.body[..]), (200, &b"\x89PNG2"[..]));
    assert_eq!(
        (
            got.header("etag"),
            got.header("content-type"),
            got.header("content-length")
        ),
        ("\"2\"", "image/png", "5")
    );
    let head = site.ask("HEAD /v1/kv/a", "").await;
    assert_eq!(
        (
            head.status,
            head.header("etag"),
            head.header("content-length")
        ),
        (200, "\"2\"", "5")
    );
    let deleted = site.ask("DELETE /v1/kv/a", "").await;
    assert_eq!(
        (deleted.status, deleted.json()),
        (200, json!({ "key": "a", "revision": 3 }))
    );
    assert_eq!(
        site.ask("DELETE /v1/kv/a", "").await.verdict(),
        (404, "key_not_found".into())
    );
    let missing = site.get("/v1/kv/a").await;
    assert_eq!(missing.verdict(), (404, "key_not_found".into()));
    assert!(missing.body.ends_with(b"}\n"));
    assert_eq!(site.ask("HEAD /v1/kv/a", "").await.status, 404);
    let empty = site.put("/v1/kv/empty", "").await;
    assert_eq!(empty.status, 201);
    let got = site.get("/v1/kv/empty").await;
    assert_eq!(
        (
            got.status,
            got.header("content-length"),
            got.header("content-type")
        ),
        (200, "0", "text/plain")
    );
    site.stop().await;
}

#[tokio::test]
async fn what_curl_sends_is_text_or_octets() {
    let site = Site::start().await;
    let form = "content-type: application/x-www-form-urlencoded";
    site.ask(&format!("PUT /v1/kv/text\n{form}"), "grüße").await;
    site.ask(&format!("PUT /v1/kv/octets\n{form}"), b"\xff")
        .await;
    assert_eq!(
        site.store.record(b"text").map(|record| record.media),
        Some(Media::Text)
    );
    assert_eq!(
        site.store.record(b"octets").map(|record| record.media),
        Some(Media::Octets)
    );
    assert_eq!(
        site.get("/v1/kv/octets").await.header("content-type"),
        "application/octet-stream"
    );
    for bad in ["nonsense", "a/b\ncontent-type: c/d", "text/pl\u{fc}in"] {
        let answer = site
            .ask(&format!("PUT /v1/kv/a\ncontent-type: {bad}"), "x")
            .await;
        assert_eq!(answer.verdict(), (400, "invalid_header".into()), "{bad}");
    }
    site.stop().await;
}

#[tokio::test]
async fn a_key_is_any_bytes() {
    let site = Site::start().await;
    for (path, key) in [
        ("a/b//c/", &b"a/b//c/"[..]),
        ("/", b"/"),
        ("a%2Fb", b"a/b"),
        ("../..", b"../.."),
        ("%00%FF", b"\x00\xff"),
        ("a%20b+c", b"a b+c"),
        ("gr%C3%BC%C3%9Fe", "grüße".as_bytes()),
    ] {
        let put = site.put(&format!("/v1/kv/{path}"), path).await;
        assert_eq!(put.status, 201, "{path}");
        assert_eq!(
            site.store.record(key).map(|record| record.value),
            Some(path.to_owned().into()),
            "{path}"
        );
        assert_eq!(site.get(&format!("/v1/kv/{path}")).await.text(), path);
    }
    let odd = site.put("/v1/kv/%00%FF", "").await.json();
    assert_eq!(
        (&odd["key"], &odd["key_encoding"]),
        (&json!("AP8="), &json!("base64"))
    );
    let long = "k".repeat(4097);
    for bad in ["", "%", "%2", "%zz", "a%", long.as_str()] {
        for method in ["GET", "PUT", "DELETE", "HEAD"] {
            let answer = site
                .ask(
                    &format!("{method} /v1/kv/{bad}"),
                    if method == "PUT" { "x" } else { "" },
                )
                .await;
            assert_eq!(answer.status, 400, "{method} {bad}");
            assert!(
                method == "HEAD" || answer.verdict().1 == "invalid_key",
                "{method} {bad}"
            );
        }
    }
    assert_eq!(
        site.put(&format!("/v1/kv/{}", "%6B".repeat(4096)), "x")
            .await
            .status,
        201
    );
    site.stop().await;
}

#[tokio::test]
async fn conditions_are_those_of_http() {
    let site = Site::start().await;
    site.put("/v1/kv/a", "1").await;
    let refused = site.ask("PUT /v1/kv/a\nif-none-match: *", "2").await;
    assert_eq!(
        (refused.verdict(), refused.header("etag")),
        ((412, "condition_failed".into()), "\"1\"")
    );
    let refused = site.ask("PUT /v1/kv/missing\nif-match: *", "2").await;
    assert_eq!(
        (refused.verdict(), refused.header("etag")),
        ((412, "condition_failed".into()), "")
    );
    assert_eq!(
        site.ask("PUT /v1/kv/a\nif-match: \"7\", \"1\"", "2")
            .await
            .status,
        200
    );
    assert_eq!(
        site.ask("PUT /v1/kv/a\nif-match: W/\"2\"", "3")
            .await
            .status,
        412
    );
    assert_eq!(
        site.ask("PUT /v1/kv/a\nif-none-match: \"2\"", "3")
            .await
            .status,
        412
    );
    assert_eq!(
        site.ask("DELETE /v1/kv/a\nif-match: \"1\"", "")
            .await
            .status,
        412
    );
    assert_eq!(
        site.ask("DELETE /v1/kv/missing\nif-match: \"1\"", "")
            .await
            .status,
        404
    );
    assert_eq!(site.get("/v1/kv/a").await.text(), "2");
    let unchanged = site.ask("GET /v1/kv/a\nif-none-match: W/\"2\"", "").await;
    assert_eq!(
        (
            unchanged.status,
            unchanged.header("etag"),
            unchanged.body.len()
        ),
        (304, "\"2\"", 0)
    );
    assert!(
        ["", "1"].contains(&unchanged.header("content-length")),
        "that of the value, or none: {unchanged:?}"
    );
    assert_eq!(
        site.ask("HEAD /v1/kv/a\nif-none-match: *", "").await.status,
        304
    );
    assert_eq!(
        site.ask("GET /v1/kv/a\nif-match: \"1\"", "").await.status,
        412
    );
    assert_eq!(
        site.ask("GET /v1/kv/missing\nif-match: *", "").await.status,
        404
    );
    for (method, header) in [
        ("GET", "if-match"),
        ("PUT", "if-none-match"),
        ("DELETE", "if-match"),
    ] {
        let answer = site
            .ask(&format!("{method} /v1/kv/a\n{header}: 2"), "")
            .await;
        assert_eq!(answer.verdict(), (400, "invalid_header".into()));
    }
    site.stop().await;
}

#[tokio::test]
async fn a_write_with_an_idempotency_key_is_done_once() {
    let site = Site::start().await;
    for _ in 0..2 {
        let put = site.ask("PUT /v1/kv/a\nidempotency-key: once", "1").await;
        assert_eq!(
            (put.status, put.json()["revision"].as_u64()),
            (201, Some(1))
        );
    }
    let reused = site.ask("PUT /v1/kv/a\nidempotency-key: once", "2").await;
    assert_eq!(reused.verdict(), (422, "idempotency_key_reused".into()));
    let long = "k".repeat(256);
    for bad in [
        "",
        "two words",
        "gr\u{fc}n",
        long.as_str(),
        "a\nidempotency-key: b",
    ] {
        let answer = site
            .ask(&format!("PUT /v1/kv/b\nidempotency-key: {bad}"), "1")
            .await;
        assert_eq!(answer.verdict(), (400, "invalid_header".into()), "{bad}");
    }
    site.stop().await;
}

#[tokio::test]
async fn options_reach_the_store_and_failures_the_client() {
    let site = Site::start().await;
    site.put("/v1/kv/a?proxy=true&timeout=1500ms", "1").await;
    let options = site.store.last_options();
    assert_eq!(
        (options.routing, options.timeout),
        (Routing::Proxy, Duration::from_millis(1500))
    );
    let stale = site.get("/v1/kv/a?consistency=stale").await;
    assert_eq!(
        (stale.status, stale.header("quorate-staleness")),
        (200, "12")
    );
    let options = site.store.last_options();
    assert_eq!(
        (options.routing, options.consistency),
        (Routing::Redirect, Consistency::Stale)
    );
    assert_eq!(options.timeout, Duration::from_secs(5));
    assert_eq!(
        site.get("/v1/kv/missing?consistency=stale")
            .await
            .header("quorate-staleness"),
        "12"
    );
    let asked = site.store.requests();
    for bad in [
        "?x=1",
        "?proxy=1",
        "?timeout=61s",
        "?proxy=true&proxy=true",
        "?consistency=%zz",
    ] {
        assert_eq!(
            site.get(&format!("/v1/kv/a{bad}")).await.verdict(),
            (400, "invalid_query".into()),
            "{bad}"
        );
    }
    assert_eq!(
        site.put("/v1/kv/a?consistency=stale", "1").await.status,
        400
    );
    assert_eq!(
        site.store.requests(),
        asked,
        "a bad request reaches no store"
    );

    site.store.fail(1, elsewhere());
    for method in ["GET", "PUT", "DELETE"] {
        let moved = site
            .ask(
                &format!("{method} /v1/kv/a%2Fb?timeout=1s"),
                if method == "PUT" { "1" } else { "" },
            )
            .await;
        assert_eq!(
            (moved.status, moved.header("location")),
            (307, "http://leader:7/v1/kv/a%2Fb?timeout=1s")
        );
        assert_eq!(
            moved.text(),
            "leader is at leader:7; use curl -L or ?proxy=true\n"
        );
    }
    for (failure, status, code, retry_after) in [
        (unavailable(), 503, "unavailable", "3"),
        (
            Failure::Overloaded {
                limit: "queue".into(),
                retry_after_ms: 0,
            },
            429,
            "overloaded",
            "1",
        ),
        (
            Failure::Unknown {
                reason: "lost".into(),
            },
            504,
            "unknown_outcome",
            "",
        ),
        (
            Failure::TooLarge {
                limit: "8 MiB".into(),
            },
            413,
            "too_large",
            "",
        ),
    ] {
        site.store.fail(1, failure);
        let answer = site.put("/v1/kv/a", "1").await;
        assert_eq!(
            (answer.verdict(), answer.header("retry-after")),
            ((status, code.into()), retry_after)
        );
    }
    site.stop().await;
}

#[tokio::test]
async fn unknown_paths_and_methods_are_problems() {
    let site = Site::start().await;
    let garbage = format!("/{}", "x".repeat(5000));
    for path in [
        "/v1",
        "/v1/",
        "/v1/kvx",
        "/v2/kv/a",
        "/v1/cluster/",
        "/%ff",
        garbage.as_str(),
    ] {
        assert_eq!(
            site.get(path).await.verdict(),
            (404, "unknown_route".into()),
            "{path}"
        );
    }
    for (method, path, allow) in [
        ("POST", "/v1/kv/a", "GET,HEAD,PUT,DELETE"),
        ("FROBNICATE", "/v1/kv/a", "GET,HEAD,PUT,DELETE"),
        ("PUT", "/v1/kv", "GET,HEAD"),
        ("GET", "/v1/batch", "POST"),
        ("DELETE", "/healthz", "GET,HEAD"),
        ("GET", "/v1/cluster/shards/1/leader", "POST"),
    ] {
        let answer = site.ask(&format!("{method} {path}"), "").await;
        assert_eq!(
            answer.verdict(),
            (405, "method_not_allowed".into()),
            "{method} {path}"
        );
        assert_eq!(answer.header("allow"), allow, "{method} {path}");
    }
    site.stop().await;
}

/// Follows a listing to its end.
async fn keys(site: &Site, query: &str) -> Vec<String> {
    let (mut keys, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = site.get(&format!("/v1/kv?{query}{cursor}")).await;
        assert_eq!(page.status, 200, "{}", page.text());
        let page = page.json();
        let items = page["items"].as_array().expect("items").iter();
        keys.extend(items.map(|item| item["key"].as_str().expect("a key").to_owned()));
        match page["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => return keys,
        }
    }
}

#[tokio::test]
async fn a_listing_goes_page_by_page_in_both_directions() {
    let site = Site::start().await;
    for key in ["a", "b/1", "b/2", "b/3", "z"] {
        site.put(&format!("/v1/kv/{key}"), key).await;
    }
    assert_eq!(
        keys(&site, "limit=2").await,
        ["a", "b/1", "b/2", "b/3", "z"]
    );
    assert_eq!(
        keys(&site, "limit=2&reverse=true").await,
        ["z", "b/3", "b/2", "b/1", "a"]
    );
    assert_eq!(
        keys(&site, "prefix=b%2F&limit=1").await,
        ["b/1", "b/2", "b/3"]
    );
    assert_eq!(
        keys(&site, "prefix=b/&start=b/2&reverse=true&limit=1").await,
        ["b/3", "b/2"]
    );
    assert_eq!(keys(&site, "start=b/2&end=z").await, ["b/2", "b/3"]);
    assert_eq!(keys(&site, "start=z&end=a").await, [""; 0]);
    assert_eq!(site.store.last_options().routing, Routing::Proxy);

    let cursor = site.get("/v1/kv?limit=1").await.json()["next_cursor"]
        .as_str()
        .expect("there is more")
        .to_owned();
    for bad in [
        format!("limit=1&reverse=true&cursor={cursor}"),
        format!("prefix=b&cursor={cursor}"),
        format!("cursor={cursor}%3D"),
        format!("cursor={}", &cursor[1..]),
        "cursor=".to_owned(),
        "cursor=%FF".to_owned(),
        "limit=1001".to_owned(),
        "keys_only=yes".to_owned(),
        "what=ever".to_owned(),
    ] {
        assert_eq!(
            site.get(&format!("/v1/kv?{bad}")).await.verdict(),
            (400, "invalid_query".into()),
            "{bad}"
        );
    }
    site.store.fail(1, unavailable());
    assert_eq!(
        site.get("/v1/kv").await.verdict(),
        (503, "unavailable".into())
    );
    site.stop().await;
}

#[tokio::test]
async fn a_listing_shows_every_value_without_loss() {
    let site = Site::start().await;
    site.ask(
        "PUT /v1/kv/json\ncontent-type: application/json",
        "{\"n\": 1.0}",
    )
    .await;
    site.ask("PUT /v1/kv/%FF\ncontent-type: image/png", b"\x89")
        .await;
    let listed = site.get("/v1/kv").await.json();
    let expected = json!([
        {
            "key": "json",
            "value": "{\"n\": 1.0}", "encoding": "utf8", "media_type": "application/json",
            "revision": 1
        },
        {
            "key": "/w==", "key_encoding": "base64",
            "value": "iQ==", "encoding": "base64", "media_type": "image/png",
            "revision": 2
        },
    ]);
    assert_eq!(listed, json!({ "items": expected, "next_cursor": null }));
    let listed = site
        .get("/v1/kv?keys_only=true&limit=1&consistency=stale")
        .await;
    assert_eq!(listed.header("quorate-staleness"), "unknown");
    assert_eq!(
        listed.json()["items"],
        json!([{ "key": "json", "media_type": "application/json", "revision": 1 }])
    );
    let head = site.ask("HEAD /v1/kv", "").await;
    assert_eq!(
        (head.status, head.header("content-type")),
        (200, "application/json")
    );
    site.stop().await;
}

async fn batch(site: &Site, operations: Value) -> (u16, Value) {
    let answer = site
        .post_json("/v1/batch", json!({ "operations": operations }))
        .await;
    (answer.verdict().0, answer.json())
}

#[tokio::test]
async fn a_batch_answers_each_operation() {
    let site = Site::start().await;
    let (status, answer) = batch(
        &site,
        json!([
            { "op": "put", "key": "a", "value": "1", "if_absent": true },
            {
                "op": "put", "key": "/w==", "key_encoding": "base64",
                "value": "iQ==", "encoding": "base64", "media_type": "image/png"
            },
            { "op": "get", "key": "a" },
            { "op": "get", "key": "none" },
            { "op": "delete", "key": "none" },
            { "op": "delete", "key": "a", "if_revision": [1, 9], },
        ]),
    )
    .await;
    // The last condition is judged before anything is done.
    assert_eq!(status, 200);
    assert_eq!(answer["atomic"], "per shard");
    assert_eq!(
        answer["results"][0],
        json!({ "status": 424, "code": "not_applied", "failed_operation": 5 })
    );
    assert_eq!(
        answer["results"][1],
        json!({ "status": 201, "revision": 1, "created": true })
    );
    assert_eq!(
        answer["results"][5],
        json!({ "status": 412, "code": "condition_failed", "current_revision": null })
    );
    let (status, answer) = batch(
        &site,
        json!([
            { "op": "put", "key": "a", "value": "1", "if_none_match": 7 },
            { "op": "get", "key": "a" },
            { "op": "get", "key": "/w==", "key_encoding": "base64", "if_present": true },
            { "op": "delete", "key": "a" },
            { "op": "get", "key": "a" },
        ]),
    )
    .await;
    let text = json!({
        "status": 200, "key": "a",
        "value": "1", "encoding": "utf8", "media_type": "text/plain",
        "revision": 2
    });
    assert_eq!((status, &answer["results"][1]), (200, &text));
    assert_eq!(answer["results"][2]["value"], "iQ==");
    assert_eq!(
        answer["results"][3],
        json!({ "status": 200, "revision": 3 })
    );
    assert_eq!(
        answer["results"][4],
        json!({ "status": 404, "code": "key_not_found" })
    );
    assert_eq!(
        batch(&site, json!([])).await,
        (200, json!({ "atomic": "per shard", "results": [] }))
    );
    assert_eq!(site.store.last_options().routing, Routing::Proxy);
    site.stop().await;
}

#[tokio::test]
async fn the_status_of_a_batch_is_its_worst_case() {
    let site = Site::start().await;
    let both = json!([
        { "op": "put", "key": "a", "value": "1" },
        { "op": "put", "key": "z", "value": "1" },
    ]);
    site.store.fail(2, unavailable());
    let (status, answer) = batch(&site, both.clone()).await;
    assert_eq!(
        (
            status,
            &answer["results"][0]["status"],
            &answer["results"][1]["status"]
        ),
        (207, &json!(201), &json!(503))
    );
    site.store.fail(
        1,
        Failure::Overloaded {
            limit: "queue".into(),
            retry_after_ms: 7000,
        },
    );
    let answer = site
        .post_json("/v1/batch", json!({ "operations": both.clone() }))
        .await;
    assert_eq!(
        (answer.verdict(), answer.header("retry-after")),
        ((503, "unavailable".into()), "7")
    );
    assert_eq!(answer.json()["results"][0]["code"], "overloaded");
    site.store.fail(
        2,
        Failure::Overloaded {
            limit: "queue".into(),
            retry_after_ms: 1000,
        },
    );
    assert_eq!(batch(&site, both.clone()).await.0, 429);
    site.store.fail(
        2,
        Failure::Unknown {
            reason: "lost".into(),
        },
    );
    let (status, answer) = batch(&site, both).await;
    assert_eq!(
        (status, &answer["code"], &answer["results"][1]["status"]),
        (504, &json!("unknown_outcome"), &json!(504))
    );
    site.stop().await;
}

#[tokio::test]
async fn a_bad_batch_changes_nothing() {
    let site = Site::with(Limits {
        batch_operations_max: 3,
        value_bytes_max: 8,
        ..Limits::default()
    })
    .await;
    let good = json!({ "op": "put", "key": "a", "value": "1" });
    for bad in [
        json!({ "op": "put", "key": "a" }),
        json!({ "op": "frobnicate", "key": "a" }),
        json!({ "op": "get" }),
        json!({ "op": "get", "key": "a", "value": "1" }),
        json!({ "op": "delete", "key": "a", "media_type": "a/b" }),
        json!({ "op": "put", "key": "a", "value": 1 }),
        json!({ "op": "put", "key": "a", "value": "=", "encoding": "base64" }),
        json!({ "op": "put", "key": "a", "value": "1", "encoding": "utf16" }),
        json!({ "op": "put", "key": "a", "value": "1", "media_type": "nonsense" }),
        json!({ "op": "put", "key": "a", "value": "1", "if_absent": false }),
        json!({ "op": "put", "key": "a", "value": "1", "if_absent": true, "if_present": true }),
        json!({ "op": "put", "key": "a", "value": "1", "if_revision": -1 }),
        json!({ "op": "put", "key": "a", "value": "1", "if_revision": 1.5 }),
        json!({ "op": "put", "key": "a", "value": "1", "if_match": 1 }),
        json!(7),
    ] {
        let answer = site
            .post_json(
                "/v1/batch",
                json!({ "operations": [good.clone(), bad.clone()] }),
            )
            .await;
        assert_eq!(answer.verdict(), (400, "invalid_body".into()), "{bad}");
    }
    for (bad, code) in [
        (json!({ "op": "get", "key": "" }), "invalid_key"),
        (
            json!({ "op": "get", "key": "k".repeat(4097) }),
            "invalid_key",
        ),
    ] {
        let answer = site
            .post_json("/v1/batch", json!({ "operations": [good.clone(), bad] }))
            .await;
        assert_eq!(answer.verdict(), (400, code.into()));
        assert_eq!(answer.json()["operation"], 1);
    }
    let deep = format!("{{\"operations\":{}", "[".repeat(100_000));
    let huge_number = concat!(
        "{\"operations\":[{\"op\":\"put\",\"key\":\"a\",\"value\":\"1\",",
        "\"if_revision\":99999999999999999999999}]}"
    );
    let twice = "{\"operations\":[{\"op\":\"get\",\"op\":\"put\",\"key\":\"a\",\"value\":\"1\"}]}";
    for bad in [
        &b""[..],
        b"{",
        b"[]",
        b"{}",
        b"null",
        b"{\"operations\":[]} x",
        b"\xff",
        deep.as_bytes(),
        huge_number.as_bytes(),
        twice.as_bytes(),
    ] {
        let answer = site.ask("POST /v1/batch", bad).await;
        assert_eq!(
            answer.verdict(),
            (400, "invalid_body".into()),
            "{}",
            String::from_utf8_lossy(&bad[..bad.len().min(80)])
        );
    }
    let answer = site
        .post_json(
            "/v1/batch",
            json!({ "operations": [good, good, good, good] }),
        )
        .await;
    assert_eq!(
        (answer.verdict(), answer.json()["limit_operations"].as_u64()),
        ((413, "too_large".into()), Some(3))
    );
    let large = json!({ "op": "put", "key": "a", "value": "123456789" });
    let answer = site
        .post_json("/v1/batch", json!({ "operations": [large] }))
        .await;
    assert_eq!(
        (answer.verdict(), answer.json()["limit_bytes"].as_u64()),
        ((413, "too_large".into()), Some(8))
    );
    assert_eq!(
        site.post_json("/v1/batch?consistency=stale", json!({ "operations": [] }))
            .await
            .status,
        400
    );
    assert_eq!(site.store.requests(), 0, "a bad batch reaches no store");
    site.stop().await;
}

#[tokio::test]
async fn lists_of_revisions_are_bounded() {
    let site = Site::start().await;
    let operation = |revisions: usize| {
        let list = vec!["1"; revisions].join(",");
        format!(r#"{{"op":"put","key":"a","value":"v","if_revision":[{list}]}}"#)
    };
    let batch = |operations: &[String]| format!(r#"{{"operations":[{}]}}"#, operations.join(","));
    assert_eq!(
        site.ask("POST /v1/batch", batch(&[operation(1000)]))
            .await
            .status,
        200
    );
    for too_many in [
        batch(&[operation(1001)]),
        batch(&[operation(3_000_000)]),
        batch(&vec![operation(1000); 101]),
    ] {
        let answer = site.ask("POST /v1/batch", too_many).await;
        assert_eq!(answer.verdict(), (400, "invalid_body".into()));
        let detail = answer.json()["detail"].to_string();
        assert!(
            detail.contains("at most") && detail.contains("revisions"),
            "{detail}"
        );
    }
    site.stop().await;
}

#[tokio::test]
async fn what_is_made_of_a_batch_is_paid_for() {
    let site = Site::with(Limits {
        bodies_bytes_max: 100_000,
        ..Limits::default()
    })
    .await;
    let gets =
        |count: usize| json!({ "operations": vec![json!({ "op": "get", "key": "a" }); count] });
    assert_eq!(site.post_json("/v1/batch", gets(10)).await.status, 200);
    // A tenth of the budget as it is sent, and more than all of it as it is read.
    assert_eq!(
        site.post_json("/v1/batch", gets(500)).await.verdict(),
        (429, "overloaded".into())
    );
    site.stop().await;
}

#[tokio::test]
async fn the_cluster_is_shown_and_leaders_are_transferred() {
    let site = Site::start().await;
    let shown = site.get("/v1/cluster").await;
    assert_eq!(
        (shown.status, shown.json()["version"].as_u64()),
        (200, Some(2))
    );
    assert_eq!(site.get("/v1/cluster?x=1").await.status, 400);
    let path = "/v1/cluster/shards/1/leader";
    assert_eq!(
        site.ask(&format!("POST {path}"), "").await.json(),
        json!({ "leader": "home:1" })
    );
    assert_eq!(
        site.post_json(path, json!({ "to": "b:2" })).await.json(),
        json!({ "leader": "b:2" })
    );
    for bad in [
        json!({ "to": "b" }),
        json!({ "too": "b:2" }),
        json!([]),
        json!(1),
    ] {
        assert_eq!(
            site.post_json(path, bad).await.verdict(),
            (400, "invalid_body".into())
        );
    }
    for shard in ["2", "x", "-1", "%31", "99999999999999999999"] {
        let answer = site
            .ask(&format!("POST /v1/cluster/shards/{shard}/leader"), "")
            .await;
        assert_eq!(answer.verdict(), (400, "invalid_request".into()), "{shard}");
    }
    site.stop().await;
}

#[tokio::test]
async fn requests_on_one_connection_follow_each_other() {
    let site = Site::start().await;
    let mut wire = site.connect().await;
    let pipelined = [
        request("PUT /v1/kv/a", b"1"),
        request("GET /v1/kv/a", b""),
        request("GET /v1/kv/b", b""),
    ]
    .concat();
    wire.send(&pipelined).await;
    assert_eq!(wire.reply().await.status, 201);
    assert_eq!(wire.reply().await.text(), "1");
    assert_eq!(wire.reply().await.status, 404);
    site.stop().await;
}

#[tokio::test]
async fn a_scrub_is_begun_and_looked_at() {
    let site = Site::start().await;
    let path = "/v1/node/scrub";
    let looked = site.get(path).await;
    assert_eq!((looked.status, &looked.json()["number"]), (200, &json!(0)));
    let begun = site.ask(&format!("POST {path}"), "").await;
    assert_eq!(begun.status, 202);
    assert_eq!(
        (&begun.json()["number"], &begun.json()["is_running"]),
        (&json!(1), &json!(true))
    );
    for method in ["GET", "POST"] {
        let refused = site.ask(&format!("{method} {path}?now=true"), "").await;
        assert_eq!(refused.status, 400, "{method}");
    }
    site.stop().await;
}
