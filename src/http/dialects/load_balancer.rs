//! Dialect B, "load balancer": `POST /set/<key>`, `GET /get/<key>`, and the servers at `GET /`.
//!
//! - `POST /set/<key>` with any JSON value: 200
//!   `response from server:"stored key:value is {'hello': 'world'}"`.
//! - `GET /get/<key>`: 200 `response from server:"retrived key value is {'hello': 'world'}"` (spelt
//!   so); of a missing key 200 `response from server:"No such key on any server"`.
//! - A key of other than letters and digits, of any script; a value `""`, `[]` or `{}`: 422.
//! - No body, or no JSON: 400. `GET /set/<key>`: 403.
//! - Nobody can do it: 503 `No server is available`.

use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::request::Parts;
use http::{Method, StatusCode, header};
use serde_json::value::RawValue;

use super::error::{DialectError, method_not_allowed, respond_as_load_balancer};
use super::request::{options, read_body};
use super::response::{HTML, TEXT, answer};
use super::value::{DisplayValue, JsonText};
use super::{json_list, python};
use crate::api::store::{Consistency, Failure, GetOutcome, Options, WriteFailure};
use crate::http::app::{App, SharedApp};
use crate::http::dialect::Dialect;
use crate::http::native::{STALENESS, staleness, unescape};
use crate::http::{body, health};
use crate::sm::kv::{Action, Condition, Media, Operation};
use crate::types::{GroupId, KEY_BYTES_MAX};

const SET: &str = "/set/";
const GET: &str = "/get/";

/// Timeouts of a linearizable read where a copy may answer instead, and of the read of that copy:
/// together less than the 2 s that are promised.
const QUORUM_TIMEOUT: Duration = Duration::from_millis(1500);
const STALE_READ_TIMEOUT: Duration = Duration::from_millis(400);

/// Timeout after another request has timed out. Two healthy nodes answer in a few milliseconds.
const QUORUM_TIMEOUT_AFTER_TIMEOUT: Duration = Duration::from_millis(250);

/// Returns true if `path` is one of this dialect's with a key: one segment that is not empty.
pub fn owns(path: &str) -> bool {
    let key = path.strip_prefix(SET).or_else(|| path.strip_prefix(GET));
    key.is_some_and(|key| !key.is_empty() && !key.contains('/'))
}

pub async fn by_key(app: &App, request: Request) -> Response {
    let mut timer = app.start_timer(Dialect::LoadBalancer, &request);
    let (parts, body) = request.into_parts();
    timer.key(parts.uri.path().as_bytes());
    let is_set = parts.uri.path().starts_with(SET);
    let answer = match (parts.method.clone(), is_set) {
        (Method::POST, true) => set(app, &parts, body).await,
        (Method::GET | Method::HEAD, false) => get(app, &parts, body).await,
        (method, _) => {
            body::discard(&parts, body);
            match (method, is_set) {
                (Method::GET | Method::HEAD, true) => Err(DialectError::new(
                    StatusCode::FORBIDDEN,
                    "Use POST to set a key",
                )),
                (_, true) => Ok(method_not_allowed(&parts, "POST")),
                (_, false) => Ok(method_not_allowed(&parts, "GET,HEAD")),
            }
        }
    };
    timer.finish(answer.unwrap_or_else(|refusal| respond_as_load_balancer(&refusal, &parts.method)))
}

async fn set(app: &App, parts: &Parts, body: Body) -> Result<Response, DialectError> {
    let key = match key(parts.uri.path()) {
        Ok(key) => key,
        Err(refusal) => {
            body::discard(parts, body);
            return Err(refusal);
        }
    };

    let body = read_body(app, parts, body).await?;
    let given = body.bytes.clone();
    let read = json_list::apart(given.len(), move || {
        parse(&given).map(|(media, value)| (printed(&media, &value), media, value))
    })
    .await;
    let (printed, media, value) = read?;
    if value.len() > app.limits.value_bytes_max {
        let error = format!("a value is at most {} bytes", app.limits.value_bytes_max);
        return Err(DialectError::new(StatusCode::PAYLOAD_TOO_LARGE, error));
    }

    write(
        app,
        Operation {
            key,
            condition: Condition::None,
            action: Action::Put { media, value },
        },
    )
    .await?;
    Ok(from_server(&format!("stored key:value is {printed}")))
}

