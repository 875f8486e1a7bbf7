//! [`CountingAllocator`]: the system's allocator, which counts for each thread how many bytes it
//! holds.
//!
//! The only unsafe code of the tests: it passes on what its callers promise, unchanged.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    /// Bytes that this thread has allocated and not freed. Below zero where it frees what others
    /// have allocated.
    static HELD: Cell<i64> = const { Cell::new(0) };
    /// The most that they were since [`peak_of`] began.
    static PEAK: Cell<i64> = const { Cell::new(0) };
}

/// Counts what each thread allocates.
pub struct CountingAllocator;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

fn count(bytes: i64) {
    // A thread that ends frees after its counters are gone.
    let _ = HELD.try_with(|held| {
        held.set(held.get() + bytes);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(held.get())));
    });
}

// SAFETY: every call is passed on as it is to the system's allocator.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: the caller promises what `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as i64));
        // SAFETY: as above; the pointer is one that `System` gave.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        count(bytes as i64 - layout.size() as i64);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, bytes) }
    }
}

/// Returns the most bytes that this thread held while it did `work`, beyond what it held before.
pub fn peak_of(work: impl FnOnce()) -> usize {
    let before = HELD.get();
    PEAK.set(before);
    work();
    usize::try_from(PEAK.get() - before).unwrap_or(0)
}

#[test]
fn the_peak_is_what_was_held_at_once() {
    let peak = peak_of(|| {
        for _ in 0..10 {
            std::hint::black_box(vec![0_u8; 1 << 20]);
        }
    });
    assert!((1 << 20..2 << 20).contains(&peak), "{peak} bytes");
}
