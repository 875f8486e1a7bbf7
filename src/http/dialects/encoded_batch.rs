//! Dialect A, "encoded batch": lists of keys and values that say how they are encoded,
//! `{"encoding":"string"|"binary","data":"..."}`.
//!
//! Requests, and what they are answered:
//! - `PUT /set` `[{"key":K,"value":V}, ...]`: 200 `[{"keys_added":10,"keys_failed":[]}]`; 206 with
//!   the keys of pairs that are not stored.
//! - `POST /fetch` `[K, ...]`: 200 `[{"key":K,"value":V}, ...]`; a missing one has the value
//!   `{"encoding":"","data":""}`.
//! - `GET /fetch`: 200, every pair in the store.
//! - `POST /query` `[K, ...]`: 200 `[{"key":K,"value":true}, ...]`.
//!
//! Rules:
//! - `string` data is the key or value of the other dialects, `binary` data is in [`bit_strings`].
//!   What others stored is shown as `string` where it is UTF-8, and else as `binary`, 8 characters
//!   to the byte; a key of theirs that is shown so is not the `binary` key of that name.
//! - A key in `keys_failed` stands as it was sent. Where there was no quorum, or an answer was
//!   lost, its pair may still be stored.
//! - A batch is written in many steps, and is not atomic. Every pair counts in `keys_added` that
//!   was stored, also if a later one of the same key took its place.
//! - A key that can't exist, because of its encoding or its length, is missing. An element that is
//!   no object is a 400.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use bytes::Bytes;
use futures::future::BoxFuture;
use http::StatusCode;
use serde_json::value::RawValue;

use super::batch_write::{self, Pair, PairEncoding};
use super::bit_strings;
use super::chunked_answer::{self, CHUNK_BYTES, FullScan, JsonChunks, KeyLookup, push_text};
use super::error::DialectError;
use super::json_list::{self, BudgetedVec, KeyValue, MemberNames, PairObject};
use super::request::read_body;
use super::response::{JSON, answer};
use super::value::{DisplayValue, JsonText};
use crate::api::store::Failure;
use crate::http::app::{App, SharedApp};
use crate::http::body::BodyBytes;
use crate::http::dialect::Dialect;
use crate::http::limits::Limits;
use crate::sm::kv::Record;
use crate::types::KEY_BYTES_MAX;

/// Stands for a key that was not sent and a value that does not exist.
const NO_VALUE: &str = r#"{"encoding":"","data":""}"#;

/// Elements of a list: one of 64 MiB has no more keys than this, but could have more of `{}`, each
/// of which makes a longer answer.
const ELEMENTS_MAX: usize = 2_200_000;

/// `{"encoding": ..., "data": ...}`
struct EncodedMembers;

impl MemberNames for EncodedMembers {
    const FIRST: &'static str = "encoding";
    const SECOND: &'static str = "data";
}

