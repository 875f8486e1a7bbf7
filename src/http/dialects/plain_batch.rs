//! Dialect E, "plain batch": lists of keys and values that are strings.
//!
//! - `POST /set` `[{"key":"hi","value":"hello"}, ...]`: 200 `Success to set key`, once for each
//!   shard written to.
//! - `POST /get` `[{"key":"hi"}, ...]`: 200 `{"existedKey":[{"key":"hi","value":"hello"}],` and
//!   then `"notExistedKey":[{"key":"hi6","value":""}]}`.
//!
//! Rules:
//! - Of several pairs with one key the last wins. A value that is missing or no string is stored as
//!   `""`.
//! - `notExistedKey` is left out when it is empty, `existedKey` is null when no key exists. A key
//!   asked twice is answered twice.
//! - A key that is empty, missing or longer than 4096 bytes is a 400, a value past the limit a 413;
//!   then nothing is stored.
//! - A batch is written in many steps, and is not atomic: 503 says that some of it is not known to
//!   be stored.
//! - JSON that others stored is shown as its text, and what is not UTF-8 in base64.

use std::borrow::Cow;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures::future::BoxFuture;
use http::StatusCode;
use serde_json::value::RawValue;

use super::batch_write::{self, Pair, PairEncoding};
use super::chunked_answer::{self, CHUNK_BYTES, JsonChunks, KeyLookup, push_text};
use super::error::DialectError;
use super::json_list::{self, BudgetedVec, KeyValue, PairObject};
use super::request::read_body;
use super::response::{TEXT, answer};
use super::value::{DisplayValue, JsonText};
use crate::api::store::Failure;
use crate::http::app::{App, SharedApp};
use crate::http::body::BodyBytes;
use crate::http::dialect::Dialect;
use crate::http::limits::Limits;
use crate::sm::kv::Record;
use crate::types::KEY_BYTES_MAX;

const STORED: &str = "Success to set key";

/// Handles `POST /set`.
pub async fn set(app: &App, body: BodyBytes) -> Result<Response, DialectError> {
    let limits = app.limits.clone();
    let (pairs, _body) = json_list::apart(body.len(), move || {
        read_pairs(&body, &limits).map(|pairs| (pairs, body))
    })
    .await?;
    let outcome = batch_write::write(&*app.store, &pairs).await;
    match outcome.failure {
        // A 4xx says that nothing is stored: not of pairs of which others are.
        Some(failure) if failure.status.is_client_error() && outcome.failed.len() < pairs.len() => {
            Err(DialectError::partly_stored())
        }
        Some(failure) => Err(failure),
        None => Ok(answer(StatusCode::OK, TEXT, STORED.repeat(outcome.shards))),
    }
}

fn read_pairs(body: &BodyBytes, limits: &Limits) -> Result<BudgetedVec<Pair>, DialectError> {
    let mut pairs = BudgetedVec::new(body);
    json_list::read(body, |pair: PairObject<'_, KeyValue>| {
        let key = read_key(&pair, &body.bytes)?;
        let value = match pair.second {
            Some(value) if value.get().starts_with('"') => read_text(value, &body.bytes)?,
            Some(_) | None => Bytes::new(),
        };

        // Found while the list is read: nothing of it is stored yet.
        if value.len() > limits.value_bytes_max {
            let error = format!("a value is at most {} bytes", limits.value_bytes_max);
            return Err(DialectError::new(StatusCode::PAYLOAD_TOO_LARGE, error));
        }
        pairs.push(
            Pair {
                key,
                value,
                encoding: PairEncoding::Text,
            },
            limits,
        )
    })?;
    Ok(pairs)
}

fn read_key(pair: &PairObject<'_, KeyValue>, body: &Bytes) -> Result<Bytes, DialectError> {
    let key = match pair.first {
        Some(key) if key.get().starts_with('"') => read_text(key, body)?,
        Some(_) | None => Bytes::new(),
    };
    if !(1..=KEY_BYTES_MAX).contains(&key.len()) {
        return Err(DialectError::bad_request(format!(
            "a key is a string of 1 to {KEY_BYTES_MAX} bytes"
        )));
    }
    Ok(key)
}

fn read_text(json: &RawValue, body: &Bytes) -> Result<Bytes, DialectError> {
    let bad =
        |error: serde_json::Error| DialectError::bad_request(format!("Bad json format: {error}"));
    serde_json::from_str::<JsonText<'_>>(json.get())
        .map(|text| text.into_bytes(body))
        .map_err(bad)
}

