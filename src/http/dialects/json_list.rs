//! Reads the JSON lists that the batch dialects are sent: once through, without copies, whatever is
//! nested in an element.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::error::DialectError;
use super::value::JsonText;
use crate::blocking;
use crate::budget::Share;
use crate::http::Limits;
use crate::http::body::{self, BodyBytes};

/// A body from this size on takes milliseconds to read.
const LARGE_BYTES: usize = 256 << 10;

/// Elements that [`BudgetedVec`] has room for at first.
const CAPACITY_MIN: usize = 16;

/// Two members of an object, the last of each name; all others are skipped.
#[derive(Debug, Clone, Copy)]
pub struct PairObject<'a, N> {
    pub first: Option<&'a RawValue>,
    pub second: Option<&'a RawValue>,
    names: PhantomData<N>,
}

/// The two names.
pub trait MemberNames {
    const FIRST: &'static str;
    const SECOND: &'static str;
}

/// `{"key": ..., "value": ...}`
#[derive(Debug, Clone, Copy)]
pub struct KeyValue;

impl MemberNames for KeyValue {
    const FIRST: &'static str = "key";
    const SECOND: &'static str = "value";
}

impl<'de: 'a, 'a, N: MemberNames> serde::Deserialize<'de> for PairObject<'a, N> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PairVisitor<'a, N>(PhantomData<(&'a (), N)>);

        impl<'de: 'a, 'a, N: MemberNames> Visitor<'de> for PairVisitor<'a, N> {
            type Value = PairObject<'a, N>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
                let mut object = PairObject {
                    first: None,
                    second: None,
                    names: PhantomData,
                };

                // Members that nobody looks at may be large, so they are skipped without being
                // built.
                while let Some(JsonText(name)) = map.next_key()? {
                    if name == N::FIRST {
                        object.first = Some(map.next_value()?);
                    } else if name == N::SECOND {
                        object.second = Some(map.next_value()?);
                    } else {
                        map.next_value::<IgnoredAny>()?;
                    }
                }
                Ok(object)
            }
        }

        deserializer.deserialize_map(PairVisitor(PhantomData))
    }
}

/// Hands each element of the list that `json` is to `each`, as long as that takes them.
///
/// # Errors
///
/// That of `each`; or 400 where it is not a list of such elements.
pub fn read<'a, T: serde::Deserialize<'a>>(
    json: &'a [u8],
    each: impl FnMut(T) -> Result<(), DialectError>,
) -> Result<(), DialectError> {
    // serde's errors carry text alone, so a refusal with its status goes round it.
    let mut refusal = None;
    let list = ListVisitor {
        each,
        refusal: &mut refusal,
        elements: PhantomData,
    };
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let read = list
        .deserialize(&mut deserializer)
        .and_then(|()| deserializer.end());
    let bad =
        |error: serde_json::Error| DialectError::bad_request(format!("Bad json format: {error}"));
    read.map_err(|error| refusal.unwrap_or_else(|| bad(error)))
}

struct ListVisitor<'m, T, F> {
    each: F,
    refusal: &'m mut Option<DialectError>,
    elements: PhantomData<T>,
}

impl<'de, T: serde::Deserialize<'de>, F: FnMut(T) -> Result<(), DialectError>> DeserializeSeed<'de>
    for ListVisitor<'_, T, F>
{
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de, T: serde::Deserialize<'de>, F: FnMut(T) -> Result<(), DialectError>> Visitor<'de>
    for ListVisitor<'_, T, F>
{
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<(), A::Error> {
        while let Some(element) = list.next_element()? {
            (self.each)(element).map_err(|refusal| {
                *self.refusal = Some(refusal);
                serde::de::Error::custom("refused")
            })?;
        }
        Ok(())
    }
}

/// Returns the first element of a list, whatever comes after it. None if there is none, or it is no
/// such element.
pub fn first<'a, T: serde::Deserialize<'a>>(json: &'a [u8]) -> Option<T> {
    struct FirstVisitor<'m, T>(&'m mut Option<T>);

    impl<'de, T: serde::Deserialize<'de>> Visitor<'de> for FirstVisitor<'_, T> {
        type Value = ();

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
            *self.0 = list.next_element()?;
            Ok(())
        }
    }

    let mut first = None;
    // It fails where more than one element follows: the rest is not looked at.
    let _ = serde_json::Deserializer::from_slice(json).deserialize_seq(FirstVisitor(&mut first));
    first
}

