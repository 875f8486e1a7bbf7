//! Keys out of paths and query strings.

use bytes::Bytes;

use crate::http::problem::{Code, Problem};
use crate::types::{KEY_BYTES_MAX, RESERVED_PREFIX, is_reserved};

/// Precedes a key in a path.
pub const PREFIX: &str = "/v1/kv/";

/// Returns the key that a raw path names: everything after [`PREFIX`], percent-decoded and
/// otherwise unchanged.
pub fn of_path(path: &str) -> Result<Bytes, Problem> {
    let rest = path.strip_prefix(PREFIX).unwrap_or_default();
    let key = unescape(rest.as_bytes(), false)
        .map_err(|reason| Problem::new(Code::InvalidKey, reason))?;
    check(&key)?;
    Ok(Bytes::from(key))
}

/// Checks that a key has a length that a store takes, and is not reserved for another dialect.
pub fn check(key: &[u8]) -> Result<(), Problem> {
    match key.len() {
        _ if is_reserved(key) => Err(Problem::new(
            Code::InvalidKey,
            format!(
                "keys that begin with {} bytes FF are reserved",
                RESERVED_PREFIX.len()
            ),
        )),
        0 => Err(Problem::new(Code::InvalidKey, "the key is empty")),
        1..=KEY_BYTES_MAX => Ok(()),
        bytes => {
            let detail =
                format!("a key is at most {KEY_BYTES_MAX} bytes, and this one has {bytes}");
            Err(Problem::new(Code::InvalidKey, detail).extension("limit_bytes", KEY_BYTES_MAX))
        }
    }
}

/// Decodes percent escapes (RFC 3986) strictly: a `%` without two hexadecimal digits is an error.
/// With `plus_is_space`, a plus sign is a space, as in forms.
pub fn unescape(text: &[u8], plus_is_space: bool) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((byte, after)) = rest.split_first() {
        let (byte, next) = match (*byte, after) {
            (b'%', [high, low, after @ ..]) => match (hex(*high), hex(*low)) {
                (Some(high), Some(low)) => (high << 4 | low, after),
                _ => return Err(bad_escape(rest)),
            },
            (b'%', _) => return Err(bad_escape(rest)),
            (b'+', after) if plus_is_space => (b' ', after),
            (byte, after) => (byte, after),
        };
        bytes.push(byte);
        rest = next;
    }
    Ok(bytes)
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit)
        .to_digit(16)
        .and_then(|value| u8::try_from(value).ok())
}

fn bad_escape(at: &[u8]) -> String {
    let text = String::from_utf8_lossy(&at[..at.len().min(3)]).into_owned();
    format!("'{text}' is not a percent escape: write a percent sign as %25")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_the_decoded_rest_of_the_path() {
        for (path, key) in [
            ("/v1/kv/a", &b"a"[..]),
            ("/v1/kv/a/b/", b"a/b/"),
            ("/v1/kv//", b"/"),
            ("/v1/kv/a%2Fb%2f", b"a/b/"),
            ("/v1/kv/../x/.", b"../x/."),
            ("/v1/kv/%00%fF+%25", b"\x00\xff+%"),
            ("/v1/kv/grüße", "grüße".as_bytes()),
        ] {
            assert_eq!(of_path(path).as_deref(), Ok(key), "{path}");
        }
        for path in [
            "/v1/kv/",
            "/v1/kv/%",
            "/v1/kv/%2",
            "/v1/kv/a%zz",
            "/v1/kv/%+1",
            "/v1/kv/%2ü",
        ] {
            assert_eq!(of_path(path).expect_err(path).code(), "invalid_key");
        }
        assert!(of_path("/v1/kv/%ff%ff%ff%ff%ff%ff%ff").is_ok());
        for rest in ["", "a", "%ff"] {
            assert_eq!(
                of_path(&format!("/v1/kv/%ff%FF%ff%ff%ff%ff%ff%ff{rest}"))
                    .expect_err(rest)
                    .code(),
                "invalid_key"
            );
        }
        assert_eq!(
            of_path(&format!("{PREFIX}{}", "%41".repeat(KEY_BYTES_MAX))).map(|key| key.len()),
            Ok(KEY_BYTES_MAX)
        );
        assert!(of_path(&format!("{PREFIX}{}", "a".repeat(KEY_BYTES_MAX + 1))).is_err());
    }
}
