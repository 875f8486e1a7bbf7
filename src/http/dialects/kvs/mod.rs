//! Dialects C ("kvs"), C4 ("kvs replicated") and D ("kvs by proxy"): one set of routes. Which of C
//! and C4 a store speaks follows from its layout: with a replication factor of its own
//! (*exclusive*) it is C4.
//!
//! | request | answer |
//! | --- | --- |
//! | `PUT GET DELETE /kvs/keys/<key>`, and `/kvs/<key>` for any other key | see [`keys`] |
//! | `GET /kvs/key-count`, `/kvs/shards`, `/kvs/shards/<id>` | see [`shards`] |
//! | `PUT /kvs/view-change` | see [`view_change`] |
//! | `PUT /proxy/view-change` | the same change, answered `{}` |
//!
//! A shard's id is that of its group, in decimal: ids are never reused, so there may be holes
//! between them.
//!
//! A request whose body, whatever its method, is an object with a `causal-context` has one in its
//! answer, errors too. The store is linearizable, so the context constrains nothing further: an
//! object is returned as it came, anything else as `{}`.
//!
//! Nobody could do it in time, or nobody knows whether it was done: 503
//! `{"error":"Unable to satisfy request","message":"Error in PUT"}`. A spare says the same at once,
//! and whom it knows of.

mod body;
mod keys;
mod response;
mod shards;
#[cfg(test)]
mod tests;
mod view_change;

use axum::extract::Request;
use axum::response::Response;
use http::request::Parts;
use http::{Method, StatusCode};

use self::body::KvsBody;
use self::response::{KvsResponse, ResponseContent};
use crate::api::store::Failure;
use crate::http::answer_budget::charge;
use crate::http::dialect::Dialect;
use crate::http::dialects::error::DialectError;
use crate::http::dialects::request::read_body;
use crate::http::metrics::RequestTimer;
use crate::http::{App, blocking};

const PREFIX: &str = "/kvs/";
const PROXY_VIEW_CHANGE: &str = "/proxy/view-change";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Route<'a> {
    /// Still escaped.
    Key(&'a str),
    KeyCount,
    Shards,
    Shard(&'a str),
    ViewChange,
    ProxyViewChange,
}

impl<'a> Route<'a> {
    /// None: a path of another dialect. Paths are compared as they were sent, so a key that is
    /// called like a route can be escaped.
    fn of(path: &'a str) -> Option<Self> {
        if path == PROXY_VIEW_CHANGE {
            return Some(Route::ProxyViewChange);
        }
        Some(match path.strip_prefix(PREFIX)? {
            "key-count" => Route::KeyCount,
            "shards" => Route::Shards,
            "view-change" => Route::ViewChange,
            rest => match (rest.strip_prefix("shards/"), rest.strip_prefix("keys/")) {
                (Some(id), _) => Route::Shard(id),
                (None, key) => Route::Key(key.unwrap_or(rest)),
            },
        })
    }

    fn allowed(self) -> &'static str {
        match self {
            Route::Key(_) => "GET,HEAD,PUT,DELETE",
            Route::KeyCount | Route::Shards | Route::Shard(_) => "GET,HEAD",
            Route::ViewChange | Route::ProxyViewChange => "PUT",
        }
    }
}

/// Returns true if `path` is one of these dialects'.
pub fn owns(path: &str) -> bool {
    Route::of(path).is_some()
}

pub async fn serve(app: &App, request: Request) -> Response {
    let mut timer = app.start_timer(Dialect::Kvs, &request);
    let (parts, body) = request.into_parts();
    let answer = match read_body(app, &parts, body).await {
        Ok(body) => {
            let request_body = blocking::work(body.len(), || KvsBody::read(&body.bytes));
            let answered = by_route(app, &parts, &request_body, &mut timer).await;
            let answer =
                answered.unwrap_or_else(|refusal| KvsResponse::refused(refusal, &parts.method));
            answer.with_context(request_body.causal_context())
        }
        Err(refusal) => KvsResponse::refused(refusal, &parts.method),
    };
    // With the context, which finish knows nothing of.
    let context = answer.causal_context.clone();
    let response =
        charge(answer.respond(), &app.answers).unwrap_or_else(|unfit| match parts.method {
            Method::GET | Method::HEAD => {
                let refusal = Failure::no_room(&app.answers).into();
                KvsResponse::refused(refusal, &parts.method)
                    .with_context(context)
                    .respond()
            }
            _ => *unfit,
        });
    timer.finish(response)
}

async fn by_route(
    app: &App,
    parts: &Parts,
    request_body: &KvsBody<'_>,
    timer: &mut RequestTimer<'_>,
) -> Result<KvsResponse, DialectError> {
    let method = &parts.method;
    let reads = matches!(*method, Method::GET | Method::HEAD);
    let route = Route::of(parts.uri.path());
    match route {
        Some(Route::Key(escaped)) if reads || matches!(*method, Method::PUT | Method::DELETE) => {
            let key = keys::unescape(escaped);
            timer.key(&key);
            keys::answer(app, method, key, request_body).await
        }
        Some(Route::KeyCount) if reads => shards::key_count(app).await,
        Some(Route::Shards) if reads => shards::all(app).await,
        Some(Route::Shard(id)) if reads => shards::one(app, id).await,
        Some(Route::ViewChange) if *method == Method::PUT => {
            let changed = view_change::change(app, request_body, timer).await?;
            Ok(KvsResponse::new(StatusCode::OK, changed))
        }
        Some(Route::ProxyViewChange) if *method == Method::PUT => {
            view_change::change(app, request_body, timer).await?;
            Ok(KvsResponse::new(
                StatusCode::OK,
                ResponseContent::Nothing {},
            ))
        }
        Some(route) => Ok(KvsResponse::not_allowed(method, route.allowed())),
        None => Err(DialectError::new(
            StatusCode::NOT_FOUND,
            "There is nothing here",
        )),
    }
}

/// As a refusal; of a spare, with what it waits for and whom it knows of.
fn refusal(app: &App, failure: Failure) -> DialectError {
    let mut refusal = DialectError::from(failure);
    if refusal.status == StatusCode::SERVICE_UNAVAILABLE
        && let Err(unready) = app.readiness.ready()
        && unready.code == "spare"
    {
        refusal.error = format!("{}: {}", refusal.error, unready.reason);
    }
    refusal
}
