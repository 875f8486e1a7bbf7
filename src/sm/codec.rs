//! The versioned encodings of everything that the core writes to disk or log: one format-version byte, then postcard.
//!
//! What is written once is read for ever: a new version adds an arm to the reader of its type and keeps the old one. Golden-bytes
//! tests beside each type hold its encoding.

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::ports::StoreError;

/// The format written today, by every encoding in the core.
pub const FORMAT: u8 = 1;

/// `value` behind its format byte.
pub fn encode<T: Serialize>(value: &T) -> Bytes {
    let buffer = vec![FORMAT];
    let bytes = postcard::to_extend(value, buffer).expect("encoding into memory fails for no type of the core");
    Bytes::from(bytes)
}

/// Reads what [`encode`] wrote. `what` names it in the error.
pub fn decode<T: DeserializeOwned>(bytes: &[u8], what: &'static str) -> Result<T, StoreError> {
    let undecodable = |reason: String| StoreError::Undecodable { what, reason };
    match bytes.split_first() {
        Some((&FORMAT, body)) => match postcard::take_from_bytes(body) {
            Ok((value, [])) => Ok(value),
            Ok((_, rest)) => Err(undecodable(format!("{} bytes too many", rest.len()))),
            Err(error) => Err(undecodable(error.to_string())),
        },
        Some((version, _)) => Err(undecodable(format!("format {version} is unknown to this version"))),
        None => Err(undecodable("it is empty".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_decodes_and_nothing_else_does() {
        let bytes = encode(&(7u32, "seven"));
        assert_eq!(&bytes[..], b"\x01\x07\x05seven");
        assert_eq!(decode::<(u32, String)>(&bytes, "a pair").expect("own encoding"), (7, "seven".to_owned()));
        let error = |bytes: &[u8]| decode::<(u32, String)>(bytes, "a pair").expect_err("not an encoding").to_string();
        assert!(error(b"").contains("empty"));
        assert!(error(b"\x02\x07\x05seven").contains("format 2"));
        assert!(error(b"\x01\x07\x05seve").contains("cannot decode a pair"));
        assert!(error(b"\x01\x07\x05sevens").contains("too many"));
    }
}
