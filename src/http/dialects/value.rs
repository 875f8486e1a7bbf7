//! Shows stored values as the dialects do, and reads the strings of their JSON.

use std::borrow::Cow;

use bytes::Bytes;
use serde::Deserialize;

use crate::http::media;
use crate::sm::kv::Media;

/// A stored value as a dialect shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DisplayValue<'a> {
    Text(&'a str),
    /// One JSON text.
    Json(&'a str),
    /// Not UTF-8.
    Bytes(&'a [u8]),
}

impl<'a> DisplayValue<'a> {
    pub fn new(media: &Media, value: &'a [u8]) -> Self {
        match (std::str::from_utf8(value), media) {
            (Err(_), _) => DisplayValue::Bytes(value),
            (Ok(json), Media::Json) => DisplayValue::Json(json),
            (Ok(json), Media::Other(name)) if is_json(name, value) => DisplayValue::Json(json),
            (Ok(text), Media::Text | Media::Octets | Media::Other(_)) => DisplayValue::Text(text),
        }
    }
}

/// Returns true if a value is JSON, as a name with parameters (`application/json; charset=utf-8`)
/// claims.
fn is_json(name: &str, value: &[u8]) -> bool {
    media::essence(name).eq_ignore_ascii_case("application/json") && media::is_json(value)
}

/// A JSON string, without a copy where it has no escapes.
#[derive(Deserialize)]
pub struct JsonText<'a>(#[serde(borrow)] pub Cow<'a, str>);

impl JsonText<'_> {
    /// Returns the text as a part of `body`, which it was read from, or in an allocation of its
    /// own.
    pub fn into_bytes(self, body: &Bytes) -> Bytes {
        match self.0 {
            Cow::Borrowed(text) => body.slice_ref(text.as_bytes()),
            Cow::Owned(text) => Bytes::from(text),
        }
    }
}
