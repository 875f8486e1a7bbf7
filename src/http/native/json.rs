//! Keys, values and lists in the JSON of the native dialect.

use axum::body::Body;
use axum::response::Response;
use http::{HeaderValue, StatusCode, header};
use serde::Serialize;

use crate::api::store::Item;
use crate::http::media::{self, Encoding};

/// A key in JSON: `"key"`, and `"key_encoding": "base64"` where it isn't UTF-8.
#[derive(Debug, Serialize)]
pub struct KeyJson {
    key: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_encoding: Option<Encoding>,
}

impl KeyJson {
    pub fn new(key: &[u8]) -> Self {
        let (key, encoding) = Encoding::encode(key);
        Self {
            key,
            key_encoding: (encoding != Encoding::Utf8).then_some(encoding),
        }
    }
}

/// A value in JSON, lossless: `"value"` is the text itself or base64, as `"encoding"` says.
#[derive(Debug, Serialize)]
pub struct ValueJson {
    value: String,
    encoding: Encoding,
}

impl ValueJson {
    pub fn new(value: &[u8]) -> Self {
        let (value, encoding) = Encoding::encode(value);
        Self { value, encoding }
    }
}

/// An item of a listing. The value is left out where only keys were asked for.
#[derive(Debug, Serialize)]
pub struct ItemJson {
    #[serde(flatten)]
    key: KeyJson,
    #[serde(flatten)]
    value: Option<ValueJson>,
    media_type: String,
    revision: u64,
}

impl ItemJson {
    pub fn new(item: &Item, keys_only: bool) -> Self {
        Self {
            key: KeyJson::new(&item.key),
            value: (!keys_only).then(|| ValueJson::new(&item.record.value)),
            media_type: media::name(&item.record.media).to_owned(),
            revision: item.record.revision.0,
        }
    }
}

/// A list in JSON of which each item is made when its turn comes, so that there is no second copy
/// of all of them.
pub struct LazyList<'a, I, T> {
    pub items: &'a [I],
    /// Is given the place of the item, too.
    pub make: &'a dyn Fn(usize, &I) -> T,
}

impl<I, T: Serialize> Serialize for LazyList<'_, I, T> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(
            self.items
                .iter()
                .enumerate()
                .map(|(place, item)| (self.make)(place, item)),
        )
    }
}

/// Ends with a newline, for those who read it in a terminal.
pub fn json(status: StatusCode, body: &impl Serialize) -> Response {
    let mut text = serde_json::to_vec(body)
        .expect("maps with text keys, numbers and strings always serialize");
    text.push(b'\n');
    let mut response = Response::new(Body::from(text));
    *response.status_mut() = status;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    response
}
