//! Prints a JSON value as Python's `print(json.loads(text))` does.
//!
//! Nothing here recurses, and each step takes time in proportion to the text: a value may be nested
//! as deeply as its length allows, and may name a member as often as it likes.

use std::collections::HashMap;
use std::fmt::Write;

use serde::de::IgnoredAny;
use unicode_properties::{GeneralCategory, GeneralCategoryGroup, UnicodeGeneralCategory};

/// Returns what Python prints of a JSON text. None if it is not JSON.
pub fn print(json: &str) -> Option<String> {
    // All that follows relies on the text being valid JSON.
    serde_json::from_str::<IgnoredAny>(json).ok()?;
    let json = json.trim_ascii();
    if json.starts_with('"') {
        let text = code_points(json)
            .map(|point| char::from_u32(point).unwrap_or(char::REPLACEMENT_CHARACTER));
        return Some(text.collect());
    }
    Some(
        Printer {
            json,
            tape: tape(json),
            out: String::with_capacity(json.len()),
        }
        .run(),
    )
}

/// Returns the list of these texts, as Python prints it.
pub fn print_list<'a>(texts: impl IntoIterator<Item = &'a str>) -> String {
    let mut out = String::from("[");
    for (at, text) in texts.into_iter().enumerate() {
        out.push_str(if at > 0 { ", " } else { "" });
        push_repr(&mut out, || text.chars().map(u32::from));
    }
    out.push(']');
    out
}

/// Returns what `str.isalnum` does: true for one or more letters and digits of any script.
pub fn is_alphanumeric(text: &str) -> bool {
    let counts = |c: char| {
        matches!(
            c.general_category_group(),
            GeneralCategoryGroup::Letter | GeneralCategoryGroup::Number
        )
    };
    !text.is_empty() && text.chars().all(counts)
}

/// A value in a JSON text.
#[derive(Debug, Clone, Copy)]
struct Token {
    /// Its offset in the text; its first byte tells its kind.
    at: usize,
    /// The token after it and all that it contains.
    next: usize,
}

/// Returns the values of a valid JSON text, members' names among them, in the order of the text.
fn tape(json: &str) -> Vec<Token> {
    let bytes = json.as_bytes();
    let (mut tape, mut open) = (Vec::<Token>::new(), Vec::new());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let next = tape.len() + 1;
        match byte {
            b' ' | b'\t' | b'\n' | b'\r' | b',' | b':' => at += 1,
            b'{' | b'[' => {
                open.push(tape.len());
                tape.push(Token { at, next });
                at += 1;
            }
            // Known only now: with it a container is skipped without looking at what is in it.
            b'}' | b']' => {
                let end = tape.len();
                if let Some(container) = open.pop().and_then(|index: usize| tape.get_mut(index)) {
                    container.next = end;
                }
                at += 1;
            }
            _ => {
                tape.push(Token { at, next });
                at += scalar(&json[at..]).len();
            }
        }
    }
    tape
}

/// Returns the string, number or word at the beginning of a text.
fn scalar(text: &str) -> &str {
    let bytes = text.as_bytes();
    let mut end = 1;
    if bytes.first() == Some(&b'"') {
        while bytes.get(end).is_some_and(|byte| *byte != b'"') {
            end += if bytes[end] == b'\\' { 2 } else { 1 };
        }
        end += 1;
    } else {
        while bytes.get(end).is_some_and(|byte| {
            !matches!(
                byte,
                b' ' | b'\t' | b'\n' | b'\r' | b',' | b':' | b']' | b'}'
            )
        }) {
            end += 1;
        }
    }
    text.get(..end).unwrap_or(text)
}

/// The rest of a container that is being printed.
enum Frame {
    List {
        next: usize,
        end: usize,
        is_first: bool,
    },
    Object {
        members: std::vec::IntoIter<ObjectMember>,
        is_first: bool,
    },
}

/// A name and the value that counts, by their tokens.
#[derive(Debug, Clone, Copy)]
struct ObjectMember {
    name: usize,
    value: usize,
}

struct Printer<'a> {
    json: &'a str,
    tape: Vec<Token>,
    out: String,
}