/// Writes a key. While its quorum is silent it is asked by a read first: that fails soon, and
/// leaves nothing behind that could still happen later.
async fn write(app: &App, operation: Operation) -> Result<(), DialectError> {
    let pair = shard_on_two_nodes(app, &operation.key).await?;
    if let Some(shard) = pair.filter(|shard| app.quorum_timeouts.timed_out_recently(*shard)) {
        ask_quorum(app, shard, operation.key.clone()).await?;
    }
    match app
        .store
        .write(vec![operation], None, options())
        .await
        .pop()
    {
        Some(Ok(_)) => Ok(()),
        Some(Err(WriteFailure::Failed(failure))) => {
            if let Some(shard) = pair.filter(|_| is_no_answer(&failure)) {
                app.quorum_timeouts.record_timeout(shard);
            }
            Err(failure.into())
        }
        Some(Err(WriteFailure::Rejected(_))) | None => Err(DialectError::unanswered()),
    }
}

/// Returns the value that a body gives, as it is stored.
fn parse(body: &Bytes) -> Result<(Media, Bytes), DialectError> {
    let bad =
        |error: serde_json::Error| DialectError::bad_request(format!("Bad json format: {error}"));
    let json = serde_json::from_slice::<&RawValue>(body)
        .map_err(bad)?
        .get();
    let value = match json.as_bytes() {
        [b'"', ..] => {
            let text: JsonText<'_> = serde_json::from_str(json).map_err(bad)?;
            (Media::Text, text.into_bytes(body))
        }
        // JSON is kept as it was sent: numbers and the order of members would not survive parsing.
        _ => (Media::Json, body.slice_ref(json.as_bytes())),
    };
    let is_empty = match json.as_bytes() {
        [b'[' | b'{', inner @ .., b']' | b'}'] => inner.trim_ascii().is_empty(),
        _ => value.1.is_empty(),
    };
    if is_empty {
        return Err(DialectError::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "The value is empty",
        ));
    }
    Ok(value)
}

async fn get(app: &App, parts: &Parts, body: Body) -> Result<Response, DialectError> {
    body::discard(parts, body);
    let GetOutcome {
        record,
        staleness: age,
    } = find(app, key(parts.uri.path())?).await?;
    let mut response = match record {
        Some(record) => {
            let bytes = record.value.len();
            let printed =
                json_list::apart(bytes, move || printed(&record.media, &record.value)).await;
            from_server(&format!("retrived key value is {printed}"))
        }
        None => from_server("No such key on any server"),
    };
    if age.is_some() {
        response.headers_mut().insert(STALENESS, staleness(age));
    }
    Ok(response)
}

/// Returns the value of a key. Two nodes are no quorum when one of them is down; then the other
/// answers from its own copy, and says how old that is.
async fn find(app: &App, key: Bytes) -> Result<GetOutcome, Failure> {
    // A stale read helps only where one of two copies is left.
    let Some(shard) = shard_on_two_nodes(app, &key).await? else {
        return app.store.get(key, options()).await;
    };
    match ask_quorum(app, shard, key.clone()).await {
        Err(failure) if is_no_answer(&failure) => {
            let stale = Options {
                consistency: Consistency::Stale,
                timeout: STALE_READ_TIMEOUT,
                ..options()
            };
            app.store.get(key, stale).await.map_err(|_| failure)
        }
        other => other,
    }
}

/// Returns the shard of a key, if it lives on two nodes.
async fn shard_on_two_nodes(app: &App, key: &[u8]) -> Result<Option<GroupId>, Failure> {
    let map = app.store.map(options()).await?;
    let shard = map.owner_of(key);
    let copies = map.shard(shard).map_or(0, |shard| shard.replicas.len());
    Ok((map.nodes().count() == 2 || copies == 2).then_some(shard))
}

/// Reads a key from a quorum of two nodes, with a shorter timeout if another request has just timed
/// out.
async fn ask_quorum(app: &App, shard: GroupId, key: Bytes) -> Result<GetOutcome, Failure> {
    let timeout = if app.quorum_timeouts.timed_out_recently(shard) {
        QUORUM_TIMEOUT_AFTER_TIMEOUT
    } else {
        QUORUM_TIMEOUT
    };
    let found = app
        .store
        .get(
            key,
            Options {
                timeout,
                ..options()
            },
        )
        .await;
    match &found {
        // The next request gets the full time again.
        Ok(_) => app.quorum_timeouts.record_answer(shard),
        Err(failure) if is_no_answer(failure) => app.quorum_timeouts.record_timeout(shard),
        Err(_) => {}
    }
    found
}

/// Returns true if the failure means that no quorum answered.
fn is_no_answer(failure: &Failure) -> bool {
    match failure {
        Failure::Unavailable { .. } | Failure::Unknown { .. } | Failure::Elsewhere { .. } => true,
        Failure::Overloaded { .. } | Failure::Invalid { .. } | Failure::TooLarge { .. } => false,
    }
}

