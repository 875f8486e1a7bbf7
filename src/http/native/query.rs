//! Query parameters: parsed strictly, each route naming those it takes.
//!
//! Names and values are percent-decoded as forms are (`+` is a space). Values are bytes: a prefix
//! of keys need not be text.

use std::time::Duration;

use bytes::Bytes;

use super::key::unescape;
use crate::api::store::{Consistency, Options, Routing};
use crate::http::limits::Limits;
use crate::http::problem::{Code, Problem, shortened};

/// The parameters of a request. Those that a route does not take are at their defaults.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Query {
    pub options: Options,
    pub prefix: Bytes,
    pub start: Bytes,
    pub end: Option<Bytes>,
    pub limit: usize,
    pub cursor: Option<Bytes>,
    pub keys_only: bool,
    pub reverse: bool,
    /// Time to wait for the end of a change of the view.
    pub wait: Option<Duration>,
    pub dry_run: bool,
}

impl Query {
    /// Parses `query`; a parameter that is not one of `known`, or is given twice, is an error that
    /// names it.
    pub fn parse(query: Option<&str>, known: &[&str], limits: &Limits) -> Result<Self, Problem> {
        let options = Options {
            consistency: Consistency::default(),
            routing: Routing::default(),
            timeout: limits.request_timeout_default,
        };
        let mut parsed = Self {
            options,
            prefix: Bytes::new(),
            start: Bytes::new(),
            end: None,
            limit: limits.page_items_default,
            cursor: None,
            keys_only: false,
            reverse: false,
            wait: None,
            dry_run: false,
        };

        // Unknown and repeated parameters are refused: a misspelt `consistency` would be ignored in
        // silence.
        let mut seen: Vec<&str> = Vec::new();
        for pair in query
            .unwrap_or_default()
            .split('&')
            .filter(|pair| !pair.is_empty())
        {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let decode = |text: &str| {
                unescape(text.as_bytes(), true)
                    .map_err(|reason| Problem::new(Code::InvalidQuery, reason))
            };
            let (name, value) = (decode(name)?, Bytes::from(decode(value)?));
            let Some(name) = known.iter().find(|known| known.as_bytes() == name) else {
                return Err(unknown(&name, known));
            };
            if seen.contains(name) {
                return Err(Problem::new(
                    Code::InvalidQuery,
                    format!("'{name}' is given more than once"),
                ));
            }
            seen.push(name);
            parsed.set(name, value, limits).map_err(|expected| {
                Problem::new(Code::InvalidQuery, format!("'{name}' is wrong: {expected}"))
                    .extension("parameter", *name)
            })?;
        }
        Ok(parsed)
    }

    /// Sets one parameter. An error says what was expected.
    fn set(&mut self, name: &str, value: Bytes, limits: &Limits) -> Result<(), String> {
        match name {
            "proxy" => {
                self.options.routing = if flag(&value)? {
                    Routing::Proxy
                } else {
                    Routing::Redirect
                }
            }
            "consistency" => self.options.consistency = consistency(&value)?,
            "timeout" => self.options.timeout = duration(&value, limits.request_timeout_max)?,
            "prefix" => self.prefix = value,
            "start" => self.start = value,
            "end" => self.end = Some(value),
            "limit" => self.limit = number(&value, limits.page_items_max)?,
            "cursor" => self.cursor = Some(value),
            "keys_only" => self.keys_only = flag(&value)?,
            "reverse" => self.reverse = flag(&value)?,
            "wait" => self.wait = Some(duration(&value, limits.change_wait_max)?),
            "dry_run" => self.dry_run = flag(&value)?,
            other => unreachable!("no route knows a parameter '{other}'"),
        }
        Ok(())
    }
}

