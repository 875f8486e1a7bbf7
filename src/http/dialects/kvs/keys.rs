//! `PUT GET DELETE /kvs/keys/<key>`.
//!
//! | request | answer |
//! | --- | --- |
//! | `PUT` with `{"value":V}`, new | 201 `{"message":"Added successfully","replaced":false}` |
//! | the same, existing | 200 `{"message":"Updated successfully","replaced":true}` |
//! | no `value`, or no object | 400 `{"error":"Value is missing","message":"Error in PUT"}` |
//! | no body, or no JSON | 400 `{"error":"Bad json format","message":"Error in PUT"}` |
//! | a key of over 50 characters | 400 `{"error":"Key is too long","message":"Error in PUT"}` |
//! | `GET` | 200 `{"doesExist":true,"message":"Retrieved successfully","value":V}` |
//! | missing | 404 `{"doesExist":false,"error":"Key does not exist","message":"Error in GET"}` |
//! | `DELETE` | 200 `{"doesExist":true,"message":"Deleted successfully"}` |
//! | missing | 404 `{"doesExist":false,"error":"Key does not exist","message":"Error in DELETE"}` |
//!
//! A key is the percent-decoded rest of the path, slashes and bytes that are no text included; a
//! `%` that begins no escape stands for itself. Of bytes that are no text, each that can't be read
//! counts as a character.
//!
//! `"address"` is added where the node asked is not the key's home, or in C4 not of its shard. It
//! is left out of 503: nobody answered.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::{Method, StatusCode};
use percent_encoding::percent_decode_str;
use serde_json::value::{RawValue, to_raw_value};

use super::body::{Fields, KvsBody};
use super::refusal;
use super::response::{KvsResponse, ResponseContent};
use crate::api::store::WriteFailure;
use crate::http::dialects::error::DialectError;
use crate::http::dialects::request::options;
use crate::http::dialects::value::{DisplayValue, JsonText};
use crate::http::{App, blocking};
use crate::sm::cluster::view::Layout;
use crate::sm::kv::{Action, Condition, Media, Operation, OperationOutcome, Record};
use crate::types::{Address, KEY_BYTES_MAX, is_reserved};

/// The longest key that is stored, in characters. Longer ones, of other dialects, are read and
/// deleted.
const KEY_CHARACTERS_MAX: usize = 50;

pub fn unescape(escaped: &str) -> Bytes {
    Bytes::from_iter(percent_decode_str(escaped))
}

pub async fn answer(
    app: &App,
    method: &Method,
    key: Bytes,
    request_body: &KvsBody<'_>,
) -> Result<KvsResponse, DialectError> {
    let answered = match *method {
        Method::PUT => put(app, &key, request_body).await,
        Method::DELETE => delete(app, &key).await,
        _ => get(app, method, &key).await,
    }?;
    let address = address(app, &key).await;
    Ok(answered.at(address))
}

async fn get(app: &App, method: &Method, key: &Bytes) -> Result<KvsResponse, DialectError> {
    if !can_exist(key) {
        return Ok(KvsResponse::missing(method));
    }
    match app.store.get(key.clone(), options()).await {
        Ok(found) => Ok(found.record.map_or_else(
            || KvsResponse::missing(method),
            |record| blocking::work(record.value.len(), || retrieved(&record)),
        )),
        Err(failure) => Err(refusal(app, failure)),
    }
}

