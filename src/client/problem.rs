//! What an error answer of a server means: RFC 9457 problems of the native dialect, and whatever else stands in front of one.

use http::header::RETRY_AFTER;
use http::{HeaderMap, StatusCode};

use super::store::Failure;

/// The longest text that is passed on, in characters.
const DETAIL_MAX: usize = 2000;

/// How a server's text of a [`Failure`] begins: its meaning is in the status already.
const PREFIXES: [&str; 5] = ["invalid request: ", "unavailable: ", "unknown outcome: ", "overloaded: ", "too large: "];

/// The failure that an answer with this status tells of.
pub fn failure(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Failure {
    let text = detail(status, body);
    let reason = PREFIXES.iter().find_map(|prefix| text.strip_prefix(prefix)).unwrap_or(&text).to_owned();
    let wait_s = headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    let retry_after_ms = wait_s.unwrap_or(1).saturating_mul(1000);
    match status {
        StatusCode::TOO_MANY_REQUESTS => Failure::Overloaded { limit: reason, retry_after_ms },
        StatusCode::SERVICE_UNAVAILABLE | StatusCode::REQUEST_TIMEOUT => Failure::Unavailable { reason, retry_after_ms },
        StatusCode::PAYLOAD_TOO_LARGE => Failure::TooLarge { limit: reason },
        status if status.is_client_error() => Failure::Invalid { reason },
        _ => Failure::Unknown { reason },
    }
}

/// The `detail` of a problem, else the body, else the status.
pub fn detail(status: StatusCode, body: &[u8]) -> String {
    let problem: Option<serde_json::Value> = serde_json::from_slice(body).ok();
    let detail = problem.as_ref().and_then(|problem| problem.get("detail")?.as_str()).map(str::to_owned);
    let text = detail.unwrap_or_else(|| String::from_utf8_lossy(body).trim().to_owned());
    if text.is_empty() { status.to_string() } else { text.chars().take(DETAIL_MAX).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_is_read_back_as_the_failure_that_it_was() {
        let headers = HeaderMap::from_iter([(RETRY_AFTER, "2".parse().expect("a header"))]);
        let failures = [
            (400, Failure::Invalid { reason: "no such shard".into() }),
            (413, Failure::TooLarge { limit: "8 MiB".into() }),
            (429, Failure::Overloaded { limit: "queue".into(), retry_after_ms: 2000 }),
            (503, Failure::Unavailable { reason: "no quorum".into(), retry_after_ms: 2000 }),
            (504, Failure::Unknown { reason: "no answer".into() }),
        ];
        for (status, expected) in failures {
            let status = StatusCode::from_u16(status).expect("a status");
            let body = serde_json::json!({ "detail": expected.to_string(), "code": "x" }).to_string();
            assert_eq!(failure(status, &headers, body.as_bytes()), expected);
        }
    }

    #[test]
    fn what_is_no_problem_is_told_as_it_is() {
        let failure = |body: &[u8]| failure(StatusCode::BAD_GATEWAY, &HeaderMap::new(), body);
        assert_eq!(failure(b"<h1>proxy</h1>\n"), Failure::Unknown { reason: "<h1>proxy</h1>".into() });
        assert_eq!(failure(b""), Failure::Unknown { reason: "502 Bad Gateway".into() });
    }
}
