//! What the core asks of the world: reading a map ([`Read`]) and handing back what to change in it
//! ([`WriteBatch`]).
//!
//! A map is an ordered set of byte keys with byte values. The storage layer implements [`Read`]
//! over its tables; [`Overlay`] shows a map with a batch over it, so that an entry sees the effects
//! of the earlier ones of its batch.

use std::collections::BTreeMap;
use std::ops::Bound;

use bytes::Bytes;

use super::level::TooOld;

/// The reason why a map could not be read or an entry could not be applied. Never a rejection: it
/// stops the group.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{context}: {source}")]
    Io {
        context: String,
        #[source]
        source: std::io::Error,
    },
    #[error("damaged data: {0}")]
    Damaged(String),
    /// Of a level that this program does not know.
    #[error("cannot read {what}: {too_old}")]
    TooOld { what: &'static str, too_old: TooOld },
    /// An entry or value written by a newer version of the program, or not by this program.
    #[error("cannot decode {what}: {reason}")]
    Undecodable { what: &'static str, reason: String },
}

/// A half-open range of keys: `start` is in it, `end` (none: no upper bound) is not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRange {
    pub start: Bytes,
    pub end: Option<Bytes>,
}

impl KeyRange {
    pub fn all() -> Self {
        Self {
            start: Bytes::new(),
            end: None,
        }
    }

    /// Every key that begins with `prefix`.
    pub fn prefix(prefix: &[u8]) -> Self {
        Self {
            start: Bytes::copy_from_slice(prefix),
            end: after_prefix(prefix),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.end.as_ref().is_some_and(|end| *end <= self.start)
    }

    pub fn bounds(&self) -> (Bound<&[u8]>, Bound<&[u8]>) {
        let end = self
            .end
            .as_deref()
            .map_or(Bound::Unbounded, Bound::Excluded);
        (Bound::Included(&self.start), end)
    }
}

/// The least key that is greater than every key with this prefix; none if there is no such key.
pub fn after_prefix(prefix: &[u8]) -> Option<Bytes> {
    let last = prefix.iter().rposition(|byte| *byte != u8::MAX)?;
    let mut end = prefix[..=last].to_vec();
    end[last] += 1;
    Some(Bytes::from(end))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    Forward,
    Reverse,
}

/// Keys of a map in order (or its reverse), each with what was asked of its value.
pub type Items<'a, V> = Box<dyn Iterator<Item = Result<(Bytes, V), StoreError>> + 'a>;

/// Pairs of a map.
pub type Pairs<'a> = Items<'a, Bytes>;

/// The beginning of a value, and the length of all of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValueStart {
    pub start: Bytes,
    pub len: usize,
}

impl ValueStart {
    /// Returns the first `bytes_max` bytes of `value`, and its length.
    pub fn from_value(value: &Bytes, bytes_max: usize) -> Self {
        Self {
            start: value.slice(..value.len().min(bytes_max)),
            len: value.len(),
        }
    }

    /// Returns the value, if all of it is here.
    pub fn whole(&self) -> Option<&Bytes> {
        (self.start.len() == self.len).then_some(&self.start)
    }
}

/// An ordered map of bytes at one point in time.
///
/// A value may be large, and many of them larger than memory: whoever does not need a value asks
/// for its start and length alone, which costs no more than that.
pub trait Read {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError>;

    /// Returns the first `bytes_max` bytes of a value, and its length.
    fn start_of(&self, key: &[u8], bytes_max: usize) -> Result<Option<ValueStart>, StoreError>;

    /// The pairs of `range`, lazily: the caller stops when it has enough.
    fn scan<'a>(&'a self, range: &KeyRange, direction: Direction) -> Pairs<'a>;

    /// As [`Read::scan`], with no more of each value than [`Read::start_of`] gives.
    fn scan_starts<'a>(
        &'a self,
        range: &KeyRange,
        direction: Direction,
        bytes_max: usize,
    ) -> Items<'a, ValueStart>;
}

