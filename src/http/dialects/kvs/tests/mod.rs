//! The contracts of C, C4 and D, status and body to the letter, over a store in memory. The fake
//! store's shards are at home in turn on its nodes, sorted by address.

mod shards;
mod view_change;

use crate::api::store::Failure;
use crate::http::testing::{Reply, Site};
use crate::http::{Limits, NotReady};
use crate::sm::cluster::view::PlacementSpec;
use crate::sm::kv::Media;
use crate::types::GroupId;

/// Some key of the store's shard with this number.
fn key_of(site: &Site, shard: u64) -> String {
    let owner = |key: &String| site.store.owner(key.as_bytes());
    (0..)
        .map(|n| format!("key{n}"))
        .find(|key| owner(key) == GroupId(shard))
        .expect("some key")
}

/// The nodes a:1, b:2 and c:3 with a shard at home on each; the server is a:1.
async fn spread() -> Site {
    let site = Site::start().await;
    site.store.set_here(Some(1));
    site
}

/// The nodes a:1 to d:4, in two shards of two; the server is a:1.
async fn exclusive() -> Site {
    let site = Site::start().await;
    site.store.set_nodes(&["a:1", "b:2", "c:3", "d:4"]);
    site.store
        .set_asked(PlacementSpec::from_flags(Some(2), None));
    site.store.set_here(Some(1));
    site
}

fn told(reply: &Reply) -> (u16, String) {
    assert_eq!(reply.header("content-type"), "application/json");
    (reply.status, reply.text())
}

/// Request line, body, status, answer.
type Row<'a> = (&'a str, &'a str, u16, &'a str);