async fn put(
    app: &App,
    key: &Bytes,
    request_body: &KvsBody<'_>,
) -> Result<KvsResponse, DialectError> {
    let refused = |error: &str| {
        Ok(KvsResponse::failed(
            StatusCode::BAD_REQUEST,
            error,
            &Method::PUT,
        ))
    };
    let value = match request_body {
        KvsBody::Nothing => return refused("Bad json format"),
        KvsBody::Other | KvsBody::Object(Fields { value: None, .. }) => {
            return refused("Value is missing");
        }
        KvsBody::Object(Fields {
            value: Some(value), ..
        }) => value,
    };

    // The contract counts characters, and a key of this dialect need not be text.
    if String::from_utf8_lossy(key).chars().count() > KEY_CHARACTERS_MAX {
        return refused("Key is too long");
    }
    if key.is_empty() {
        return refused("Key is missing");
    }
    if is_reserved(key) {
        return refused("Key is reserved");
    }
    let (media, value) = blocking::work(value.get().len(), || stored(value));
    if value.len() > app.limits.value_bytes_max {
        let error = format!("a value is at most {} bytes", app.limits.value_bytes_max);
        return Err(DialectError::new(StatusCode::PAYLOAD_TOO_LARGE, error));
    }
    match write(app, key, Action::Put { media, value }).await? {
        OperationOutcome::Put { created: true, .. } => Ok(KvsResponse::new(
            StatusCode::CREATED,
            ResponseContent::Stored {
                message: "Added successfully",
                replaced: false,
            },
        )),
        OperationOutcome::Put { created: false, .. } => Ok(KvsResponse::new(
            StatusCode::OK,
            ResponseContent::Stored {
                message: "Updated successfully",
                replaced: true,
            },
        )),
        OperationOutcome::Got(_) | OperationOutcome::Deleted { .. } => {
            Err(DialectError::unanswered())
        }
    }
}

async fn delete(app: &App, key: &Bytes) -> Result<KvsResponse, DialectError> {
    if !can_exist(key) {
        return Ok(KvsResponse::missing(&Method::DELETE));
    }
    match write(app, key, Action::Delete).await? {
        OperationOutcome::Deleted { revision: Some(_) } => Ok(KvsResponse::new(
            StatusCode::OK,
            ResponseContent::Deleted {
                does_exist: true,
                message: "Deleted successfully",
            },
        )),
        OperationOutcome::Deleted { revision: None } => Ok(KvsResponse::missing(&Method::DELETE)),
        OperationOutcome::Got(_) | OperationOutcome::Put { .. } => Err(DialectError::unanswered()),
    }
}

async fn write(app: &App, key: &Bytes, action: Action) -> Result<OperationOutcome, DialectError> {
    let operation = Operation {
        key: key.clone(),
        condition: Condition::None,
        action,
    };
    match app
        .store
        .write(vec![operation], None, options())
        .await
        .pop()
    {
        Some(Ok(outcome)) => Ok(outcome),
        Some(Err(WriteFailure::Failed(failure))) => Err(refusal(app, failure)),
        // Of the rejections only those are left that pass by themselves: there was no condition,
        // and no idempotency key.
        Some(Err(WriteFailure::Rejected(_))) | None => Err(DialectError::unanswered()),
    }
}

fn can_exist(key: &[u8]) -> bool {
    (1..=KEY_BYTES_MAX).contains(&key.len()) && !is_reserved(key)
}

/// Returns a value as it is stored: a string as its characters, if it stands for any text,
/// everything else as it was given.
fn stored(value: &RawValue) -> (Media, Bytes) {
    let json = value.get();
    match serde_json::from_str::<JsonText<'_>>(json) {
        Ok(JsonText(text)) => (Media::Text, Bytes::from(text.into_owned())),
        Err(_) => (Media::Json, Bytes::copy_from_slice(json.as_bytes())),
    }
}

fn retrieved(record: &Record) -> KvsResponse {
    let value = match DisplayValue::new(&record.media, &record.value) {
        DisplayValue::Json(json) => {
            RawValue::from_string(json.to_owned()).or_else(|_| to_raw_value(json))
        }
        DisplayValue::Text(text) => to_raw_value(text),
        DisplayValue::Bytes(bytes) => to_raw_value(&STANDARD.encode(bytes)),
    };
    let value = value.expect("a string always serializes");
    KvsResponse::new(
        StatusCode::OK,
        ResponseContent::Retrieved {
            does_exist: true,
            message: "Retrieved successfully",
            value,
        },
    )
}

/// Returns the node to ask about a key instead of this one. None if this node is the right one.
async fn address(app: &App, key: &[u8]) -> Option<Address> {
    let map = app.store.map(options()).await.ok()?;
    let shard = map.owner_of(key);
    let place = map.shard(shard)?;
    let is_it = app.store.this_node().is_some_and(|here| match map.layout {
        Layout::Spread => place.home == here,
        Layout::Exclusive => place.replicas.contains(&here),
    });
    if is_it {
        None
    } else {
        app.store.contact(shard).await
    }
}