/// Changes to a map, applied all at once. At most one change per key: the last wins.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WriteBatch {
    changes: BTreeMap<Bytes, Option<Bytes>>,
    bytes: usize,
}

impl WriteBatch {
    pub fn put(&mut self, key: impl Into<Bytes>, value: impl Into<Bytes>) {
        self.set(key.into(), Some(value.into()));
    }

    pub fn delete(&mut self, key: impl Into<Bytes>) {
        self.set(key.into(), None);
    }

    fn set(&mut self, key: Bytes, value: Option<Bytes>) {
        let key_bytes = key.len();
        let value_bytes = value.as_ref().map_or(0, Bytes::len);
        match self.changes.insert(key, value) {
            None => self.bytes += key_bytes + value_bytes,
            Some(old) => self.bytes = self.bytes + value_bytes - old.map_or(0, |v| v.len()),
        }
    }

    /// Returns what this batch does to `key`: nothing (`None`), a deletion (`Some(None)`) or a
    /// value.
    pub fn get(&self, key: &[u8]) -> Option<&Option<Bytes>> {
        self.changes.get(key)
    }

    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    pub fn len(&self) -> usize {
        self.changes.len()
    }

    /// Bytes of all keys and values in it.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Puts every change of `later` over this one.
    pub fn merge(&mut self, later: WriteBatch) {
        // The first write of an entry, and mostly the only one: nothing is copied.
        if self.is_empty() {
            *self = later;
            return;
        }
        for (key, value) in later.changes {
            self.set(key, value);
        }
    }

    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (&Bytes, &Option<Bytes>)> {
        self.changes.iter()
    }

    pub fn range(
        &self,
        range: &KeyRange,
    ) -> std::collections::btree_map::Range<'_, Bytes, Option<Bytes>> {
        self.changes.range::<[u8], _>(range.bounds())
    }
}

impl IntoIterator for WriteBatch {
    type Item = (Bytes, Option<Bytes>);
    type IntoIter = std::collections::btree_map::IntoIter<Bytes, Option<Bytes>>;

    fn into_iter(self) -> Self::IntoIter {
        self.changes.into_iter()
    }
}

/// A map as it will be once `batch` is applied.
pub struct Overlay<'a, R> {
    pub base: &'a R,
    pub batch: &'a WriteBatch,
}

impl<R: Read> Overlay<'_, R> {
    /// Lays the changes in `range` over what is below them. `seen` makes of a value of the batch
    /// what the caller is to see of it.
    fn layered<'a, V: 'a>(
        &'a self,
        range: &KeyRange,
        direction: Direction,
        seen: impl Fn(&Bytes) -> V + 'a,
        below: impl FnOnce(&'a R) -> Items<'a, V>,
    ) -> Items<'a, V> {
        // A `BTreeMap` panics when it is asked for a range that ends before it begins.
        if range.is_empty() {
            return Box::new(std::iter::empty());
        }
        let changes = self
            .batch
            .range(range)
            .map(move |(key, value)| (key.clone(), value.as_ref().map(&seen)));
        let changes: Changes<'a, V> = match direction {
            Direction::Forward => Box::new(changes),
            Direction::Reverse => Box::new(changes.rev()),
        };
        Box::new(Layered::new(changes, below(self.base), direction))
    }
}

impl<R: Read> Read for Overlay<'_, R> {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        match self.batch.get(key) {
            Some(change) => Ok(change.clone()),
            None => self.base.get(key),
        }
    }

    fn start_of(&self, key: &[u8], bytes_max: usize) -> Result<Option<ValueStart>, StoreError> {
        match self.batch.get(key) {
            Some(change) => Ok(change
                .as_ref()
                .map(|value| ValueStart::from_value(value, bytes_max))),
            None => self.base.start_of(key, bytes_max),
        }
    }

    fn scan<'a>(&'a self, range: &KeyRange, direction: Direction) -> Pairs<'a> {
        self.layered(range, direction, Bytes::clone, |base| {
            base.scan(range, direction)
        })
    }

    fn scan_starts<'a>(
        &'a self,
        range: &KeyRange,
        direction: Direction,
        bytes_max: usize,
    ) -> Items<'a, ValueStart> {
        let start = move |value: &Bytes| ValueStart::from_value(value, bytes_max);
        self.layered(range, direction, start, |base| {
            base.scan_starts(range, direction, bytes_max)
        })
    }
}