/// A key or value as it was sent.
enum EncodedText<'a> {
    String(JsonText<'a>),
    Bits(JsonText<'a>),
}

impl<'a> EncodedText<'a> {
    /// Reads an encoded key or value. None if the encoding is unknown, or something is missing or
    /// not what the encoding says.
    fn read(json: &'a RawValue) -> Option<Self> {
        let encoded: PairObject<'a, EncodedMembers> = serde_json::from_str(json.get()).ok()?;
        let JsonText(encoding) = serde_json::from_str(encoded.first?.get()).ok()?;
        let data: JsonText<'a> = serde_json::from_str(encoded.second?.get()).ok()?;
        match encoding.as_ref() {
            "string" => Some(EncodedText::String(data)),
            "binary" if bit_strings::is_bit_string(&data.0) => Some(EncodedText::Bits(data)),
            _ => None,
        }
    }

    /// Returns what such a key is stored under. None if it can't exist.
    fn into_key(self, body: &Bytes) -> Option<Bytes> {
        match self {
            EncodedText::String(text) => {
                Some(text.into_bytes(body)).filter(|key| (1..=KEY_BYTES_MAX).contains(&key.len()))
            }
            EncodedText::Bits(data) => bit_strings::key(&data.0),
        }
    }
}

/// The pairs of a batch.
struct EncodedPairs {
    pairs: BudgetedVec<Pair>,
    /// The keys of `pairs`, as they were sent.
    keys: BudgetedVec<Bytes>,
    /// The keys of pairs that can't be stored, as they were sent.
    failed: BudgetedVec<Bytes>,
}

impl EncodedPairs {
    fn read(body: &BodyBytes, limits: &Limits) -> Result<Self, DialectError> {
        let mut batch = Self {
            pairs: BudgetedVec::new(body),
            keys: BudgetedVec::new(body),
            failed: BudgetedVec::new(body),
        };
        let mut count = 0;
        json_list::read(body, |pair: PairObject<'_, KeyValue>| {
            check_count(&mut count)?;
            let key = pair
                .first
                .map_or(Bytes::from_static(NO_VALUE.as_bytes()), |key| {
                    raw_text(&body.bytes, key)
                });
            match read_pair(&pair, &body.bytes)
                .filter(|pair| pair.value.len() <= limits.value_bytes_max)
            {
                Some(pair) => {
                    batch.pairs.push(pair, limits)?;
                    batch.keys.push(key, limits)
                }
                None => batch.failed.push(key, limits),
            }
        })?;
        Ok(batch)
    }
}

fn read_pair(pair: &PairObject<'_, KeyValue>, body: &Bytes) -> Option<Pair> {
    let key = EncodedText::read(pair.first?)?.into_key(body)?;
    Some(match EncodedText::read(pair.second?)? {
        EncodedText::String(text) => Pair {
            key,
            value: text.into_bytes(body),
            encoding: PairEncoding::Text,
        },
        EncodedText::Bits(data) => Pair {
            key,
            value: data.into_bytes(body),
            encoding: PairEncoding::Bits,
        },
    })
}

fn check_count(count: &mut usize) -> Result<(), DialectError> {
    *count += 1;
    if *count > ELEMENTS_MAX {
        return Err(DialectError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("a list has at most {ELEMENTS_MAX} elements"),
        ));
    }
    Ok(())
}

/// Returns the text of a JSON value, as a part of the body that it was read from.
fn raw_text(body: &Bytes, json: &RawValue) -> Bytes {
    body.slice_ref(json.get().as_bytes())
}

/// Handles `PUT /set`.
pub async fn set(app: &App, body: BodyBytes) -> Result<Response, DialectError> {
    let limits = app.limits.clone();
    let batch = json_list::apart(body.len(), move || {
        EncodedPairs::read(&body, &limits).map(|batch| (batch, body))
    })
    .await;

    // The keys are parts of the body, so its charge is kept until the answer is made.
    let (batch, _body) = batch?;
    let outcome = batch_write::write(&*app.store, &batch.pairs).await;
    let failed: Vec<&[u8]> = outcome
        .failed
        .iter()
        .map(|index| &batch.keys[*index])
        .chain(&*batch.failed)
        .map(|key| &key[..])
        .collect();
    let status = if failed.is_empty() {
        StatusCode::OK
    } else {
        StatusCode::PARTIAL_CONTENT
    };
    let added = batch.pairs.len() - outcome.failed.len();
    let mut json = format!(r#"[{{"keys_added":{added},"keys_failed":["#).into_bytes();
    json.extend(failed.join(&b","[..]));
    json.extend(b"]}]");
    Ok(answer(status, JSON, json))
}

/// Handles `POST /fetch`.
pub async fn fetch(State(app): State<SharedApp>, request: Request) -> Response {
    look_up(&app, request, LookupKind::Values).await
}

/// Handles `POST /query`.
pub async fn query(State(app): State<SharedApp>, request: Request) -> Response {
    look_up(&app, request, LookupKind::Existence).await
}

/// Handles `GET /fetch`.
pub async fn everything(State(app): State<SharedApp>, request: Request) -> Response {
    let timer = app.start_timer(Dialect::EncodedBatch, &request);
    let chunks = ScanChunks {
        all: FullScan::new(Arc::clone(&app.store)),
        opening: Some("["),
    };
    timer.finish(
        chunked_answer::respond(&app.answers, chunks)
            .await
            .unwrap_or_else(|refusal| refusal.respond(request.method())),
    )
}

/// The question asked about each key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LookupKind {
    Values,
    Existence,
}