impl Printer<'_> {
    fn run(mut self) -> String {
        let mut frames = Vec::new();
        frames.extend(self.begin(0));
        while let Some(frame) = frames.last_mut() {
            match self.step(frame) {
                Some(value) => frames.extend(self.begin(value)),
                None => drop(frames.pop()),
            }
        }
        self.out
    }

    /// Prints a scalar, or the opening of a container, whose frame it returns.
    fn begin(&mut self, index: usize) -> Option<Frame> {
        let token = *self.tape.get(index)?;
        match self.json.as_bytes().get(token.at)? {
            b'[' => {
                self.out.push('[');
                Some(Frame::List {
                    next: index + 1,
                    end: token.next,
                    is_first: true,
                })
            }
            b'{' => {
                self.out.push('{');
                Some(Frame::Object {
                    members: self.members(index, token.next).into_iter(),
                    is_first: true,
                })
            }
            b'"' => {
                let literal = scalar(&self.json[token.at..]);
                push_repr(&mut self.out, || code_points(literal));
                None
            }
            _ => {
                push_word(&mut self.out, scalar(&self.json[token.at..]));
                None
            }
        }
    }

    /// Prints what comes before the next value of a container, and returns that; none: it printed
    /// the closing.
    fn step(&mut self, frame: &mut Frame) -> Option<usize> {
        match frame {
            Frame::List {
                next,
                end,
                is_first,
            } if *next < *end => {
                self.out
                    .push_str(if std::mem::take(is_first) { "" } else { ", " });
                let value = *next;
                *next = self.tape[value].next;
                Some(value)
            }
            Frame::List { .. } => {
                self.out.push(']');
                None
            }
            Frame::Object { members, is_first } => match members.next() {
                Some(member) => {
                    self.out
                        .push_str(if std::mem::take(is_first) { "" } else { ", " });
                    self.begin(member.name);
                    self.out.push_str(": ");
                    Some(member.value)
                }
                None => {
                    self.out.push('}');
                    None
                }
            },
        }
    }

    /// The members of the object at `index`: of those with one name the last value, at the place of
    /// the first.
    fn members(&self, index: usize, end: usize) -> Vec<ObjectMember> {
        let mut places: HashMap<Vec<u32>, usize> = HashMap::new();
        let mut members: Vec<ObjectMember> = Vec::new();
        let mut name = index + 1;
        while name + 1 < end {
            let value = name + 1;
            let spelt: Vec<u32> = code_points(scalar(&self.json[self.tape[name].at..])).collect();
            match places.get(&spelt) {
                Some(place) => members[*place].value = value,
                None => {
                    places.insert(spelt, members.len());
                    members.push(ObjectMember { name, value });
                }
            }
            name = self.tape[value].next;
        }
        members
    }
}

/// The code points that a JSON string literal stands for. Surrogates without their other half are
/// kept, as Python does.
fn code_points(literal: &str) -> impl Iterator<Item = u32> {
    let inner = literal
        .strip_prefix('"')
        .and_then(|rest| rest.strip_suffix('"'))
        .unwrap_or(literal);
    let mut chars = inner.chars();
    std::iter::from_fn(move || match chars.next()? {
        '\\' => Some(match chars.next()? {
            'n' => u32::from('\n'),
            'r' => u32::from('\r'),
            't' => u32::from('\t'),
            'b' => 8,
            'f' => 12,
            'u' => {
                let unit = take_unit(&mut chars)?;
                let mut ahead = chars.clone();
                match (unit, ahead.next(), ahead.next()) {
                    // Beyond the basic plane JSON spells a character as two units. Looked at ahead,
                    // because the second escape may be no such half.
                    (0xD800..0xDC00, Some('\\'), Some('u')) => match take_unit(&mut ahead) {
                        Some(low @ 0xDC00..0xE000) => {
                            chars = ahead;
                            0x10000 + ((unit - 0xD800) << 10) + (low - 0xDC00)
                        }
                        _ => unit,
                    },
                    _ => unit,
                }
            }
            itself => u32::from(itself),
        }),
        plain => Some(u32::from(plain)),
    })
}

/// Reads four hexadecimal digits.
fn take_unit(chars: &mut std::str::Chars<'_>) -> Option<u32> {
    (0..4).try_fold(0, |unit, _| Some(unit << 4 | chars.next()?.to_digit(16)?))
}

/// `repr` of a string: in double quotes if it holds a single one and no double one, with what does
/// not print escaped.
fn push_repr<I: Iterator<Item = u32>>(out: &mut String, points: impl Fn() -> I) {
    let holds = |quote: char| points().any(|point| point == u32::from(quote));
    let quote = if holds('\'') && !holds('"') {
        '"'
    } else {
        '\''
    };
    out.push(quote);
    for point in points() {
        push_point(out, point, quote);
    }
    out.push(quote);
}

fn push_point(out: &mut String, point: u32, quote: char) {
    match char::from_u32(point) {
        Some('\n') => out.push_str("\\n"),
        Some('\r') => out.push_str("\\r"),
        Some('\t') => out.push_str("\\t"),
        Some(c) if c == '\\' || c == quote => out.extend(['\\', c]),
        Some(c) if is_printable(c) => out.push(c),
        _ => {
            let escaped = match point {
                0..=0xFF => write!(out, "\\x{point:02x}"),
                0x100..=0xFFFF => write!(out, "\\u{point:04x}"),
                _ => write!(out, "\\U{point:08x}"),
            };
            escaped.expect("writing to a string does not fail");
        }
    }
}

/// Returns what `str.isprintable` does of one character.
fn is_printable(c: char) -> bool {
    match c.general_category() {
        GeneralCategory::Control
        | GeneralCategory::Format
        | GeneralCategory::Surrogate
        | GeneralCategory::PrivateUse
        | GeneralCategory::Unassigned
        | GeneralCategory::LineSeparator
        | GeneralCategory::ParagraphSeparator => false,
        GeneralCategory::SpaceSeparator => c == ' ',
        _ => true,
    }
}