/// Handles `POST /get`.
pub async fn get(State(app): State<SharedApp>, request: Request) -> Response {
    let mut timer = app.start_timer(Dialect::PlainBatch, &request);
    timer.mark_read_only();
    let (parts, body) = request.into_parts();
    let answer_body = async {
        let body = read_body(&app, &parts, body).await?;
        let limits = app.limits.clone();
        let (keys, body) = json_list::apart(body.len(), move || {
            read_keys(&body, &limits).map(|keys| (keys, body))
        })
        .await?;
        let lookup = KeyLookup::new(Arc::clone(&app.store), keys, false);
        chunked_answer::respond(
            &app.answers,
            PlainGetChunks {
                lookup,
                missing: Vec::new(),
                stage: Stage::Existing { count: 0 },
                _body: body,
            },
        )
        .await
    };
    timer.finish(
        answer_body
            .await
            .unwrap_or_else(|refusal| refusal.respond(&parts.method)),
    )
}

fn read_keys(body: &BodyBytes, limits: &Limits) -> Result<BudgetedVec<Bytes>, DialectError> {
    let mut keys = BudgetedVec::new(body);
    json_list::read(body, |pair: PairObject<'_, KeyValue>| {
        keys.push(read_key(&pair, &body.bytes)?, limits)
    })?;
    Ok(keys)
}

/// The answer to a request for keys: those that exist, and then the others.
struct PlainGetChunks {
    lookup: KeyLookup,
    /// The places of keys that don't exist.
    missing: Vec<usize>,
    stage: Stage,
    _body: BodyBytes,
}

/// The part of the answer that comes next.
#[derive(Debug, Clone, Copy)]
enum Stage {
    /// The next that exists, after so many.
    Existing {
        count: usize,
    },
    /// Of those that don't exist the one at this place in their list.
    Missing {
        at: usize,
    },
    Done,
}

impl JsonChunks for PlainGetChunks {
    fn next(&mut self) -> BoxFuture<'_, Result<Option<Bytes>, Failure>> {
        Box::pin(async move {
            let mut json = Vec::new();
            while json.len() < CHUNK_BYTES {
                self.stage = match self.stage {
                    Stage::Existing { count } => self.push_existing(&mut json, count).await?,
                    Stage::Missing { at } => self.push_missing(&mut json, at),
                    Stage::Done => break,
                };
            }
            Ok(Some(json).filter(|json| !json.is_empty()).map(Bytes::from))
        })
    }
}

impl PlainGetChunks {
    async fn push_existing(&mut self, json: &mut Vec<u8>, count: usize) -> Result<Stage, Failure> {
        match self.lookup.next().await? {
            Some((index, Some(record))) => {
                json.extend_from_slice(if count == 0 {
                    br#"{"existedKey":["#
                } else {
                    b","
                });
                push_pair(json, self.lookup.key(index), &shown(&record));
                Ok(Stage::Existing { count: count + 1 })
            }
            Some((index, None)) => {
                // The answer lists missing keys last, and the existing ones are streamed meanwhile.
                self.missing.push(index);
                Ok(Stage::Existing { count })
            }
            None => {
                json.extend_from_slice(if count == 0 {
                    br#"{"existedKey":null"#
                } else {
                    b"]"
                });
                Ok(Stage::Missing { at: 0 })
            }
        }
    }

    fn push_missing(&self, json: &mut Vec<u8>, at: usize) -> Stage {
        match self.missing.get(at) {
            Some(index) => {
                json.extend_from_slice(if at == 0 {
                    br#","notExistedKey":["#
                } else {
                    b","
                });
                push_pair(json, self.lookup.key(*index), "");
                Stage::Missing { at: at + 1 }
            }
            None => {
                json.extend_from_slice(if at == 0 { b"}" } else { b"]}" });
                Stage::Done
            }
        }
    }
}

