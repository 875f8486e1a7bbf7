//! `/set`, which two dialects have: the `key` of the first element tells whose it is.
//!
//! An object is the encoded batch's, a string the plain batch's. Where neither can be told, because
//! the list is empty or unreadable or its first element is none of theirs, PUT is the former and
//! POST the latter.

use axum::extract::{Request, State};
use axum::response::Response;
use http::Method;

use super::json_list::{self, KeyValue, PairObject};
use super::request::read_body;
use super::{encoded_batch, plain_batch};
use crate::http::app::SharedApp;
use crate::http::blocking;
use crate::http::dialect::Dialect;

pub async fn set(State(app): State<SharedApp>, request: Request) -> Response {
    let mut timer = app.start_timer(Dialect::EncodedBatch, &request);
    let (parts, body) = request.into_parts();
    let body = match read_body(&app, &parts, body).await {
        Ok(body) => body,
        Err(refusal) => return timer.finish(refusal.respond(&parts.method)),
    };
    let dialect = blocking::work(body.len(), || dialect(&body, &parts.method));
    timer.dialect(dialect);
    let answer = match dialect {
        Dialect::PlainBatch => plain_batch::set(&app, body).await,
        _ => encoded_batch::set(&app, body).await,
    };
    timer.finish(answer.unwrap_or_else(|refusal| refusal.respond(&parts.method)))
}

/// Looks at the first element alone.
fn dialect(body: &[u8], method: &Method) -> Dialect {
    let first: Option<PairObject<'_, KeyValue>> = json_list::first(body);
    match first
        .and_then(|pair| pair.first)
        .map(|key| key.get().as_bytes())
    {
        Some([b'{', ..]) => Dialect::EncodedBatch,
        Some([b'"', ..]) => Dialect::PlainBatch,
        _ if method == Method::POST => Dialect::PlainBatch,
        _ => Dialect::EncodedBatch,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_key_tells_and_else_the_method() {
        let either = [
            (Method::PUT, Dialect::EncodedBatch),
            (Method::POST, Dialect::PlainBatch),
        ];
        for json in [
            "",
            "[]",
            "{",
            "[",
            "null",
            r#"[{"value":1}]"#,
            r#"[{"key":1}]"#,
            r#"[1]"#,
            r#"[{"key":{}"#,
        ] {
            for (method, expected) in &either {
                assert_eq!(
                    dialect(json.as_bytes(), method),
                    *expected,
                    "{method} {json}"
                );
            }
        }
        for (method, _) in &either {
            assert_eq!(
                dialect(
                    br#" [ {"value":1, "key": {"encoding":1}}, {"key":"a"}]"#,
                    method
                ),
                Dialect::EncodedBatch
            );
            assert_eq!(
                dialect(br#"[{"key":"a"}, {"key":{}}"#, method),
                Dialect::PlainBatch
            );
        }
    }
}