fn push_word(out: &mut String, word: &str) {
    match word {
        "null" => out.push_str("None"),
        "true" => out.push_str("True"),
        "false" => out.push_str("False"),
        "-0" => out.push('0'),
        number if number.contains(['.', 'e', 'E']) => push_float(out, number),
        integer => out.push_str(integer),
    }
}

/// The shortest digits that give the same number back. Rust's own form has the same bounds between
/// fixed and scientific notation, and differs in the exponent, which Python writes with a sign and
/// two digits at least.
fn push_float(out: &mut String, number: &str) {
    let Ok(float) = number.parse::<f64>() else {
        return out.push_str(number);
    };
    let text = format!("{float:?}");
    match text.split_once('e') {
        None => out.push_str(&text),
        Some((digits, exponent)) => {
            let (sign, exponent) = exponent
                .strip_prefix('-')
                .map_or(('+', exponent), |exponent| ('-', exponent));
            write!(out, "{digits}e{sign}{exponent:0>2}")
                .expect("writing to a string does not fail");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_print_as_python_prints_them() {
        for (json, printed) in [
            ("null", "None"),
            (" [true, false,null ] ", "[True, False, None]"),
            (r#"{"hello": "world"}"#, "{'hello': 'world'}"),
            (
                r#"{"a":[],"b":{},"c":[{"d":[1]},[2]]}"#,
                "{'a': [], 'b': {}, 'c': [{'d': [1]}, [2]]}",
            ),
            (r#""it's""#, "it's"),
            (
                r#"["it's", "\"", "it's \"so\"", "\\"]"#,
                r#"["it's", '"', 'it\'s "so"', '\\']"#,
            ),
            (
                r#"["\n\r\t\b\f\u0000\u007f/\/"]"#,
                r"['\n\r\t\x08\x0c\x00\x7f//']",
            ),
            (
                r#"["grüße","\u00fc","\u00a0","\u200b","\ud83d\ude00","\ue000","\u0378"]"#,
                r"['grüße', 'ü', '\xa0', '\u200b', '😀', '\ue000', '\u0378']",
            ),
            (
                "[\"\u{e0001}\", \"\u{301}\", \"\u{3000}\"]",
                "['\\U000e0001', '\u{301}', '\\u3000']",
            ),
            (
                r#"["\ud800", "\udc00\ud800", "\ud83d\u0041"]"#,
                r"['\ud800', '\udc00\ud800', '\ud83dA']",
            ),
            (
                "[0,-0,-5,123456789012345678901234567890]",
                "[0, 0, -5, 123456789012345678901234567890]",
            ),
            (
                "[1.0,1e16,1E5,1e-5,0.0001,1.5e-7,-0.0,1e22,1e15,123456789012345678.0]",
                "[1.0, 1e+16, 100000.0, 1e-05, 0.0001, 1.5e-07, -0.0, 1e+22, 1000000000000000.0, \
                1.2345678901234568e+17]",
            ),
            (
                "[1e999,-1e999,1e-999,0.1,1e100]",
                "[inf, -inf, 0.0, 0.1, 1e+100]",
            ),
            (
                r#"{"a":1,"b":2,"a":{"c":3,"\u0063":4}}"#,
                "{'a': {'c': 4}, 'b': 2}",
            ),
            (r#"{"":""}"#, "{'': ''}"),
        ] {
            assert_eq!(print(json).as_deref(), Some(printed), "{json}");
        }
        for bad in ["", "[", "{]", "[1,]", "nul", "NaN", "'a'", "1 2"] {
            assert_eq!(print(bad), None, "{bad}");
        }
    }

    #[test]
    fn depth_and_repetition_cost_no_more_than_length() {
        let depth = 1_000_000;
        let lists = ["[".repeat(depth), "]".repeat(depth)].concat();
        assert_eq!(print(&lists).as_ref(), Some(&lists));
        let objects = [
            r#"{"a":0,"a":"#.repeat(depth / 10),
            "1".to_owned(),
            "}".repeat(depth / 10),
        ]
        .concat();
        let printed = [
            "{'a': ".repeat(depth / 10),
            "1".to_owned(),
            "}".repeat(depth / 10),
        ]
        .concat();
        assert_eq!(print(&objects), Some(printed));
    }

    #[test]
    fn letters_and_digits_of_any_script_count() {
        for good in ["a", "Z9", "grüße", "キー", "ключ٣", "²Ⅷ½"] {
            assert!(is_alphanumeric(good), "{good}");
        }
        for bad in [
            "",
            " ",
            "a b",
            "a_b",
            "a-b",
            "a/b",
            "%",
            "हिन्दी",
            "ⓐ",
            "😀",
            "e\u{301}",
        ] {
            assert!(!is_alphanumeric(bad), "{bad}");
        }
    }

    #[test]
    fn lists_of_texts() {
        assert_eq!(print_list([]), "[]");
        assert_eq!(print_list(["a:1", "b's"]), r#"['a:1', "b's"]"#);
    }
}
