//! [`ApplyProgress`]: shows when the entry that is being applied last read something of its map.

use bytes::Bytes;
use tokio::time::Instant;

use crate::sm::ports::{Direction, Items, KeyRange, Pairs, Read, StoreError, ValueStart};

/// Marks that an entry is being applied, until it is dropped. Each read of the map counts as
/// progress: on a slow disk many reads take long, and a restart would only begin with a cold cache.
pub struct ApplyProgress<'a>(&'a parking_lot::Mutex<Option<Instant>>);

impl<'a> ApplyProgress<'a> {
    /// Marks that an entry begins to be applied.
    pub fn begin(since: &'a parking_lot::Mutex<Option<Instant>>) -> Self {
        let applying = Self(since);
        applying.step();
        applying
    }

    fn step(&self) {
        *self.0.lock() = Some(Instant::now());
    }

    fn counted<'b, V: 'b>(&'b self, items: Items<'b, V>) -> Items<'b, V> {
        Box::new(items.inspect(|_| self.step()))
    }
}

/// Reads the map for an entry; each read counts as a step of applying it.
pub struct ProgressRead<'a, R> {
    pub read: &'a R,
    pub applying: &'a ApplyProgress<'a>,
}

impl<R: Read> Read for ProgressRead<'_, R> {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        let value = self.read.get(key);
        self.applying.step();
        value
    }

    fn start_of(&self, key: &[u8], bytes_max: usize) -> Result<Option<ValueStart>, StoreError> {
        let start = self.read.start_of(key, bytes_max);
        self.applying.step();
        start
    }

    fn scan<'a>(&'a self, range: &KeyRange, direction: Direction) -> Pairs<'a> {
        self.applying.counted(self.read.scan(range, direction))
    }

    fn scan_starts<'a>(
        &'a self,
        range: &KeyRange,
        direction: Direction,
        bytes_max: usize,
    ) -> Items<'a, ValueStart> {
        self.applying
            .counted(self.read.scan_starts(range, direction, bytes_max))
    }
}

impl Drop for ApplyProgress<'_> {
    fn drop(&mut self) {
        *self.0.lock() = None;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_entry_that_reads_its_map_slowly_gets_further_with_each_read() {
        let since = parking_lot::Mutex::new(None);
        let still = || since.lock().map(|since: Instant| since.elapsed());
        let map = ["a", "b"]
            .map(|key| (Bytes::from(key), Bytes::from("v")))
            .into_iter()
            .collect::<BTreeMap<_, _>>();
        let later = Duration::from_secs(50);
        let applying = ApplyProgress::begin(&since);
        let read = ProgressRead {
            read: &map,
            applying: &applying,
        };
        let all = KeyRange {
            start: Bytes::new(),
            end: None,
        };

        tokio::time::advance(later).await;
        assert_eq!(still(), Some(later));
        read.get(b"a").expect("a map in memory");
        assert_eq!(still(), Some(Duration::ZERO));
        tokio::time::advance(later).await;
        read.start_of(b"a", 1).expect("a map in memory");
        assert_eq!(still(), Some(Duration::ZERO));
        for _ in read.scan(&all, Direction::Forward) {
            assert_eq!(still(), Some(Duration::ZERO));
            tokio::time::advance(later).await;
        }
        for _ in read.scan_starts(&all, Direction::Reverse, 1) {
            assert_eq!(still(), Some(Duration::ZERO));
            tokio::time::advance(later).await;
        }
        assert_eq!(still(), Some(later));
        drop(applying);
        assert_eq!(still(), None);
    }
}