fn push_pair(json: &mut Vec<u8>, key: &[u8], value: &str) {
    json.extend_from_slice(br#"{"key":"#);
    push_text(json, &String::from_utf8_lossy(key));
    json.extend_from_slice(br#","value":"#);
    push_text(json, value);
    json.push(b'}');
}

fn shown(record: &Record) -> Cow<'_, str> {
    match DisplayValue::new(&record.media, &record.value) {
        DisplayValue::Text(text) | DisplayValue::Json(text) => Cow::Borrowed(text),
        DisplayValue::Bytes(bytes) => Cow::Owned(STANDARD.encode(bytes)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::testing::Site;

    #[tokio::test]
    async fn the_contract_is_kept_to_the_letter() {
        let site = Site::start().await;
        let (text, json) = ("text/plain; charset=utf-8", "application/json");
        let set = |pairs: &str| ("POST /set", pairs.to_owned());
        let get = |keys: &str| ("POST /get", keys.to_owned());
        let script = [
            (set("[]"), text, ""),
            (get("[]"), json, r#"{"existedKey":null}"#),
            (
                set(r#"[{"key":"hi","value":"hello"}]"#),
                text,
                "Success to set key",
            ),
            (
                get(r#"[{"key":"hi"}]"#),
                json,
                r#"{"existedKey":[{"key":"hi","value":"hello"}]}"#,
            ),
            (
                get(r#"[{"key":"hi6"}]"#),
                json,
                r#"{"existedKey":null,"notExistedKey":[{"key":"hi6","value":""}]}"#,
            ),
            (
                get(r#"[{"key":"no"},{"key":"hi","value":"x"},{"key":"no"},{"key":"hi"}]"#),
                json,
                concat!(
                    r#"{"existedKey":[{"key":"hi","value":"hello"},{"key":"hi","value":"hello"}],"#,
                    r#""notExistedKey":[{"key":"no","value":""},{"key":"no","value":""}]}"#
                ),
            ),
            (
                set(r#"[{"key":"hi","value":"1"},{"key":"hi","value":"\u00fc\"\n"}]"#),
                text,
                "Success to set key",
            ),
            (
                get(r#"[{"key":"hi"}]"#),
                json,
                r#"{"existedKey":[{"key":"hi","value":"ü\"\n"}]}"#,
            ),
            (set(r#"[{"key":"hi"}]"#), text, "Success to set key"),
            (
                get(r#"[{"key":"hi"}]"#),
                json,
                r#"{"existedKey":[{"key":"hi","value":""}]}"#,
            ),
            (
                set(r#"[{"key":"hi","value":[1e999]}]"#),
                text,
                "Success to set key",
            ),
            (
                get(r#"[{"key":"hi"}]"#),
                json,
                r#"{"existedKey":[{"key":"hi","value":""}]}"#,
            ),
            (
                ("PUT /set", r#"[{"key":"hi","value":"put"}]"#.to_owned()),
                text,
                "Success to set key",
            ),
            (
                ("PUT /get", r#"[{"key":"hi"}]"#.to_owned()),
                json,
                r#"{"existedKey":[{"key":"hi","value":"put"}]}"#,
            ),
        ];
        for ((head, body), kind, expected) in script {
            let reply = site
                .ask(
                    &format!("{head}\ncontent-type: application/x-www-form-urlencoded"),
                    &body,
                )
                .await;
            assert_eq!(
                (
                    reply.status,
                    reply.text().as_str(),
                    reply.header("content-type")
                ),
                (200, expected, kind),
                "{head} {body}"
            );
        }
        site.stop().await;
    }

    #[tokio::test]
    async fn success_is_told_once_for_each_shard() {
        let site = Site::start().await;
        let map =
            crate::api::store::Store::map(&*site.store, crate::http::dialects::request::options())
                .await
                .expect("a map");
        let key_of = |shard: usize| {
            (0..)
                .map(|n| format!("k{n}"))
                .find(|key| map.owner_of(key.as_bytes()) == map.owners()[shard])
        };
        let keys: Vec<String> = [0, 1, 0].into_iter().filter_map(key_of).collect();
        let pairs: Vec<String> = keys
            .iter()
            .map(|key| format!(r#"{{"key":"{key}","value":"v"}}"#))
            .collect();
        let reply = site
            .ask("POST /set", format!("[{}]", pairs.join(",")))
            .await;
        assert_eq!(reply.text(), "Success to set keySuccess to set key");
        site.stop().await;
    }

    #[tokio::test]
    async fn what_others_stored_is_shown() {
        let site = Site::start().await;
        for (kind, value, shown) in [
            ("application/json", &b"{\"a\": 1}"[..], r#"{\"a\": 1}"#),
            ("application/octet-stream", b"\x00\xff", "AP8="),
            ("image/png", b"text", "text"),
            ("application/vnd.quorate.bits", b"0110", "0110"),
        ] {
            site.ask(&format!("PUT /v1/kv/a\ncontent-type: {kind}"), value)
                .await;
            let expected = format!(r#"{{"existedKey":[{{"key":"a","value":"{shown}"}}]}}"#);
            assert_eq!(
                site.ask("POST /get", r#"[{"key":"a"}]"#).await.text(),
                expected,
                "{kind}"
            );
        }
        site.stop().await;
    }

    #[tokio::test]
    async fn hostile_input_is_refused_and_nothing_is_stored() {
        let site = Site::with(Limits {
            body_bytes_max: 3 << 20,
            value_bytes_max: 1 << 20,
            ..Limits::default()
        })
        .await;
        let long = format!(
            r#"[{{"key":"a","value":"v"}},{{"key":"{}"}}]"#,
            "k".repeat(4097)
        );
        let bads = [
            "",
            "{",
            "[",
            "null",
            "{}",
            "[1]",
            "[[]]",
            "[null]",
            r#"["a"]"#,
            "[{}]",
            r#"[{"key":""}]"#,
            r#"[{"key":1}]"#,
            r#"[{"key":null}]"#,
            r#"[{"key":"a"}"#,
            r#"[{"key":"a"},]"#,
            r#"[{"key":"a"}] x"#,
            r#"[{"key":"\ud800"}]"#,
            r#"[{"key":"a"},{"key":["a"]}]"#,
            long.as_str(),
        ];
        for body in bads {
            for head in ["POST /set", "POST /get"] {
                let reply = site.ask(head, body).await;
                assert_eq!(reply.status, 400, "{head} {body:.50}");
                assert!(reply.json()["error"].is_string(), "{head} {body:.50}");
            }
        }
        assert_eq!(
            site.ask("POST /set", r#"[{"key":"a","value":"\ud800"}]"#)
                .await
                .status,
            400
        );
        let large = format!(
            r#"[{{"key":"a","value":"v"}},{{"key":"b","value":"{}"}}]"#,
            "v".repeat((1 << 20) + 1)
        );
        assert_eq!(site.ask("POST /set", large).await.status, 413);
        assert_eq!(
            site.ask("POST /get", " ".repeat((3 << 20) + 1))
                .await
                .status,
            413
        );
        for head in ["GET /get", "DELETE /get"] {
            assert_eq!(
                site.ask(head, "").await.verdict(),
                (405, "method_not_allowed".into()),
                "{head}"
            );
        }
        assert_eq!(site.store.requests(), 0);
        let deep = format!(
            r#"[{{"key":"a","value":{}{}}}]"#,
            "[".repeat(500_000),
            "]".repeat(500_000)
        );
        assert_eq!(site.ask("POST /set", deep).await.text(), STORED);
        site.stop().await;
    }

    #[tokio::test]
    async fn that_one_entry_is_refused_is_not_said_of_those_that_are_stored() {
        let site = Site::start().await;
        site.store.fail_next_write(Failure::TooLarge {
            limit: "an entry".into(),
        });
        let many: Vec<String> = (0..600)
            .map(|n| format!(r#"{{"key":"k{n}","value":"v"}}"#))
            .collect();
        assert_eq!(
            site.ask("POST /set", format!("[{}]", many.join(",")))
                .await
                .status,
            503
        );
        assert!((0..600).any(|n| site.store.record(format!("k{n}").as_bytes()).is_some()));
        site.store.fail_next_write(Failure::TooLarge {
            limit: "an entry".into(),
        });
        assert_eq!(
            site.ask("POST /set", r#"[{"key":"a","value":"v"}]"#)
                .await
                .status,
            413
        );
        site.stop().await;
    }

    #[tokio::test]
    async fn without_a_quorum_it_says_so() {
        let site = Site::start().await;
        site.store.fail(
            1,
            Failure::Unavailable {
                reason: "no quorum".into(),
                retry_after_ms: 1000,
            },
        );
        for (head, body) in [
            ("POST /set", r#"[{"key":"zz"},{"key":"a"}]"#),
            ("POST /get", r#"[{"key":"zz"},{"key":"a"}]"#),
        ] {
            let reply = site.ask(head, body).await;
            assert_eq!(
                (reply.status, reply.text().as_str()),
                (
                    503,
                    r#"{"error":"Unable to satisfy request","message":"Error in POST"}"#
                )
            );
            assert_eq!(reply.header("retry-after"), "1");
        }
        site.stop().await;
    }
}