async fn look_up(app: &App, request: Request, kind: LookupKind) -> Response {
    let mut timer = app.start_timer(Dialect::EncodedBatch, &request);
    timer.mark_read_only();
    let (parts, body) = request.into_parts();
    let found = async {
        let body = read_body(app, &parts, body).await?;
        let limits = app.limits.clone();
        let requested =
            json_list::apart(body.len(), move || RequestedKeys::read(body, &limits)).await?;
        let lookup = KeyLookup::new(
            Arc::clone(&app.store),
            requested.keys,
            kind == LookupKind::Existence,
        );
        chunked_answer::respond(
            &app.answers,
            LookupChunks {
                lookup,
                kind,
                raw_keys: requested.raw_keys,
                opening: Some("["),
                _body: requested.body,
            },
        )
        .await
    };
    timer.finish(
        found
            .await
            .unwrap_or_else(|refusal| refusal.respond(&parts.method)),
    )
}

/// The keys of a request.
struct RequestedKeys {
    body: BodyBytes,
    /// As they were sent.
    raw_keys: BudgetedVec<Bytes>,
    /// The keys that they are stored under; empty if they can't exist.
    keys: BudgetedVec<Bytes>,
}

impl RequestedKeys {
    fn read(body: BodyBytes, limits: &Limits) -> Result<Self, DialectError> {
        let (mut raw_keys, mut keys) = (BudgetedVec::new(&body), BudgetedVec::new(&body));
        let mut count = 0;
        json_list::read(&body, |key: &RawValue| {
            check_count(&mut count)?;
            if !key.get().starts_with('{') {
                return Err(DialectError::bad_request(
                    "Bad json format: a key is an object",
                ));
            }
            raw_keys.push(raw_text(&body.bytes, key), limits)?;
            keys.push(
                EncodedText::read(key)
                    .and_then(|key| key.into_key(&body.bytes))
                    .unwrap_or_default(),
                limits,
            )
        })?;
        Ok(Self {
            body,
            raw_keys,
            keys,
        })
    }
}

/// The answer to a request for keys.
struct LookupChunks {
    lookup: KeyLookup,
    kind: LookupKind,
    raw_keys: BudgetedVec<Bytes>,
    /// The text before the next element; None once all was said.
    opening: Option<&'static str>,
    _body: BodyBytes,
}

