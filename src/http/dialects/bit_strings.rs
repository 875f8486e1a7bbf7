//! The `binary` keys and values of the encoded batch's dialect: strings of the characters 0 and 1.
//!
//! A value is stored as those characters, under a media type of its own, so its length is exact to
//! the bit and other dialects show it as the text that was sent. A key is stored behind
//! [`RESERVED_PREFIX`], packed, with a one bit after its last and zeros to the full byte: no other
//! dialect can name it, and it is no longer than the text was.

use bytes::Bytes;

use crate::sm::kv::Media;
use crate::types::{KEY_BYTES_MAX, RESERVED_PREFIX};

const MEDIA: &str = "application/vnd.quorate.bits";

/// Returns the media type of a stored bit string.
pub fn media() -> Media {
    Media::Other(MEDIA.to_owned())
}

/// Returns true if a stored value is a bit string.
pub fn is_stored_as_bits(media: &Media, text: &str) -> bool {
    matches!(media, Media::Other(name) if name == MEDIA) && is_bit_string(text)
}

/// Returns true if `text` is a bit string.
pub fn is_bit_string(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b'0' | b'1'))
}

/// Returns what the `binary` key with this data is stored under. None if it is empty, too long, or
/// no bit string.
pub fn key(data: &str) -> Option<Bytes> {
    if !(1..=KEY_BYTES_MAX).contains(&data.len()) || !is_bit_string(data) {
        return None;
    }
    let marked: Vec<u8> = data.bytes().chain([b'1']).collect();
    let pack = |bits: &[u8]| {
        bits.iter()
            .enumerate()
            .fold(0, |byte, (at, bit)| byte | (bit - b'0') << (7 - at))
    };
    Some(
        RESERVED_PREFIX
            .into_iter()
            .chain(marked.chunks(8).map(pack))
            .collect(),
    )
}

/// Returns the data of the `binary` key that is stored under `key`. None if that is another kind of
/// key.
pub fn data(key: &[u8]) -> Option<String> {
    let packed = key.strip_prefix(&RESERVED_PREFIX)?;
    let mut data = to_text(packed);
    data.truncate(data.rfind('1')?);
    Some(data)
}

/// Returns the bits of `bytes`, 8 characters each.
pub fn to_text(bytes: &[u8]) -> String {
    bytes
        .iter()
        .flat_map(|byte| {
            (0..8)
                .rev()
                .map(move |bit| if byte >> bit & 1 == 1 { '1' } else { '0' })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_keep_every_bit_and_their_length() {
        let long = "10".repeat(KEY_BYTES_MAX / 2);
        let all = [
            "0",
            "1",
            "00",
            "01",
            "0000000",
            "00000000",
            "000000000",
            "1111111",
            "11111111",
            "10000000",
            long.as_str(),
        ];
        let keys: Vec<Bytes> = all.iter().map(|data| key(data).expect("a key")).collect();
        for (bits, key) in all.iter().zip(&keys) {
            assert_eq!(data(key).as_deref(), Some(*bits));
            assert!(key.starts_with(&RESERVED_PREFIX) && key.len() <= KEY_BYTES_MAX);
            assert_eq!(
                keys.iter().filter(|other| *other == key).count(),
                1,
                "{bits} is alone"
            );
        }
        for bad in ["", "2", "01 ", &"0".repeat(KEY_BYTES_MAX + 1)] {
            assert_eq!(key(bad), None);
        }
        assert_eq!(data(b"key"), None);
        assert_eq!(data(&RESERVED_PREFIX), None);
    }

    #[test]
    fn bytes_are_spelt_from_the_highest_bit() {
        assert_eq!(to_text(&[0x00, 0xff, 0x81]), "000000001111111110000001");
    }
}
