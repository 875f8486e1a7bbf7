//! Time and entropy of a simulated run: while a thread simulates, the C library's `clock_gettime`
//! and `getrandom` are answered from its seed.
//!
//! Code beneath the nodes asks both directly: the order of a `HashMap`, new ids, measurements of
//! time. The functions here take the place of the C library's for the whole binary; threads that
//! do not simulate are answered by the system.
//!
//! This is the only unsafe code of the simulator: both functions write through a pointer that their
//! caller promises to be valid, as POSIX asks of it.

use std::cell::Cell;
use std::ffi::{c_int, c_uint, c_void};
use std::time::Duration;

thread_local! {
    static IS_SIMULATED: Cell<bool> = const { Cell::new(false) };
    static ENTROPY: Cell<u64> = const { Cell::new(0) };
    static NOW_MS: Cell<u64> = const { Cell::new(0) };
}

/// Seconds of the first moment of every simulation, by the wall clock.
const START_S: u64 = 1_700_000_000;
/// Of clocks that count from somewhere.
const UP_S: u64 = 100_000;

const CLOCK_REALTIME: c_int = 0;
const CLOCK_REALTIME_COARSE: c_int = 5;

/// Has this thread's time stand at zero, and its entropy follow from `seed`, from now on.
pub fn begin(seed: u64) {
    IS_SIMULATED.set(true);
    ENTROPY.set(seed);
    NOW_MS.set(0);
}

/// Sets the time of this thread.
pub fn set_now_ms(now_ms: u64) {
    NOW_MS.set(now_ms);
}

/// Returns the time of the system, also in a thread that simulates.
pub fn real_now() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::new(
        u64::try_from(now.tv_sec).unwrap_or(0),
        u32::try_from(now.tv_nsec).unwrap_or(0),
    )
}

/// One step of SplitMix64 (Steele, Lea, Flood).
pub fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// As in `time.h`.
#[repr(C)]
pub struct TimeSpec {
    seconds: i64,
    nanoseconds: i64,
}

/// # Safety
///
/// `time` is null, or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clock: c_int, time: *mut TimeSpec) -> c_int {
    let (seconds, nanoseconds) = if IS_SIMULATED.get() {
        let now_ms = NOW_MS.get();
        let is_wall = matches!(clock, CLOCK_REALTIME | CLOCK_REALTIME_COARSE);
        let start_s = if is_wall { START_S } else { UP_S };
        (
            (start_s + now_ms / 1000) as i64,
            (now_ms % 1000 * 1_000_000) as i64,
        )
    } else {
        let clock = match clock {
            CLOCK_REALTIME | CLOCK_REALTIME_COARSE => rustix::time::ClockId::Realtime,
            _ => rustix::time::ClockId::Monotonic,
        };
        let now = rustix::time::clock_gettime(clock);
        (now.tv_sec, now.tv_nsec)
    };
    if !time.is_null() {
        let now = TimeSpec {
            seconds,
            nanoseconds,
        };
        // SAFETY: not null, and the caller promises that it may be written to.
        unsafe { time.write(now) };
    }
    0
}

/// # Safety
///
/// `bytes` may be written to for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getrandom(bytes: *mut c_void, len: usize, _flags: c_uint) -> isize {
    if bytes.is_null() || len == 0 {
        return 0;
    }
    // SAFETY: not null, and the caller promises that so many bytes may be written to; zeroed first,
    // because a slice must not have bytes that were never written.
    let bytes = unsafe {
        bytes.cast::<u8>().write_bytes(0, len);
        std::slice::from_raw_parts_mut(bytes.cast::<u8>(), len)
    };
    if IS_SIMULATED.get() {
        let mut state = ENTROPY.get();
        for part in bytes.chunks_mut(8) {
            part.copy_from_slice(&split_mix(&mut state).to_le_bytes()[..part.len()]);
        }
        ENTROPY.set(state);
        return len as isize;
    }
    match rustix::rand::getrandom(bytes, rustix::rand::GetRandomFlags::empty()) {
        Ok(len) => len as isize,
        Err(_) => -1,
    }
}