/// A list whose memory is paid for from the budget that the bodies share: small elements grow when
/// they are read.
#[derive(Debug)]
pub struct BudgetedVec<T> {
    list: Vec<T>,
    share: Share,
}

impl<T> BudgetedVec<T> {
    pub fn new(body: &BodyBytes) -> Self {
        Self {
            list: Vec::new(),
            share: body.new_share(),
        }
    }

    /// Appends an element, and charges the memory for it.
    ///
    /// # Errors
    ///
    /// 429 where the budget is spent: hence the small steps.
    pub fn push(&mut self, element: T, limits: &Limits) -> Result<(), DialectError> {
        if self.list.len() == self.list.capacity() {
            // By a quarter and not to the double: all of the capacity is charged.
            let more = (self.list.len() / 4).max(CAPACITY_MIN);
            if !self.share.grow(more * size_of::<T>()) {
                return Err(body::overloaded(limits).into());
            }
            self.list.reserve_exact(more);
        }
        self.list.push(element);
        Ok(())
    }
}

impl<T> Deref for BudgetedVec<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.list
    }
}

/// Does what takes long with a large body where it holds nobody up: threads that serve carry
/// heartbeats too.
pub async fn apart<T: Send + 'static>(
    bytes: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    if bytes < LARGE_BYTES {
        return work();
    }
    blocking::start(work)
        .await
        .unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

#[cfg(test)]
mod tests {
    use http::StatusCode;

    use super::*;

    type Pair<'a> = PairObject<'a, KeyValue>;

    fn count(json: &[u8]) -> Result<usize, u16> {
        let mut count = 0;
        let each = |_| {
            count += 1;
            if count <= 3 {
                Ok(())
            } else {
                Err(DialectError::new(StatusCode::PAYLOAD_TOO_LARGE, ""))
            }
        };
        read::<Pair<'_>>(json, each)
            .map(|()| count)
            .map_err(|refusal| refusal.status.as_u16())
    }

    #[test]
    fn a_list_of_objects_is_read_and_nothing_else() {
        assert_eq!(count(b" [ ] "), Ok(0));
        assert_eq!(
            count(br#"[{}, {"other": [{}]}, {"key": 1, "value": null}]"#),
            Ok(3)
        );
        assert_eq!(count(b"[{},{},{},{}]"), Err(413));
        let bads: [&[u8]; 10] = [
            b"",
            b"[",
            b"[{}",
            b"[{},]",
            b"[{}] x",
            b"{}",
            b"null",
            b"[1]",
            br#"[["k","v"]]"#,
            b"[{\"\xff\":1}]",
        ];
        for bad in bads {
            assert_eq!(count(bad), Err(400), "{}", bad.escape_ascii());
        }
    }

    #[test]
    fn depth_and_odd_numbers_are_no_obstacle() {
        let deep = format!(
            r#"[{{"key":{}1{},"value":1e99999,"x":{}2{}}}]"#,
            "[".repeat(500_000),
            "]".repeat(500_000),
            "[".repeat(9999),
            "]".repeat(9999)
        );
        assert_eq!(count(deep.as_bytes()), Ok(1));
        assert_eq!(count("[".repeat(1_000_000).as_bytes()), Err(400));
    }

    #[test]
    fn the_last_member_of_a_name_counts() {
        let mut seen = Vec::new();
        let json = br#"[{"key":"a","k\u0065y":"b","value":[ 1 ]}]"#;
        let see = |pair: Pair<'static>| {
            seen.push((
                pair.first.map(RawValue::get),
                pair.second.map(RawValue::get),
            ));
            Ok(())
        };
        read(json, see).expect("a list");
        assert_eq!(seen, [(Some(r#""b""#), Some("[ 1 ]"))]);
    }

    #[test]
    fn the_first_element_is_seen_whatever_comes_after() {
        for json in [
            r#"[{"key":"a"}]"#,
            r#" [ {"key":"a"} , nonsense"#,
            r#"[{"key":"a"}"#,
        ] {
            let pair: Option<Pair<'_>> = first(json.as_bytes());
            assert_eq!(
                pair.and_then(|pair| pair.first).map(RawValue::get),
                Some(r#""a""#),
                "{json}"
            );
        }
        for json in ["", "[]", "[1]", "{}", "[{", "nonsense"] {
            assert!(first::<Pair<'_>>(json.as_bytes()).is_none(), "{json}");
        }
    }
}
