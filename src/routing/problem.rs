//! Reads the error answers of servers: RFC 9457 problems of the native dialect, and whatever a
//! proxy in front of one says.
//!
//! Invariant: that nothing was done is believed of a node alone, which says so in a problem of its
//! own. A proxy between, or whatever program is at an address, does not know what a node did with
//! what it was sent.

use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderMap, StatusCode};

use crate::api::store::Failure;

/// The longest text that is passed on, in characters.
const DETAIL_MAX: usize = 2000;

/// Prefixes of a server's text of a [`Failure`]: its meaning is in the status already.
const PREFIXES: [&str; 5] = [
    "invalid request: ",
    "unavailable: ",
    "unknown outcome: ",
    "overloaded: ",
    "too large: ",
];

/// Prefix of the `type` of every problem of a node; every release has sent it.
pub const TYPE_PREFIX: &str = "urn:quorate:problem:";
/// The media type of a problem.
pub const MEDIA_TYPE: &str = "application/problem+json";

/// Returns the failure that an answer with this status tells of.
pub fn failure(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Failure {
    let Some(problem) = of_node(headers, body) else {
        return foreign_failure(status, body);
    };

    // `Failure` puts its prefix before the reason when it is shown, so the node's own is taken off.
    let text = detail_of(Some(&problem), status, body);
    let reason = PREFIXES
        .iter()
        .find_map(|prefix| text.strip_prefix(prefix))
        .unwrap_or(&text)
        .to_owned();
    let wait_s = headers
        .get(RETRY_AFTER)
        .and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    let retry_after_ms = wait_s.unwrap_or(1).saturating_mul(1000);
    match status {
        StatusCode::TOO_MANY_REQUESTS => Failure::Overloaded {
            limit: reason,
            retry_after_ms,
        },
        StatusCode::SERVICE_UNAVAILABLE | StatusCode::REQUEST_TIMEOUT => Failure::Unavailable {
            reason,
            retry_after_ms,
        },
        StatusCode::PAYLOAD_TOO_LARGE => Failure::TooLarge { limit: reason },
        status if status.is_client_error() => Failure::Invalid { reason },
        _ => Failure::Unknown { reason },
    }
}

/// Returns the problem that a node has written; none of any other answer.
pub fn of_node(headers: &HeaderMap, body: &[u8]) -> Option<serde_json::Value> {
    let media_type = headers.get(CONTENT_TYPE)?.to_str().ok()?;
    if media_type.split(';').next().map(str::trim) != Some(MEDIA_TYPE) {
        return None;
    }
    let problem: serde_json::Value = serde_json::from_slice(body).ok()?;
    let is_ours = problem.get("type")?.as_str()?.starts_with(TYPE_PREFIX);
    is_ours.then_some(problem)
}

/// Returns true if an answer is a problem that a node has written.
pub fn is_of_node(headers: &HeaderMap, body: &[u8]) -> bool {
    of_node(headers, body).is_some()
}

/// Returns the failure that the answer of a server means which is no node: nobody knows what became
/// of the request. A proxy may have passed it on to a node before it answered, or asked another
/// program after a node had said nothing, whose "not found" says nothing of what the node did.
fn foreign_failure(status: StatusCode, body: &[u8]) -> Failure {
    let reason = match detail(status, body) {
        text if text == status.to_string() => format!("{status}, from a server that is no node"),
        text => format!("{status}, from a server that is no node: {text}"),
    };
    Failure::Unknown { reason }
}

/// Returns the `detail` of a problem, else the body, else the status.
pub fn detail(status: StatusCode, body: &[u8]) -> String {
    let problem: Option<serde_json::Value> = serde_json::from_slice(body).ok();
    detail_of(problem.as_ref(), status, body)
}

fn detail_of(problem: Option<&serde_json::Value>, status: StatusCode, body: &[u8]) -> String {
    let detail = problem
        .and_then(|problem| problem.get("detail")?.as_str())
        .map(str::to_owned);
    let text = detail.unwrap_or_else(|| String::from_utf8_lossy(body).trim().to_owned());
    if text.is_empty() {
        status.to_string()
    } else {
        text.chars().take(DETAIL_MAX).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_node(more: &[(http::HeaderName, &str)]) -> HeaderMap {
        let all = [&[(CONTENT_TYPE, MEDIA_TYPE)], more].concat();
        all.into_iter()
            .map(|(name, value)| (name, value.parse().expect("a header")))
            .collect()
    }

    fn problem(detail: &str) -> Vec<u8> {
        serde_json::json!({ "type": format!("{TYPE_PREFIX}x"), "detail": detail, "code": "x" })
            .to_string()
            .into_bytes()
    }

    #[test]
    fn a_problem_is_read_back_as_the_failure_that_it_was() {
        let headers = of_node(&[(RETRY_AFTER, "2")]);
        let failures = [
            (
                400,
                Failure::Invalid {
                    reason: "no such shard".into(),
                },
            ),
            (
                413,
                Failure::TooLarge {
                    limit: "8 MiB".into(),
                },
            ),
            (
                429,
                Failure::Overloaded {
                    limit: "queue".into(),
                    retry_after_ms: 2000,
                },
            ),
            (
                503,
                Failure::Unavailable {
                    reason: "no quorum".into(),
                    retry_after_ms: 2000,
                },
            ),
            (
                504,
                Failure::Unknown {
                    reason: "no answer".into(),
                },
            ),
        ];
        for (status, expected) in failures {
            let status = StatusCode::from_u16(status).expect("a status");
            assert_eq!(
                failure(status, &headers, &problem(&expected.to_string())),
                expected
            );
        }
    }

    #[test]
    fn what_is_no_problem_is_told_as_it_is() {
        let failure = |body: &[u8]| failure(StatusCode::BAD_GATEWAY, &HeaderMap::new(), body);
        let told = |text: &str| Failure::Unknown {
            reason: format!("502 Bad Gateway, from a server that is no node{text}"),
        };
        assert_eq!(failure(b"<h1>proxy</h1>\n"), told(": <h1>proxy</h1>"));
        assert_eq!(failure(b""), told(""));
    }

    #[test]
    fn nobody_but_a_node_is_believed_that_nothing_was_done() {
        let html = HeaderMap::from_iter([(CONTENT_TYPE, "text/html".parse().expect("a header"))]);
        let other = br#"{"type":"about:blank","title":"Service Unavailable"}"#;
        let answers = [
            (HeaderMap::new(), Vec::new()),
            (html.clone(), b"<h1>try again</h1>".to_vec()),
            (html, problem("no quorum")),
            (of_node(&[]), other.to_vec()),
            (of_node(&[]), b"cut off".to_vec()),
        ];
        for (headers, body) in answers {
            for status in [400, 403, 404, 408, 409, 412, 413, 429, 500, 502, 503, 504] {
                let status = StatusCode::from_u16(status).expect("a status");
                let failure = failure(status, &headers, &body);
                assert!(
                    matches!(failure, Failure::Unknown { .. }),
                    "{status} {headers:?}: {failure:?}"
                );
            }
        }
        let with_charset = HeaderMap::from_iter([(
            CONTENT_TYPE,
            format!("{MEDIA_TYPE}; charset=utf-8").parse().expect("one"),
        )]);
        let ours = failure(
            StatusCode::SERVICE_UNAVAILABLE,
            &with_charset,
            &problem("no quorum"),
        );
        assert!(matches!(ours, Failure::Unavailable { .. }), "{ours:?}");
    }
}