/// Returns the key that a path ends in.
fn key(path: &str) -> Result<Bytes, DialectError> {
    let escaped = path
        .strip_prefix(SET)
        .or_else(|| path.strip_prefix(GET))
        .unwrap_or_default();
    let key = unescape(escaped.as_bytes(), false)
        .ok()
        .and_then(|key| String::from_utf8(key).ok());
    match key {
        Some(key) if python::is_alphanumeric(&key) && key.len() <= KEY_BYTES_MAX => {
            Ok(Bytes::from(key))
        }
        Some(_) | None => {
            let error =
                format!("A key is letters and digits, at most {KEY_BYTES_MAX} bytes of them");
            Err(DialectError::new(StatusCode::UNPROCESSABLE_ENTITY, error))
        }
    }
}

/// Returns a stored value as Python would print it.
fn printed(media: &Media, value: &[u8]) -> String {
    match DisplayValue::new(media, value) {
        DisplayValue::Text(text) => text.to_owned(),
        DisplayValue::Json(json) => python::print(json).unwrap_or_else(|| json.to_owned()),
        DisplayValue::Bytes(bytes) => STANDARD.encode(bytes),
    }
}

fn from_server(text: &str) -> Response {
    answer(
        StatusCode::OK,
        HTML,
        format!("response from server:\"{text}\""),
    )
}

