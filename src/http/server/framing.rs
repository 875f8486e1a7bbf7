//! Checks more of a request's head than hyper does, so that nobody on the way takes the request for
//! another one (RFC 9112, sections 3.2 and 6.1).
//!
//! hyper itself refuses what is no HTTP, and gives a request with both `Transfer-Encoding` and
//! `Content-Length` the former, and no request after it on its connection. The table in
//! `smuggling_tests` holds all of it.

use http::{HeaderMap, StatusCode, Version, header};

use crate::http::problem::{Code, Problem};

/// Refuses a request over HTTP/1 whose head leaves open whom it is for or how long it is.
///
/// # Errors
///
/// Says why: the connection must end with that answer.
pub fn check(version: Version, headers: &HeaderMap) -> Result<(), Problem> {
    let mut hosts = headers.get_all(header::HOST).iter();
    match (hosts.next(), hosts.next()) {
        (Some(host), None) if is_host(host.as_bytes()) => {}
        (None, None) if version < Version::HTTP_11 => {}
        (None, None) => return Err(invalid("an HTTP/1.1 request has a Host header")),
        (Some(_), None) => {
            return Err(invalid(
                "the Host header is not a host with or without a port",
            ));
        }
        (_, Some(_)) => return Err(invalid("a request has one Host header")),
    }
    let mut codings = headers.get_all(header::TRANSFER_ENCODING).iter();
    match (codings.next(), codings.next()) {
        (None, None) => Ok(()),
        (Some(coding), None) if coding.as_bytes().eq_ignore_ascii_case(b"chunked") => Ok(()),
        _ => Err(Problem::with_code(
            "unsupported_transfer_coding",
            StatusCode::NOT_IMPLEMENTED,
            "The transfer coding is not known",
            "a body is sent as it is, or with 'Transfer-Encoding: chunked' alone",
        )),
    }
}

fn invalid(detail: &str) -> Problem {
    Problem::new(Code::InvalidHeader, detail)
}

/// Returns true if these are characters of a host and a port. An empty one is for requests without
/// an authority, and means nothing.
fn is_host(bytes: &[u8]) -> bool {
    bytes
        .iter()
        .all(|byte| byte.is_ascii_graphic() && !b"/?#@\\<>\"{}|^`,".contains(byte))
}
