//! Between a `Content-Type` and the media type of a value; and what JSON answers make of a value's
//! or key's bytes.
//!
//! Invariant: a value stored as [`Media::Text`] is valid UTF-8, one stored as [`Media::Json`] is
//! JSON that `serde_json` reads back. Bytes that aren't what their sender calls them keep the name,
//! as [`Media::Other`]: nothing is refused, and no reader is misled.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, header};
use serde::de::IgnoredAny;

use super::problem::{Code, Problem};
use crate::sm::kv::Media;

const TEXT: &str = "text/plain";
const OCTETS: &str = "application/octet-stream";
const JSON: &str = "application/json";
/// Sent by plain `curl -d`: it says nothing about the body.
const FORM: &str = "application/x-www-form-urlencoded";

/// Longest media type that is kept, in bytes.
const MEDIA_BYTES_MAX: usize = 255;

/// Returns the media type that a request gives its body.
pub fn of_request(headers: &HeaderMap, value: &[u8]) -> Result<Media, Problem> {
    let mut given = headers.get_all(header::CONTENT_TYPE).iter();
    let name = match (given.next(), given.next()) {
        (None, _) => return Ok(guess(value)),
        (Some(_), Some(_)) => {
            return Err(Problem::new(
                Code::InvalidHeader,
                "Content-Type is given more than once",
            ));
        }
        (Some(name), None) => name,
    };
    let name = name.to_str().map_err(|_| {
        Problem::new(
            Code::InvalidHeader,
            "Content-Type holds bytes beyond visible ASCII",
        )
    })?;
    named(name, value)
        .map_err(|reason| Problem::new(Code::InvalidHeader, format!("Content-Type {reason}")))
}

/// Returns the media type called `name`, of this value. An error is the end of a sentence that
/// begins with where the name is from.
pub fn named(name: &str, value: &[u8]) -> Result<Media, String> {
    let name = name.trim();
    if name.is_empty() || essence(name).eq_ignore_ascii_case(FORM) {
        return Ok(guess(value));
    }
    if name.len() > MEDIA_BYTES_MAX {
        return Err(format!("is longer than {MEDIA_BYTES_MAX} bytes"));
    }
    let visible = name.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    if !visible
        || !essence(name)
            .split_once('/')
            .is_some_and(|(kind, rest)| !kind.is_empty() && !rest.is_empty())
    {
        return Err("is not a media type".into());
    }
    Ok(match name {
        TEXT if std::str::from_utf8(value).is_ok() => Media::Text,
        JSON if is_json(value) => Media::Json,
        OCTETS => Media::Octets,
        other => Media::Other(other.to_owned()),
    })
}

/// Returns the media type of a value whose sender gave none.
pub fn guess(value: &[u8]) -> Media {
    if std::str::from_utf8(value).is_ok() {
        Media::Text
    } else {
        Media::Octets
    }
}

/// Returns true if `value` is one JSON text, not nested deeper than `serde_json` reads.
pub fn is_json(value: &[u8]) -> bool {
    serde_json::from_slice::<IgnoredAny>(value).is_ok()
}

/// Returns a media type without its parameters.
pub fn essence(name: &str) -> &str {
    name.split(';').next().unwrap_or(name).trim()
}

pub fn name(media: &Media) -> &str {
    match media {
        Media::Text => TEXT,
        Media::Octets => OCTETS,
        Media::Json => JSON,
        Media::Other(name) => name,
    }
}

/// Returns the `Content-Type` of a stored value. A name that another dialect stored and that fits
/// no header is shown as octets.
pub fn content_type(media: &Media) -> HeaderValue {
    match media {
        Media::Text => HeaderValue::from_static(TEXT),
        Media::Octets => HeaderValue::from_static(OCTETS),
        Media::Json => HeaderValue::from_static(JSON),
        Media::Other(name) => {
            HeaderValue::from_str(name).unwrap_or(HeaderValue::from_static(OCTETS))
        }
    }
}

/// Encoding of bytes in a JSON string: as they are if they are UTF-8, else base64 (RFC 4648,
/// section 4). Lossless either way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Encoding {
    #[default]
    Utf8,
    Base64,
}

impl Encoding {
    pub fn encode(bytes: &[u8]) -> (String, Encoding) {
        match std::str::from_utf8(bytes) {
            Ok(text) => (text.to_owned(), Encoding::Utf8),
            Err(_) => (STANDARD.encode(bytes), Encoding::Base64),
        }
    }

    pub fn decode(self, text: String) -> Result<Bytes, String> {
        match self {
            Encoding::Utf8 => Ok(Bytes::from(text)),
            Encoding::Base64 => STANDARD
                .decode(text)
                .map(Bytes::from)
                .map_err(|error| format!("is not base64: {error}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(content_type: &'static str, value: &[u8]) -> Result<Media, &'static str> {
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
        of_request(&headers, value).map_err(|problem| problem.code())
    }

    #[test]
    fn no_type_and_a_form_type_are_guessed_from_the_bytes() {
        assert_eq!(
            of_request(&HeaderMap::new(), "grüße".as_bytes()),
            Ok(Media::Text)
        );
        assert_eq!(of_request(&HeaderMap::new(), b"\xff"), Ok(Media::Octets));
        assert_eq!(
            request("application/x-www-form-urlencoded", b"a"),
            Ok(Media::Text)
        );
        assert_eq!(
            request("Application/X-WWW-Form-Urlencoded; charset=utf-8", b"\xff"),
            Ok(Media::Octets)
        );
    }

    #[test]
    fn a_type_is_kept_as_given_and_trusted_only_where_it_is_true() {
        assert_eq!(request("text/plain", b"a"), Ok(Media::Text));
        assert_eq!(
            request("text/plain", b"\xff"),
            Ok(Media::Other("text/plain".into()))
        );
        assert_eq!(
            request("application/json", b"{\"a\":1e999}"),
            Ok(Media::Json)
        );
        assert_eq!(
            request("application/json", b"{"),
            Ok(Media::Other("application/json".into()))
        );
        let deep = "[".repeat(100_000);
        assert_eq!(
            request("application/json", deep.as_bytes()),
            Ok(Media::Other("application/json".into()))
        );
        assert_eq!(
            request("image/png; x=1", b""),
            Ok(Media::Other("image/png; x=1".into()))
        );
        for bad in ["png", "/png", "image/"] {
            assert_eq!(request(bad, b""), Err("invalid_header"), "{bad}");
        }
        assert_eq!(content_type(&Media::Other("a\nb".into())), OCTETS);
    }
}