/// Changes, as far as their values are looked at.
pub type Changes<'a, V = Bytes> = Box<dyn Iterator<Item = (Bytes, Option<V>)> + 'a>;

/// Merges changes over the pairs below them; both in the same order. A deletion hides the pair
/// below.
pub struct Layered<'a, V = Bytes> {
    above: std::iter::Peekable<Changes<'a, V>>,
    below: std::iter::Peekable<Items<'a, V>>,
    direction: Direction,
}

impl<'a, V> Layered<'a, V> {
    pub fn new(above: Changes<'a, V>, below: Items<'a, V>, direction: Direction) -> Self {
        Self {
            above: above.peekable(),
            below: below.peekable(),
            direction,
        }
    }
}

impl<V> Iterator for Layered<'_, V> {
    type Item = Result<(Bytes, V), StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let order = match (self.above.peek(), self.below.peek()) {
                // An error below goes out at once: nothing can be merged with what was not read.
                (None, _) | (Some(_), Some(Err(_))) => return self.below.next(),
                (Some(_), None) => std::cmp::Ordering::Less,
                (Some((above, _)), Some(Ok((below, _)))) => match self.direction {
                    Direction::Forward => above.cmp(below),
                    Direction::Reverse => below.cmp(above),
                },
            };
            if order == std::cmp::Ordering::Greater {
                return self.below.next();
            }
            if order == std::cmp::Ordering::Equal {
                self.below.next();
            }

            // A deletion has hidden its pair, and is none itself: then the next ones are looked at.
            if let Some((key, Some(value))) = self.above.next() {
                return Some(Ok((key, value)));
            }
        }
    }
}

/// A map in memory: for tests of the core and as the base of in-memory stores.
impl Read for BTreeMap<Bytes, Bytes> {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        Ok(BTreeMap::get(self, key).cloned())
    }

    fn start_of(&self, key: &[u8], bytes_max: usize) -> Result<Option<ValueStart>, StoreError> {
        Ok(BTreeMap::get(self, key).map(|value| ValueStart::from_value(value, bytes_max)))
    }

    fn scan<'a>(&'a self, range: &KeyRange, direction: Direction) -> Pairs<'a> {
        if range.is_empty() {
            return Box::new(std::iter::empty());
        }
        let pairs = self
            .range::<[u8], _>(range.bounds())
            .map(|(key, value)| Ok((key.clone(), value.clone())));
        match direction {
            Direction::Forward => Box::new(pairs),
            Direction::Reverse => Box::new(pairs.rev()),
        }
    }

    fn scan_starts<'a>(
        &'a self,
        range: &KeyRange,
        direction: Direction,
        bytes_max: usize,
    ) -> Items<'a, ValueStart> {
        starts(self.scan(range, direction), bytes_max)
    }
}