fn unknown(name: &[u8], known: &[&str]) -> Problem {
    let name = String::from_utf8_lossy(name);
    let name = shortened(&name);
    let known = if known.is_empty() {
        "none".to_owned()
    } else {
        known.join(", ")
    };
    Problem::new(
        Code::InvalidQuery,
        format!("'{name}' is not a parameter of this request; it takes: {known}"),
    )
    .extension("parameter", name)
}

fn flag(value: &[u8]) -> Result<bool, String> {
    match value {
        b"true" => Ok(true),
        b"false" => Ok(false),
        _ => Err("expected true or false".into()),
    }
}

fn consistency(value: &[u8]) -> Result<Consistency, String> {
    match value {
        b"linearizable" => Ok(Consistency::Linearizable),
        b"stale" => Ok(Consistency::Stale),
        _ => Err("expected linearizable or stale".into()),
    }
}

fn number(value: &[u8], max: usize) -> Result<usize, String> {
    let parsed = digits(value).and_then(|number| usize::try_from(number).ok());
    parsed
        .filter(|number| (1..=max).contains(number))
        .ok_or_else(|| format!("expected a number from 1 to {max}"))
}

fn duration(value: &[u8], max: Duration) -> Result<Duration, String> {
    let parsed = match value {
        [number @ .., b'm', b's'] => digits(number).map(Duration::from_millis),
        [number @ .., b's'] => digits(number).map(Duration::from_secs),
        _ => None,
    };
    let in_range = parsed.filter(|wait| !wait.is_zero() && *wait <= max);
    in_range.ok_or_else(|| {
        format!("expected seconds or milliseconds, such as 2s or 500ms, up to {max:?}")
    })
}

/// Parses digits alone: Rust's own parser takes a plus sign too.
pub fn digits(text: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(text).ok()?;
    if text.bytes().all(|byte| byte.is_ascii_digit()) {
        text.parse().ok()
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: &[&str] = &["proxy", "consistency", "timeout", "prefix", "limit"];

    fn parse(query: &str) -> Result<Query, String> {
        Query::parse(Some(query), KNOWN, &Limits::default()).map_err(|problem| {
            assert_eq!(problem.code(), "invalid_query");
            problem.detail
        })
    }

    #[test]
    fn parameters_are_read() {
        let query =
            parse("proxy=true&consistency=stale&timeout=1500ms&&prefix=a%2Fb+%FF&limit=1000")
                .expect("a good query");
        assert_eq!(
            (query.options.routing, query.options.consistency),
            (Routing::Proxy, Consistency::Stale)
        );
        assert_eq!(query.options.timeout, Duration::from_millis(1500));
        assert_eq!((&query.prefix[..], query.limit), (&b"a/b \xff"[..], 1000));
        assert_eq!(
            parse("timeout=60s").expect("the longest").options.timeout,
            Duration::from_secs(60)
        );
        assert_eq!(parse("").expect("an empty query").limit, 100);
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for (query, part) in [
            ("if_match=3", "'if_match' is not a parameter"),
            ("reverse=true", "'reverse' is not a parameter"),
            ("proxy=true&proxy=true", "'proxy' is given more than once"),
            ("proxy", "expected true or false"),
            ("proxy=TRUE", "expected true or false"),
            ("limit=0", "from 1 to 1000"),
            ("limit=1001", "from 1 to 1000"),
            ("limit=+5", "from 1 to 1000"),
            ("limit=99999999999999999999999", "from 1 to 1000"),
            ("timeout=0s", "up to 60s"),
            ("timeout=61s", "up to 60s"),
            ("timeout=5", "such as 2s"),
            ("timeout=s", "such as 2s"),
            ("timeout=-1s", "such as 2s"),
            ("timeout=18446744073709551615s", "up to 60s"),
            ("prefix=%zz", "'%zz' is not a percent escape"),
            ("%ff=1", "is not a parameter"),
            ("consistency=eventual", "linearizable or stale"),
        ] {
            let error = parse(query).expect_err(query);
            assert!(error.contains(part), "{query}: {error}");
        }
    }
}