/// Handles `GET /`: lists the servers, or shows a browser a page.
pub async fn front_page(State(app): State<SharedApp>, request: Request) -> Response {
    let timer = app.start_timer(Dialect::LoadBalancer, &request);
    let accepted = request.headers().get_all(header::ACCEPT);
    let is_browser = accepted.iter().any(|accept| {
        accept
            .to_str()
            .is_ok_and(|accept| accept.contains("text/html"))
    });
    if is_browser {
        return timer.finish(answer(StatusCode::OK, TEXT, health::FRONT_PAGE));
    }
    let page = match app.store.map(options()).await {
        Ok(map) => {
            let servers = python::print_list(map.nodes().map(|(_, node)| node.public.as_str()));
            answer(StatusCode::OK, TEXT, format!("servers are {servers}"))
        }
        Err(failure) => respond_as_load_balancer(&failure.into(), request.method()),
    };
    timer.finish(page)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::store::Routing;
    use crate::http::Limits;
    use crate::http::testing::Site;

    fn refused(error: &str, method: &str) -> String {
        format!(r#"{{"error":"{error}","message":"Error in {method}"}}"#)
    }

    #[tokio::test]
    async fn the_contract_is_kept_to_the_letter() {
        let site = Site::start().await;
        let stored = |value: &str| format!(r#"response from server:"stored key:value is {value}""#);
        let retrieved =
            |value: &str| format!(r#"response from server:"retrived key value is {value}""#);
        for (value, printed) in [
            (r#"{"hello": "world"}"#, "{'hello': 'world'}"),
            (
                r#" {"a":[1,2.50,null,true],"b":{"a":1,"a":2}} "#,
                "{'a': [1, 2.5, None, True], 'b': {'a': 2}}",
            ),
            (r#""plain""#, "plain"),
            (r#"" ""#, " "),
            (r#""it's \u00fc""#, "it's ü"),
            ("0", "0"),
            ("null", "None"),
            ("false", "False"),
            ("[[]]", "[[]]"),
            ("1e999", "inf"),
            (
                "123456789012345678901234567890",
                "123456789012345678901234567890",
            ),
        ] {
            let set = site.ask("POST /set/key1", value).await;
            assert_eq!((set.status, set.text()), (200, stored(printed)), "{value}");
            assert_eq!(set.header("content-type"), "text/html; charset=utf-8");
            let got = site.get("/get/key1").await;
            assert_eq!(
                (got.status, got.text()),
                (200, retrieved(printed)),
                "{value}"
            );
        }
        let missing = site.get("/get/key2").await;
        assert_eq!(
            (missing.status, missing.text().as_str()),
            (200, r#"response from server:"No such key on any server""#)
        );
        for (head, body, status, answer) in [
            (
                "POST /set/key1",
                r#""""#,
                422,
                refused("The value is empty", "POST"),
            ),
            (
                "POST /set/key1",
                "[ ]",
                422,
                refused("The value is empty", "POST"),
            ),
            (
                "POST /set/key1",
                " {}\n",
                422,
                refused("The value is empty", "POST"),
            ),
            (
                "GET /set/key1",
                "",
                403,
                refused("Use POST to set a key", "GET"),
            ),
            (
                "PUT /set/key1",
                "1",
                405,
                refused("Method not allowed", "PUT"),
            ),
            (
                "DELETE /get/key1",
                "",
                405,
                refused("Method not allowed", "DELETE"),
            ),
            (
                "POST /get/key1",
                "1",
                405,
                refused("Method not allowed", "POST"),
            ),
            (
                "POST /set/a-b",
                "1",
                422,
                refused(
                    "A key is letters and digits, at most 4096 bytes of them",
                    "POST",
                ),
            ),
            (
                "GET /get/a%20b",
                "",
                422,
                refused(
                    "A key is letters and digits, at most 4096 bytes of them",
                    "GET",
                ),
            ),
        ] {
            let reply = site.ask(head, body).await;
            assert_eq!(
                (reply.status, reply.text()),
                (status, answer),
                "{head} {body}"
            );
        }
        assert_eq!(
            site.get("/get/key1").await.text(),
            retrieved("123456789012345678901234567890"),
            "refusals change nothing"
        );
        site.stop().await;
    }

    #[tokio::test]
    async fn hostile_input_is_refused() {
        let site = Site::with(Limits {
            value_bytes_max: 100,
            body_bytes_max: 200,
            ..Limits::default()
        })
        .await;
        for body in [
            "",
            " ",
            "{",
            "nope",
            "NaN",
            "1 2",
            "'a'",
            r#""\ud800""#,
            "[1,]",
            "\u{feff}1",
        ] {
            assert_eq!(site.ask("POST /set/a", body).await.status, 400, "{body}");
        }
        assert_eq!(site.ask("POST /set/a", b"\"\xff\"").await.status, 400);
        assert_eq!(
            site.ask("POST /set/a", format!("[{}]", "1".repeat(100)))
                .await
                .status,
            413
        );
        assert_eq!(site.ask("POST /set/a", "1".repeat(201)).await.status, 413);
        let long = "k".repeat(5000);
        for key in [
            "%",
            "%zz",
            "%ff",
            "%00",
            "..",
            "a%2Fb",
            "a+b",
            long.as_str(),
        ] {
            assert_eq!(
                site.ask(&format!("POST /set/{key}"), "1").await.status,
                422,
                "{key}"
            );
            assert_eq!(site.get(&format!("/get/{key}")).await.status, 422, "{key}");
        }
        for path in ["/set/", "/get/", "/set/a/b", "/get/a/"] {
            assert_eq!(
                site.get(path).await.verdict(),
                (404, "unknown_route".into()),
                "{path}"
            );
        }
        assert_eq!(site.store.requests(), 0);
        assert_eq!(site.ask("POST /set/gr%C3%BC%C3%9Fe", "1").await.status, 200);
        assert!(site.store.record("grüße".as_bytes()).is_some());
        site.stop().await;
    }

    #[tokio::test]
    async fn what_others_stored_is_printed_too() {
        let site = Site::start().await;
        let put = async |kind: &str, value: &[u8]| {
            site.ask(&format!("PUT /v1/kv/a\ncontent-type: {kind}"), value)
                .await
        };
        for (kind, value, printed) in [
            ("text/plain", &b"it's"[..], "it's"),
            ("application/json", br#"{"a": null}"#, "{'a': None}"),
            ("application/json", br#""a""#, "a"),
            ("application/octet-stream", b"\xff\x00", "/wA="),
            ("image/png", b"text", "text"),
        ] {
            put(kind, value).await;
            let expected = format!(r#"response from server:"retrived key value is {printed}""#);
            assert_eq!(
                site.get("/get/a").await.text(),
                expected,
                "{kind} {value:?}"
            );
        }
        site.ask("POST /set/a", r#""a\"b""#).await;
        assert_eq!(
            site.store
                .record(b"a")
                .map(|record| (record.media, record.value)),
            Some((Media::Text, "a\"b".into()))
        );
        site.ask("POST /set/a", " [1, 2] ").await;
        assert_eq!(
            site.store
                .record(b"a")
                .map(|record| (record.media, record.value)),
            Some((Media::Json, "[1, 2]".into()))
        );
        site.stop().await;
    }

    #[tokio::test]
    async fn without_a_quorum_it_says_so_and_one_of_two_nodes_answers_from_its_copy() {
        let site = Site::start().await;
        site.store.set_nodes(&["a:1", "b:2", "c:3"]);
        site.ask("POST /set/key1", "1").await;
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
        ] {
            site.store.fail(1, failure);
            for reply in [
                site.ask("POST /set/key1", "2").await,
                site.get("/get/key1").await,
            ] {
                assert_eq!(
                    (reply.status, reply.text().as_str()),
                    (503, "No server is available")
                );
            }
        }
        assert!(site.store.last_options().timeout < Duration::from_secs(5));
        site.store.set_nodes(&["a:1", "b:2"]);
        site.store.fail(
            1,
            Failure::Unavailable {
                reason: "no quorum".into(),
                retry_after_ms: 1000,
            },
        );
        site.store.serve_stale();
        let stale = site.get("/get/key1").await;
        assert_eq!(
            (stale.status, stale.header("quorate-staleness")),
            (200, "12")
        );
        assert_eq!(
            stale.text(),
            r#"response from server:"retrived key value is 1""#
        );
        assert_eq!(site.store.last_options().routing, Routing::Proxy);
        assert_eq!(site.ask("POST /set/key1", "2").await.status, 503);
        site.stop().await;
    }

    #[tokio::test]
    async fn one_client_waits_for_a_silent_quorum_and_those_after_it_hardly() {
        let site = Site::start().await;
        site.store.set_nodes(&["a:1", "b:2"]);
        site.ask("POST /set/key1", "1").await;
        site.store.serve_stale();
        // Lists what a request asks the store, in turn.
        let asked = async |head: &str, body: &str| {
            let before = site.store.requests();
            let reply = site.ask(head, body).await;
            let options = site.store.asked().split_off(before);
            (
                reply.status,
                options
                    .iter()
                    .map(|options| (options.consistency, options.timeout))
                    .collect::<Vec<_>>(),
            )
        };
        let quorum = |patience: Duration| (Consistency::Linearizable, patience);
        let copy = (Consistency::Stale, STALE_READ_TIMEOUT);
        let (patient, impatient) = (quorum(QUORUM_TIMEOUT), quorum(QUORUM_TIMEOUT_AFTER_TIMEOUT));
        let writes = quorum(options().timeout);
        assert_eq!(asked("GET /get/key1", "").await, (200, vec![patient]));
        for failure in [
            Failure::Unavailable {
                reason: "no quorum".into(),
                retry_after_ms: 1000,
            },
            Failure::Unknown {
                reason: "lost".into(),
            },
        ] {
            site.store.fail(1, failure);
            assert_eq!(asked("GET /get/key1", "").await, (200, vec![patient, copy]));
            assert_eq!(
                asked("GET /get/key1", "").await,
                (200, vec![impatient, copy])
            );
            assert_eq!(
                asked("POST /set/key1", "2").await,
                (503, vec![impatient]),
                "it was not even tried"
            );
            site.store.heal();
            assert_eq!(
                asked("POST /set/key1", "3").await,
                (200, vec![impatient, writes])
            );
            assert_eq!(
                asked("GET /get/key1", "").await,
                (200, vec![patient]),
                "it is well again"
            );
        }
        site.store.fail(
            1,
            Failure::Unavailable {
                reason: "no quorum".into(),
                retry_after_ms: 1000,
            },
        );
        assert_eq!(asked("POST /set/key1", "4").await, (503, vec![writes]));
        assert_eq!(
            asked("GET /get/key1", "").await,
            (200, vec![impatient, copy]),
            "a write has waited too"
        );
        site.store.fail(
            1,
            Failure::Overloaded {
                limit: "all".into(),
                retry_after_ms: 1000,
            },
        );
        assert_eq!(
            asked("GET /get/key1", "").await,
            (503, vec![impatient]),
            "overload is no silence"
        );
        site.store.set_nodes(&["a:1", "b:2", "c:3"]);
        site.store.fail(
            1,
            Failure::Unavailable {
                reason: "no quorum".into(),
                retry_after_ms: 1000,
            },
        );
        assert_eq!(
            asked("GET /get/key1", "").await,
            (503, vec![writes]),
            "three nodes have no copy to fall back on"
        );
        site.stop().await;
    }

    #[tokio::test]
    async fn the_front_page_lists_the_servers_except_for_browsers() {
        let site = Site::start().await;
        site.store.set_nodes(&["a:1", "b:2"]);
        for accept in ["", "\naccept: */*"] {
            let page = site.ask(&format!("GET /{accept}"), "").await;
            assert_eq!(
                (page.status, page.text().as_str()),
                (200, "servers are ['a:1', 'b:2']")
            );
        }
        let page = site
            .ask("GET /\naccept: text/html,application/xhtml+xml;q=0.9", "")
            .await;
        assert!(page.text().starts_with("Quorate "));
        assert_eq!(
            site.ask("POST /", "").await.verdict(),
            (405, "method_not_allowed".into())
        );
        site.stop().await;
    }
}
