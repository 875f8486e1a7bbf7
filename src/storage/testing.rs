//! Bytes as text, for tests that hold what is on disk against what was written there once.

/// Returns two hexadecimal digits for every byte.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Reads what [`hex`] made.
///
/// # Panics
///
/// If it is something else.
pub fn unhex(text: &str) -> Vec<u8> {
    let digits = |at: usize| text.get(at..at + 2).expect("two digits for every byte");
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(digits(at), 16).expect("hexadecimal digits"))
        .collect()
}