async fn check(site: &Site, rows: &[Row<'_>]) {
    for (head, body, status, answer) in rows {
        assert_eq!(
            told(&site.ask(head, body).await),
            (*status, (*answer).to_owned()),
            "{head} {body}"
        );
    }
}

const MISSING: &str =
    r#"{"doesExist":false,"error":"Key does not exist","message":"Error in GET"}"#;
const TOO_LONG: &str = r#"{"error":"Key is too long","message":"Error in PUT"}"#;
const BAD_JSON: &str = r#"{"error":"Bad json format","message":"Error in PUT"}"#;
const NO_VALUE: &str = r#"{"error":"Value is missing","message":"Error in PUT"}"#;
const ADDED: &str = r#"{"message":"Added successfully","replaced":false}"#;
const UPDATED: &str = r#"{"message":"Updated successfully","replaced":true}"#;

#[tokio::test]
async fn keys_are_put_got_and_deleted() {
    let site = spread().await;
    let key = key_of(&site, 1);
    let at = |method: &str| format!("{method} /kvs/keys/{key}");
    let (put, get, delete) = (at("PUT"), at("GET"), at("DELETE"));
    check(
        &site,
        &[
            (&get, "", 404, MISSING),
            (
                &delete,
                "",
                404,
                r#"{"doesExist":false,"error":"Key does not exist","message":"Error in DELETE"}"#,
            ),
            (&put, r#"{"value":"v"}"#, 201, ADDED),
            (&put, r#"{"value":"v"}"#, 200, UPDATED),
            (&put, "", 400, BAD_JSON),
            (&put, "{", 400, BAD_JSON),
            (&put, r#"{"value":}"#, 400, BAD_JSON),
            (&put, r#"{"value":NaN}"#, 400, BAD_JSON),
            (&put, r#"{"value":1} x"#, 400, BAD_JSON),
            (&put, r#"{"value":1,}"#, 400, BAD_JSON),
            (&put, "{}", 400, NO_VALUE),
            (&put, r#"{"Value":1}"#, 400, NO_VALUE),
            (&put, r#"{"inner":{"value":1}}"#, 400, NO_VALUE),
            (&put, r#"["value"]"#, 400, NO_VALUE),
            (&put, r#""value""#, 400, NO_VALUE),
            (&put, "null", 400, NO_VALUE),
            (
                &get,
                "",
                200,
                r#"{"doesExist":true,"message":"Retrieved successfully","value":"v"}"#,
            ),
            (
                &get,
                r#"{"not":"asked"}"#,
                200,
                r#"{"doesExist":true,"message":"Retrieved successfully","value":"v"}"#,
            ),
            (
                &get,
                "no json",
                200,
                r#"{"doesExist":true,"message":"Retrieved successfully","value":"v"}"#,
            ),
            (
                &delete,
                "",
                200,
                r#"{"doesExist":true,"message":"Deleted successfully"}"#,
            ),
            (&get, "", 404, MISSING),
        ],
    )
    .await;
    site.stop().await;
}

#[tokio::test]
async fn keys_have_at_most_fifty_characters() {
    let site = Site::start().await;
    let escaped = |text: &str| {
        text.bytes()
            .map(|byte| format!("%{byte:02X}"))
            .collect::<String>()
    };
    let rows = [
        ("k".repeat(50), 201, ADDED),
        ("k".repeat(51), 400, TOO_LONG),
        (escaped(&"ü".repeat(50)), 201, ADDED),
        (escaped(&"ü".repeat(51)), 400, TOO_LONG),
        ("%FE".repeat(50), 201, ADDED),
        ("%FE".repeat(51), 400, TOO_LONG),
        ("k".repeat(9000), 400, TOO_LONG),
    ];
    for (key, status, answer) in rows {
        let reply = site
            .put(&format!("/kvs/keys/{key}"), r#"{"value":1}"#)
            .await;
        let address = r#","address":"#;
        let text = reply.text();
        assert_eq!(
            (reply.status, text.split(address).next()),
            (status, answer.strip_suffix('}')),
            "{key}"
        );
        let reply = site.put(&format!("/kvs/keys/{key}"), "{}").await;
        assert!(
            reply.text().starts_with(NO_VALUE.trim_end_matches('}')),
            "the value is looked at first: {key}"
        );
        let reply = site.put(&format!("/kvs/keys/{key}"), "").await;
        assert!(
            reply.text().starts_with(BAD_JSON.trim_end_matches('}')),
            "{key}"
        );
    }
    // Others may have stored longer ones.
    let long = "k".repeat(1000);
    assert_eq!(site.put(&format!("/v1/kv/{long}"), "v").await.status, 201);
    assert_eq!(site.get(&format!("/kvs/keys/{long}")).await.status, 200);
    assert_eq!(
        site.ask(&format!("DELETE /kvs/keys/{long}"), "")
            .await
            .status,
        200
    );
    for key in [String::new(), "k".repeat(5000)] {
        for method in ["GET", "DELETE"] {
            let reply = site.ask(&format!("{method} /kvs/keys/{key}"), "").await;
            let expected = format!(
                r#"{{"doesExist":false,"error":"Key does not exist","message":"Error in {method}""#
            );
            assert!(
                reply.status == 404 && reply.text().starts_with(&expected),
                "{reply:?}"
            );
        }
    }
    assert_eq!(site.put("/kvs/keys/", r#"{"value":1}"#).await.status, 400);
    site.stop().await;
}

#[tokio::test]
async fn keys_are_decoded_and_any_other_path_is_one() {
    let site = Site::start().await;
    for (path, key) in [
        ("/kvs/keys/a%2Fb", &b"a/b"[..]),
        ("/kvs/keys/a/b", b"a/b"),
        ("/kvs/a/b", b"a/b"),
        ("/kvs/keys//", b"/"),
        ("/kvs/keys/100%25", b"100%"),
        ("/kvs/keys/50%", b"50%"),
        ("/kvs/keys/%zz", b"%zz"),
        ("/kvs/keys/a%20b+c", b"a b+c"),
        ("/kvs/keys/%00%FF", b"\x00\xff"),
        ("/kvs/keys/gr%C3%BC%C3%9Fe", "grüße".as_bytes()),
        ("/kvs/keys/../x", b"../x"),
        ("/kvs/keys/key-count", b"key-count"),
        ("/kvs/key%2Dcount", b"key-count"),
        ("/kvs/keys", b"keys"),
        ("/kvs/key-counts", b"key-counts"),
        ("/kvs/shards2", b"shards2"),
        ("/kvs/old", b"old"),
        ("/kvs/old?a=b", b"old"),
    ] {
        let put = site.put(path, format!(r#"{{"value":"{path}"}}"#)).await;
        assert!(put.status == 201 || put.status == 200, "{path}: {put:?}");
        assert_eq!(site.store.record(key).expect(path).value, path);
        assert_eq!(site.get(path).await.json()["value"], path);
    }
    site.stop().await;
}

#[tokio::test]
async fn a_value_comes_back_as_it_was_given() {
    let site = spread().await;
    let key = key_of(&site, 1);
    let path = format!("/kvs/keys/{key}");
    let deep = format!("{}{}", "[".repeat(5000), "]".repeat(5000));
    for value in [
        "null",
        "true",
        "0",
        "-0.0",
        "1e2",
        "1.50",
        "123456789012345678901234567890.123456789012345678901234567890",
        r#""""#,
        r#""v""#,
        r#""ü\n\"""#,
        r#"{"b":1,"a":{"z":[1, 2 ,3]},"b":2}"#,
        "[]",
        "{}",
        "[\n1\n]",
        r#""\ud800""#,
        r#"{"\ud800":"\ud800"}"#,
        &deep,
    ] {
        let put = site
            .put(
                &path,
                format!(r#" {{ "x": 1, "value" : {value} , "y": null }} "#),
            )
            .await;
        assert!(put.status == 201 || put.status == 200, "{value}: {put:?}");
        let got = told(&site.get(&path).await);
        let expected =
            format!(r#"{{"doesExist":true,"message":"Retrieved successfully","value":{value}}}"#);
        assert_eq!(got, (200, expected), "{value}");
    }
    site.put(&path, r#"{"value":1,"value":"l\u0061st"}"#).await;
    let record = site.store.record(key.as_bytes()).expect("stored");
    assert_eq!(
        (record.media, record.value.as_ref()),
        (Media::Text, &b"last"[..])
    );
    site.put(&path, r#"{"value": {"a": 1} }"#).await;
    let record = site.store.record(key.as_bytes()).expect("stored");
    assert_eq!(
        (record.media, record.value.as_ref()),
        (Media::Json, &br#"{"a": 1}"#[..])
    );
    site.stop().await;
}

#[tokio::test]
async fn what_others_stored_is_shown_as_json() {
    let site = spread().await;
    let key = key_of(&site, 1);
    for (kind, value, shown) in [
        ("text/plain", &b"it's \"a\""[..], r#""it's \"a\"""#),
        ("application/json", b"{\"a\": null}\n", r#"{"a": null}"#),
        ("Application/JSON; charset=utf-8", b"[1 ]", "[1 ]"),
        ("application/json", b"nonsense", r#""nonsense""#),
        ("application/json;", b"[", r#""[""#),
        ("application/octet-stream", b"text", r#""text""#),
        ("application/octet-stream", b"\xff\x00", r#""/wA=""#),
        ("image/png", b"\x89PNG", r#""iVBORw==""#),
    ] {
        site.ask(&format!("PUT /v1/kv/{key}\ncontent-type: {kind}"), value)
            .await;
        let expected =
            format!(r#"{{"doesExist":true,"message":"Retrieved successfully","value":{shown}}}"#);
        assert_eq!(
            told(&site.get(&format!("/kvs/keys/{key}")).await),
            (200, expected),
            "{kind}"
        );
    }
    site.stop().await;
}

#[tokio::test]
async fn the_address_is_told_unless_the_node_asked_is_the_home() {
    let site = spread().await;
    for (here, shard, address) in [
        (Some(1), 1, ""),
        (Some(1), 2, r#","address":"b:2""#),
        (Some(2), 1, r#","address":"a:1""#),
        (Some(2), 2, ""),
        (Some(3), 3, ""),
        // A gateway is nobody's home.
        (None, 1, r#","address":"a:1""#),
    ] {
        site.store.set_here(here);
        let key = key_of(&site, shard);
        let (put, get, delete) = (
            format!("PUT /kvs/keys/{key}"),
            format!("GET /kvs/{key}"),
            format!("DELETE /kvs/keys/{key}"),
        );
        let with = |answer: &str| {
            format!(
                "{}{address}}}",
                answer.strip_suffix('}').expect("an object")
            )
        };
        let retrieved = r#"{"doesExist":true,"message":"Retrieved successfully","value":1}"#;
        check(
            &site,
            &[
                (&put, r#"{"value":1}"#, 201, &with(ADDED)),
                (&put, r#"{"value":1}"#, 200, &with(UPDATED)),
                (&put, "{}", 400, &with(NO_VALUE)),
                (&put, "", 400, &with(BAD_JSON)),
                (&get, "", 200, &with(retrieved)),
                (
                    &delete,
                    "",
                    200,
                    &with(r#"{"doesExist":true,"message":"Deleted successfully"}"#),
                ),
                (&get, "", 404, &with(MISSING)),
            ],
        )
        .await;
    }
    site.stop().await;
}

#[tokio::test]
async fn in_a_replicated_store_the_address_is_told_outside_of_the_shard() {
    let site = exclusive().await;
    for (here, shard, tells) in [
        (1, 1, false),
        (2, 1, false),
        (3, 1, true),
        (4, 1, true),
        (1, 2, true),
        (2, 2, true),
        (3, 2, false),
        (4, 2, false),
    ] {
        site.store.set_here(Some(here));
        let reply = site
            .get(&format!("/kvs/keys/{}", key_of(&site, shard)))
            .await;
        let address = reply.json()["address"].as_str().map(str::to_owned);
        assert_eq!(
            address.is_some(),
            tells,
            "node {here}, shard {shard}: {reply:?}"
        );
        let of_shard = ["a:1", "b:2", "c:3", "d:4"]
            .chunks(2)
            .nth(shard as usize - 1)
            .expect("two shards");
        assert!(address.is_none_or(|address| of_shard.contains(&address.as_str())));
    }
    site.stop().await;
}

async fn fill(site: &Site, keys: usize) {
    for n in 0..keys {
        assert_eq!(
            site.put(&format!("/kvs/keys/fill-{n}"), r#"{"value":1}"#)
                .await
                .status,
            201
        );
    }
}

#[tokio::test]
async fn without_a_quorum_it_says_so() {
    let site = spread().await;
    let (put, get, delete) = (
        "PUT /kvs/keys/key",
        "GET /kvs/keys/key",
        "DELETE /kvs/keys/key",
    );
    for failure in [
        Failure::Unavailable {
            reason: "no quorum".into(),
            retry_after_ms: 1000,
        },
        Failure::Unknown {
            reason: "lost".into(),
        },
        Failure::Overloaded {
            limit: "all".into(),
            retry_after_ms: 1000,
        },
        Failure::Elsewhere {
            shard: GroupId(1),
            address: "b:2".parse().expect("an address"),
        },
    ] {
        site.store.fail(1, failure);
        let unable = |method: &str| {
            format!(r#"{{"error":"Unable to satisfy request","message":"Error in {method}"}}"#)
        };
        check(
            &site,
            &[
                (put, r#"{"value":1}"#, 503, &unable("PUT")),
                (get, "", 503, &unable("GET")),
                (delete, "", 503, &unable("DELETE")),
                ("GET /kvs/key-count", "", 503, &unable("GET")),
                ("GET /kvs/shards/1", "", 503, &unable("GET")),
            ],
        )
        .await;
    }
    assert!(site.store.last_options().timeout < std::time::Duration::from_secs(5));
    let reason =
        "spare: waiting for a view change of the cluster to name this node; members: b:2, c:3";
    *site.readiness.0.lock() = Some(NotReady {
        code: "spare",
        reason: reason.into(),
    });
    let spare = |method: &str| {
        format!(
            r#"{{"error":"Unable to satisfy request: {reason}","message":"Error in {method}"}}"#
        )
    };
    check(
        &site,
        &[
            (put, r#"{"value":1}"#, 503, &spare("PUT")),
            (get, "", 503, &spare("GET")),
            ("GET /kvs/key-count", "", 503, &spare("GET")),
        ],
    )
    .await;
    site.stop().await;
}

#[tokio::test]
async fn a_causal_context_is_returned_by_every_answer() {
    let site = spread().await;
    let key = key_of(&site, 1);
    let path = format!("/kvs/keys/{key}");
    let context = r#"{"b":1,"a":[1.0]}"#;
    let mut requests: Vec<(String, &str)> = vec![];
    for (method, path, more) in [
        ("PUT", path.as_str(), r#""value":1,"#),
        ("PUT", path.as_str(), ""),
        ("PUT", "/kvs/keys/", r#""value":1,"#),
        ("GET", path.as_str(), ""),
        ("DELETE", path.as_str(), ""),
        ("DELETE", path.as_str(), ""),
        ("POST", path.as_str(), ""),
        ("GET", "/kvs/key-count", ""),
        ("PUT", "/kvs/key-count", ""),
        ("GET", "/kvs/shards", ""),
        ("GET", "/kvs/shards/1", ""),
        ("GET", "/kvs/shards/9", ""),
        ("PUT", "/kvs/view-change", ""),
        ("PUT", "/kvs/view-change", r#""view":"a:1,b:2,c:3","#),
        ("PUT", "/kvs/view-change", r#""view":"silent:1","#),
        ("PUT", "/proxy/view-change", r#""view":"a:1,b:2,c:3","#),
    ] {
        requests.push((format!("{method} {path}"), more));
    }
    for (head, more) in &requests {
        for (given, returned) in [
            (context, context),
            ("{}", "{}"),
            ("null", "{}"),
            ("\"\"", "{}"),
            ("[1]", "{}"),
            (r#"{"\ud800":1}"#, r#"{"\ud800":1}"#),
        ] {
            let reply = site
                .ask(head, format!(r#"{{{more}"causal-context":{given}}}"#))
                .await;
            let end = format!(r#""causal-context":{returned}}}"#);
            assert!(reply.text().ends_with(&end), "{head}: {reply:?}");
        }
        let without = site
            .ask(head, format!("{{{}}}", more.trim_end_matches(',')))
            .await;
        assert!(
            !without.text().contains("causal-context"),
            "{head}: {without:?}"
        );
    }
    site.store.fail(
        1,
        Failure::Unknown {
            reason: "lost".into(),
        },
    );
    let reply = site
        .ask("GET /kvs/keys/a", r#"{"causal-context":{"a":1}}"#)
        .await;
    let text = concat!(
        r#"{"error":"Unable to satisfy request","message":"Error in GET","#,
        r#""causal-context":{"a":1}}"#
    );
    assert_eq!(told(&reply), (503, text.to_owned()));
    site.stop().await;
}

#[tokio::test]
async fn hostile_input_is_refused() {
    let site = Site::with(Limits {
        value_bytes_max: 100,
        body_bytes_max: 300,
        ..Limits::default()
    })
    .await;
    let refused =
        |text: &str, method: &str| format!(r#"{{"error":"{text}","message":"Error in {method}"}}"#);
    for (head, method) in [
        ("POST /kvs/keys/a", "POST"),
        ("PATCH /kvs/a", "PATCH"),
        ("POST /kvs/key-count", "POST"),
        ("DELETE /kvs/shards", "DELETE"),
        ("PUT /kvs/shards/1", "PUT"),
        ("GET /kvs/view-change", "GET"),
        ("POST /proxy/view-change", "POST"),
    ] {
        let reply = site.ask(head, "").await;
        assert_eq!(
            told(&reply),
            (405, refused("Method not allowed", method)),
            "{head}"
        );
        assert!(!reply.header("allow").is_empty());
    }
    for path in [
        "/kvs",
        "/proxy",
        "/proxy/",
        "/proxy/view-change/",
        "/KVS/keys/a",
        "/kvs2/keys/a",
    ] {
        assert_eq!(
            site.get(path).await.verdict(),
            (404, "unknown_route".into()),
            "{path}"
        );
    }
    let long = format!(r#"{{"value":"{}"}}"#, "v".repeat(101));
    assert_eq!(site.put("/kvs/keys/a", long).await.status, 413);
    for head in [
        "PUT /kvs/keys/a",
        "GET /kvs/keys/a",
        "PUT /kvs/view-change",
        "GET /kvs/shards",
    ] {
        let reply = site.ask(head, "x".repeat(301)).await;
        assert_eq!(
            (reply.status, reply.json()["message"].is_string()),
            (413, true),
            "{head}"
        );
    }
    for body in [
        &b"\xff"[..],
        b"{\"value\":\"\xff\"}",
        b"{\"\xff\":1,\"value\":1}",
        b"\xef\xbb\xbf{\"value\":1}",
        b"\0",
    ] {
        assert_eq!(
            site.ask("PUT /kvs/keys/a", body).await.status,
            400,
            "{body:?}"
        );
    }
    for body in [
        "[".repeat(300),
        format!("{}{}", "{\"value\":".repeat(30), "}".repeat(30)),
    ] {
        assert_eq!(site.ask("PUT /kvs/keys/a", body).await.status, 400);
    }
    assert_eq!(site.store.requests(), 0);
    let head = site.ask("HEAD /kvs/keys/a", "").await;
    assert_eq!((head.status, head.text().as_str()), (404, ""));
    site.stop().await;
}