/// Returns what [`Read::scan_starts`] gives, of pairs that are in memory anyway.
pub fn starts(pairs: Pairs<'_>, bytes_max: usize) -> Items<'_, ValueStart> {
    Box::new(
        pairs.map(move |pair| {
            pair.map(|(key, value)| (key, ValueStart::from_value(&value, bytes_max)))
        }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&'static str, &'static str)]) -> BTreeMap<Bytes, Bytes> {
        pairs
            .iter()
            .map(|(k, v)| {
                (
                    Bytes::from_static(k.as_bytes()),
                    Bytes::from_static(v.as_bytes()),
                )
            })
            .collect()
    }

    fn keys(read: &impl Read, range: &KeyRange, direction: Direction) -> Vec<String> {
        let pairs = read
            .scan(range, direction)
            .map(|pair| pair.expect("a readable pair"));
        pairs
            .map(|(key, value)| format!("{}={}", key.escape_ascii(), value.escape_ascii()))
            .collect()
    }

    #[test]
    fn an_overlay_shows_the_batch_over_the_map() {
        let base = map(&[("a", "1"), ("b", "1"), ("c", "1")]);
        let mut batch = WriteBatch::default();
        batch.put("b", "2");
        batch.delete("c");
        batch.put("d", "2");
        batch.delete("x");
        let overlay = Overlay {
            base: &base,
            batch: &batch,
        };
        assert_eq!(
            keys(&overlay, &KeyRange::all(), Direction::Forward),
            ["a=1", "b=2", "d=2"]
        );
        assert_eq!(
            keys(&overlay, &KeyRange::all(), Direction::Reverse),
            ["d=2", "b=2", "a=1"]
        );
        assert_eq!(overlay.get(b"c").expect("readable"), None);
        let range = KeyRange {
            start: "b".into(),
            end: Some("d".into()),
        };
        assert_eq!(keys(&overlay, &range, Direction::Forward), ["b=2"]);
        let nothing = KeyRange {
            start: "d".into(),
            end: Some("b".into()),
        };
        assert!(keys(&overlay, &nothing, Direction::Forward).is_empty());
    }

    #[test]
    fn starts_are_those_of_the_values_that_a_scan_gives() {
        let base = map(&[("a", ""), ("b", "below"), ("c", "gone")]);
        let mut batch = WriteBatch::default();
        batch.put("b", "above");
        batch.delete("c");
        let overlay = Overlay {
            base: &base,
            batch: &batch,
        };

        for direction in [Direction::Forward, Direction::Reverse] {
            for bytes_max in [0, 2, 5, 9] {
                let pairs = overlay
                    .scan(&KeyRange::all(), direction)
                    .map(|pair| pair.expect("readable"));
                let cut: Vec<_> = pairs
                    .map(|(key, value)| (key, ValueStart::from_value(&value, bytes_max)))
                    .collect();
                let starts: Result<Vec<_>, _> = overlay
                    .scan_starts(&KeyRange::all(), direction, bytes_max)
                    .collect();
                assert_eq!(starts.expect("readable"), cut);
                for (key, start) in cut {
                    assert_eq!(
                        overlay.start_of(&key, bytes_max).expect("readable"),
                        Some(start)
                    );
                }
            }
        }
        assert_eq!(overlay.start_of(b"c", 9).expect("readable"), None);
        let whole = ValueStart::from_value(&Bytes::from_static(b"above"), 5);
        assert_eq!(
            (whole.whole().map(|bytes| &bytes[..]), whole.len),
            (Some(&b"above"[..]), 5)
        );
        assert_eq!(
            ValueStart::from_value(&Bytes::from_static(b"above"), 4).whole(),
            None
        );
    }

    #[test]
    fn a_batch_counts_its_bytes_and_keeps_the_last_change() {
        let mut batch = WriteBatch::default();
        batch.put("key", "value");
        batch.put("key", "v");
        assert_eq!((batch.len(), batch.bytes()), (1, 4));
        batch.delete("key");
        assert_eq!((batch.len(), batch.bytes()), (1, 3));
        assert_eq!(batch.get(b"key"), Some(&None));
    }

    #[test]
    fn the_end_of_a_prefix_skips_trailing_0xff() {
        assert_eq!(after_prefix(b"a").as_deref(), Some(&b"b"[..]));
        assert_eq!(after_prefix(b"a\xff").as_deref(), Some(&b"b"[..]));
        assert_eq!(after_prefix(b"\xff"), None);
        assert_eq!(after_prefix(b""), None);
    }
}
