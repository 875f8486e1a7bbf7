//! [`Edit`]: a change of some bytes, as damage, a cut or a forger makes them.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

/// Numbers at which parsers go wrong.
const NUMBERS: [u64; 10] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0x7fff_ffff,
    0xffff_ffff,
    u64::MAX / 2,
    u64::MAX - 1,
    u64::MAX,
];

/// A change of some bytes.
#[derive(Debug, Clone)]
pub enum Edit {
    Flip(Index, u8),
    Set(Index, u8),
    /// Leaves only what is before.
    Cut(Index),
    /// Takes some out.
    Remove(Index, usize),
    Insert(Index, Vec<u8>),
    /// Repeats some of what is there.
    Repeat(Index, usize),
    /// Writes one of [`NUMBERS`] over what is there, in so many bytes.
    Number(Index, usize, usize, bool),
    /// As before, in place of one byte and as postcard writes numbers.
    Varint(Index, usize),
}

/// Returns lists of edits, most of them short.
pub fn edits() -> impl Strategy<Value = Vec<Edit>> {
    let edit = prop_oneof![
        (any::<Index>(), 0..8_u8).prop_map(|(at, bit)| Edit::Flip(at, bit)),
        (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Edit::Set(at, byte)),
        any::<Index>().prop_map(Edit::Cut),
        (any::<Index>(), 1..16_usize).prop_map(|(at, len)| Edit::Remove(at, len)),
        (any::<Index>(), vec(any::<u8>(), 1..24)).prop_map(|(at, new)| Edit::Insert(at, new)),
        (any::<Index>(), 1..64_usize).prop_map(|(at, len)| Edit::Repeat(at, len)),
        (any::<Index>(), 0..NUMBERS.len(), 1..=8_usize, any::<bool>())
            .prop_map(|(at, number, len, is_big)| Edit::Number(at, number, len, is_big)),
        (any::<Index>(), 0..NUMBERS.len()).prop_map(|(at, number)| Edit::Varint(at, number)),
    ];
    vec(edit, 0..6)
}

impl Edit {
    /// Does it to `bytes`.
    pub fn apply(&self, bytes: &mut Vec<u8>) {
        let len = bytes.len();
        let place = |at: &Index| at.index(len + 1);
        match self {
            Edit::Flip(at, bit) if len > 0 => bytes[at.index(len)] ^= 1 << bit,
            Edit::Set(at, byte) if len > 0 => bytes[at.index(len)] = *byte,
            Edit::Flip(..) | Edit::Set(..) => {}
            Edit::Cut(at) => bytes.truncate(place(at)),
            Edit::Remove(at, count) => {
                let at = place(at);
                bytes.drain(at..(at + count).min(len));
            }
            Edit::Insert(at, new) => insert(bytes, place(at), new),
            Edit::Repeat(at, count) => {
                let at = place(at);
                let part = bytes[at..(at + count).min(len)].to_vec();
                insert(bytes, at, &part);
            }
            Edit::Number(at, number, width, is_big) => {
                let (at, number) = (place(at), NUMBERS[*number]);
                let number = match is_big {
                    true => number.to_be_bytes()[8 - width..].to_vec(),
                    false => number.to_le_bytes()[..*width].to_vec(),
                };
                bytes.splice(at..(at + width).min(len), number);
            }
            Edit::Varint(at, number) => {
                let (at, mut number, mut encoded) = (place(at), NUMBERS[*number], Vec::new());
                while number >= 0x80 {
                    encoded.push(number as u8 | 0x80);
                    number >>= 7;
                }
                encoded.push(number as u8);
                bytes.splice(at..(at + 1).min(len), encoded);
            }
        }
    }
}

fn insert(bytes: &mut Vec<u8>, at: usize, new: &[u8]) {
    bytes.splice(at..at, new.iter().copied());
}