impl JsonChunks for LookupChunks {
    fn next(&mut self) -> BoxFuture<'_, Result<Option<Bytes>, Failure>> {
        Box::pin(async move {
            let mut json = Vec::new();
            while let Some(opening) = self.opening.filter(|_| json.len() < CHUNK_BYTES) {
                let Some((index, record)) = self.lookup.next().await? else {
                    json.extend_from_slice(closing(opening).as_bytes());
                    self.opening = None;
                    break;
                };
                json.extend_from_slice(opening.as_bytes());
                json.extend_from_slice(br#"{"key":"#);
                json.extend_from_slice(&self.raw_keys[index]);
                json.extend_from_slice(br#","value":"#);
                match (self.kind, &record) {
                    (LookupKind::Existence, Some(_)) => json.extend_from_slice(b"true"),
                    (LookupKind::Existence, None) => json.extend_from_slice(b"false"),
                    (LookupKind::Values, Some(record)) => push_value(&mut json, record),
                    (LookupKind::Values, None) => json.extend_from_slice(NO_VALUE.as_bytes()),
                }
                json.push(b'}');
                self.opening = Some(",");
            }
            Ok(Some(json).filter(|json| !json.is_empty()).map(Bytes::from))
        })
    }
}

/// The list of every pair.
struct ScanChunks {
    all: FullScan,
    /// The text before the next element; None once all was said.
    opening: Option<&'static str>,
}

impl JsonChunks for ScanChunks {
    fn next(&mut self) -> BoxFuture<'_, Result<Option<Bytes>, Failure>> {
        Box::pin(async move {
            let mut json = Vec::new();
            while let Some(opening) = self.opening.filter(|_| json.len() < CHUNK_BYTES) {
                let Some(item) = self.all.next().await? else {
                    json.extend_from_slice(closing(opening).as_bytes());
                    self.opening = None;
                    break;
                };
                json.extend_from_slice(opening.as_bytes());
                json.extend_from_slice(br#"{"key":"#);
                push_key(&mut json, &item.key);
                json.extend_from_slice(br#","value":"#);
                push_value(&mut json, &item.record);
                json.push(b'}');
                self.opening = Some(",");
            }
            Ok(Some(json).filter(|json| !json.is_empty()).map(Bytes::from))
        })
    }
}

/// Returns the end of a list that would go on with `opening`. A list that was never opened is
/// empty.
fn closing(opening: &str) -> &'static str {
    if opening == "[" { "[]" } else { "]" }
}

fn push_key(json: &mut Vec<u8>, key: &[u8]) {
    match (bit_strings::data(key), std::str::from_utf8(key)) {
        (Some(data), _) => push_encoded(json, "binary", &data),
        (None, Ok(text)) => push_encoded(json, "string", text),
        (None, Err(_)) => push_encoded(json, "binary", &bit_strings::to_text(key)),
    }
}

fn push_value(json: &mut Vec<u8>, record: &Record) {
    match DisplayValue::new(&record.media, &record.value) {
        DisplayValue::Text(text) if bit_strings::is_stored_as_bits(&record.media, text) => {
            push_encoded(json, "binary", text)
        }
        DisplayValue::Text(text) | DisplayValue::Json(text) => push_encoded(json, "string", text),
        DisplayValue::Bytes(bytes) => push_encoded(json, "binary", &bit_strings::to_text(bytes)),
    }
}

fn push_encoded(json: &mut Vec<u8>, encoding: &str, data: &str) {
    json.extend_from_slice(br#"{"encoding":"#);
    push_text(json, encoding);
    json.extend_from_slice(br#","data":"#);
    push_text(json, data);
    json.push(b'}');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::testing::Site;

    const K1: &str = r#"{"encoding":"string","data":"k1"}"#;
    const B1: &str = r#"{"encoding":"binary","data":"0110"}"#;

    fn pair(key: &str, value: &str) -> String {
        format!(r#"{{"key":{key},"value":{value}}}"#)
    }

    fn text(data: &str) -> String {
        format!(r#"{{"encoding":"string","data":"{data}"}}"#)
    }

    fn bits(data: &str) -> String {
        format!(r#"{{"encoding":"binary","data":"{data}"}}"#)
    }

    fn list(elements: &[String]) -> String {
        format!("[{}]", elements.join(","))
    }

    /// Requests in turn, with their whole answers.
    async fn play(site: &Site, script: &[(&str, String, u16, String)]) {
        for (head, body, status, expected) in script {
            let reply = site.ask(head, body).await;
            assert_eq!(
                (reply.status, reply.text()),
                (*status, expected.clone()),
                "{head} {body}"
            );
            assert_eq!(
                reply.header("content-type"),
                "application/json",
                "{head} {body}"
            );
        }
    }

    #[tokio::test]
    async fn the_contract_is_kept_to_the_letter() {
        let site = Site::start().await;
        let added = |count: usize| format!(r#"[{{"keys_added":{count},"keys_failed":[]}}]"#);
        let (t, b) = (text("h\\u00e4llo"), bits("0001"));
        play(
            &site,
            &[
                ("PUT /set", "[]".into(), 200, added(0)),
                ("GET /fetch", String::new(), 200, "[]".into()),
                (
                    "PUT /set",
                    list(&[pair(K1, &t), pair(B1, &b)]),
                    200,
                    added(2),
                ),
                (
                    "POST /set",
                    list(&[pair(&text("k2"), &b), pair(&text("k2"), &text(""))]),
                    200,
                    added(2),
                ),
                ("POST /fetch", "[]".into(), 200, "[]".into()),
                (
                    "POST /fetch",
                    list(&[K1.into(), B1.into(), K1.into(), text("no")]),
                    200,
                    list(&[
                        pair(K1, &text("hällo")),
                        pair(B1, &b),
                        pair(K1, &text("hällo")),
                        pair(&text("no"), NO_VALUE),
                    ]),
                ),
                (
                    "PUT /fetch",
                    list(&[text("k2"), bits("01100"), text("0110")]),
                    200,
                    list(&[
                        pair(&text("k2"), &text("")),
                        pair(&bits("01100"), NO_VALUE),
                        pair(&text("0110"), NO_VALUE),
                    ]),
                ),
                ("POST /query", "[]".into(), 200, "[]".into()),
                (
                    "POST /query",
                    list(&[B1.into(), text("k2"), text("no"), B1.into()]),
                    200,
                    list(&[
                        pair(B1, "true"),
                        pair(&text("k2"), "true"),
                        pair(&text("no"), "false"),
                        pair(B1, "true"),
                    ]),
                ),
                (
                    "GET /fetch",
                    String::new(),
                    200,
                    list(&[
                        pair(K1, &text("hällo")),
                        pair(&text("k2"), &text("")),
                        pair(B1, &b),
                    ]),
                ),
            ],
        )
        .await;
        site.stop().await;
    }

    #[tokio::test]
    async fn what_cannot_be_stored_is_named_and_the_rest_is_stored() {
        let site = Site::start().await;
        let v = text("v");
        let long = text(&"k".repeat(4097));
        let unknown = r#"{"encoding":"hex","data":"ff"}"#;
        let bad_keys = [
            unknown.into(),
            bits("012"),
            text(""),
            bits(""),
            long,
            r#"{"data":"k"}"#.into(),
            r#"{"encoding":"string"}"#.into(),
            "5".into(),
        ];
        let mut pairs: Vec<String> = bad_keys.iter().map(|key| pair(key, &v)).collect();
        pairs.insert(0, pair(K1, &v));
        pairs.push(pair(B1, &v));
        let reply = site.ask("PUT /set", list(&pairs)).await;
        assert_eq!(
            (reply.status, reply.text()),
            (
                206,
                format!(r#"[{{"keys_added":2,"keys_failed":{}}}]"#, list(&bad_keys))
            )
        );
        let mut failed = Vec::new();
        for value in [
            unknown,
            r#"{"encoding":"binary","data":"2"}"#,
            r#"{"encoding":"string","data":"\ud800"}"#,
            "{}",
            "null",
            "7",
            "[[[]]]",
        ] {
            failed.push(K1.to_owned());
            pairs = failed.iter().map(|key| pair(key, value)).collect();
        }
        let reply = site.ask("PUT /set", list(&pairs)).await;
        assert_eq!(
            (reply.status, reply.text()),
            (
                206,
                format!(r#"[{{"keys_added":0,"keys_failed":{}}}]"#, list(&failed))
            )
        );
        let reply = site
            .ask(
                "PUT /set",
                format!(r#"[{{"key":{K1}}},{{"value":{v}}},{{}}]"#),
            )
            .await;
        assert_eq!(
            reply.text(),
            format!(
                r#"[{{"keys_added":0,"keys_failed":{}}}]"#,
                list(&[K1.into(), NO_VALUE.into(), NO_VALUE.into()])
            )
        );
        assert_eq!(
            site.ask("GET /fetch", "").await.text(),
            list(&[pair(K1, &v), pair(B1, &v)])
        );
        site.stop().await;
    }

    #[tokio::test]
    async fn values_of_all_dialects_are_shown_and_binary_keys_are_out_of_their_reach() {
        let site = Site::start().await;
        for (kind, value) in [
            ("text/plain", &b"\"q\""[..]),
            ("application/json", b"[1, 2]"),
            ("image/png", b"\x00\xff"),
            ("application/vnd.quorate.bits", b"no bits"),
        ] {
            site.ask(
                &format!("PUT /v1/kv/{}\ncontent-type: {kind}", &kind[..4]),
                value,
            )
            .await;
        }
        site.ask("PUT /v1/kv/%ff", "v").await;
        site.ask("PUT /set", list(&[pair(B1, &text("hidden"))]))
            .await;
        let all = list(&[
            pair(&text("appl"), &text("no bits")),
            pair(&text("imag"), &bits("0000000011111111")),
            pair(&text("text"), &text(r#"\"q\""#)),
            pair(&bits("11111111"), &text("v")),
            pair(B1, &text("hidden")),
        ]);
        assert_eq!(site.get("/fetch").await.text(), all);
        site.ask("PUT /v1/kv/appl\ncontent-type: application/json", "[1, 2]")
            .await;
        assert_eq!(
            site.ask("POST /fetch", list(&[text("appl")])).await.text(),
            list(&[pair(&text("appl"), &text("[1, 2]"))])
        );
        site.ask("PUT /set", list(&[pair(K1, &bits("01"))])).await;
        let native = site.get("/v1/kv/k1").await;
        assert_eq!(
            (native.text().as_str(), native.header("content-type")),
            ("01", "application/vnd.quorate.bits")
        );
        let listed = site.get("/v1/kv").await.json();
        assert_eq!(
            listed["items"].as_array().map(Vec::len),
            Some(5),
            "{listed}"
        );
        let raw = super::bit_strings::key("0110").expect("a key");
        let path: String = raw.iter().map(|byte| format!("%{byte:02x}")).collect();
        for (method, body) in [("GET", ""), ("PUT", "x"), ("DELETE", "")] {
            assert_eq!(
                site.ask(&format!("{method} /v1/kv/{path}"), body)
                    .await
                    .verdict(),
                (400, "invalid_key".into())
            );
        }
        for (method, body, status) in [
            ("GET", "", 404),
            ("PUT", r#"{"value":1}"#, 400),
            ("DELETE", "", 404),
        ] {
            assert_eq!(
                site.ask(&format!("{method} /kvs/keys/{path}"), body)
                    .await
                    .status,
                status,
                "{method}"
            );
        }
        assert_eq!(
            site.get(&format!("/v1/kv?prefix={path}")).await.json()["items"]
                .as_array()
                .map(Vec::len),
            Some(0)
        );
        assert_eq!(
            site.get("/v1/kv?reverse=true&limit=1").await.json()["items"][0]["key_encoding"],
            "base64"
        );
        site.stop().await;
    }

    #[tokio::test]
    async fn hostile_input_is_refused() {
        let site = Site::with(Limits {
            body_bytes_max: 3 << 20,
            value_bytes_max: 1 << 20,
            ..Limits::default()
        })
        .await;
        let deep = format!(
            r#"[{{"key":{K1},"value":{}{}}}]"#,
            "[".repeat(500_000),
            "]".repeat(500_000)
        );
        assert_eq!(
            site.ask("PUT /set", deep).await.text(),
            format!(r#"[{{"keys_added":0,"keys_failed":[{K1}]}}]"#)
        );
        let large = list(&[
            pair(K1, &text(&"v".repeat((1 << 20) + 1))),
            pair(&text("k2"), &text("v")),
        ]);
        assert_eq!(
            site.ask("PUT /set", large).await.text(),
            format!(r#"[{{"keys_added":1,"keys_failed":[{K1}]}}]"#)
        );
        for body in [
            "",
            "{",
            "[",
            "null",
            "{}",
            "[1]",
            "[[]]",
            "[null]",
            "\"a\"",
            "[{}",
            "[{},]",
            "[{}]]",
            "[{\"key\":{}}",
        ] {
            for head in ["PUT /set", "POST /fetch", "POST /query"] {
                let reply = site.ask(head, body).await;
                assert_eq!(reply.status, 400, "{head} {body}");
                assert!(reply.json()["error"].is_string(), "{head} {body}");
            }
        }
        let none = format!(r#"[{{"key":{{}},"value":{NO_VALUE}}}]"#);
        assert_eq!(site.ask("POST /fetch", "[{}]").await.text(), none);
        for head in ["PUT /set", "POST /fetch", "POST /query"] {
            assert_eq!(
                site.ask(head, " ".repeat((3 << 20) + 1)).await.status,
                413,
                "{head}"
            );
            assert_eq!(
                site.ask(head, b"[{\"key\":{\"encoding\":\"\xff\"}}]")
                    .await
                    .status,
                400,
                "{head}"
            );
        }
        for head in [
            "GET /set",
            "DELETE /set",
            "DELETE /fetch",
            "GET /query",
            "PATCH /query",
        ] {
            assert_eq!(
                site.ask(head, "").await.verdict(),
                (405, "method_not_allowed".into()),
                "{head}"
            );
        }
        site.stop().await;
        let site = Site::with(Limits {
            bodies_bytes_max: 100_000,
            ..Limits::default()
        })
        .await;
        let many = format!("[{}{{}}]", "{},".repeat(20_000));
        for head in ["PUT /set", "POST /fetch"] {
            let reply = site.ask(head, &many).await;
            assert_eq!(
                (reply.status, reply.header("retry-after")),
                (429, "1"),
                "{head}"
            );
        }
        site.stop().await;
    }

    #[tokio::test]
    async fn without_a_quorum_it_says_so() {
        let site = Site::start().await;
        site.ask(
            "PUT /set",
            list(&[pair(&text("a"), &text("v")), pair(&text("z"), &text("v"))]),
        )
        .await;
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
            let reply = site.ask("PUT /set", list(&[pair(K1, &text("w"))])).await;
            assert_eq!(
                (reply.status, reply.text()),
                (206, format!(r#"[{{"keys_added":0,"keys_failed":[{K1}]}}]"#))
            );
            for (head, body) in [
                ("POST /fetch", list(&[K1.into()])),
                ("POST /query", list(&[K1.into()])),
                ("GET /fetch", String::new()),
            ] {
                let reply = site.ask(head, body).await;
                assert_eq!(
                    (reply.status, reply.json()["error"].as_str()),
                    (503, Some("Unable to satisfy request")),
                    "{head}"
                );
            }
        }
        assert!(site.store.last_options().timeout < std::time::Duration::from_secs(5));
        site.stop().await;
    }

    #[tokio::test]
    async fn a_long_answer_streams_and_breaks_off_where_it_fails() {
        let site = Site::start().await;
        let value = text(&"v".repeat(1 << 20));
        let pairs: Vec<String> = (0..20)
            .map(|n| pair(&text(&format!("k{n:02}")), &value))
            .collect();
        assert_eq!(site.ask("PUT /set", list(&pairs)).await.status, 200);
        let keys: Vec<String> = (0..20).map(|n| text(&format!("k{n:02}"))).collect();
        for (head, body, questions) in [
            ("GET /fetch", String::new(), 1),
            ("POST /fetch", list(&keys), 8),
        ] {
            let mut wire = site.connect().await;
            wire.send(&crate::http::testing::request(
                &format!("{head}\nconnection: close"),
                body.as_bytes(),
            ))
            .await;
            let whole = wire.rest().await;
            assert!(
                whole.contains("transfer-encoding: chunked") && whole.ends_with("\r\n0\r\n\r\n"),
                "{head}"
            );
            assert!(whole.len() > 20 << 20);
            site.store.fail_after(
                questions,
                Failure::Unavailable {
                    reason: "no quorum".into(),
                    retry_after_ms: 1000,
                },
            );
            let mut wire = site.connect().await;
            wire.send(&crate::http::testing::request(head, body.as_bytes()))
                .await;
            let broken = wire.rest().await;
            assert!(
                broken.starts_with("HTTP/1.1 200") && !broken.ends_with("0\r\n\r\n"),
                "{head}"
            );
            site.store.heal();
        }
        site.stop().await;
    }
}
