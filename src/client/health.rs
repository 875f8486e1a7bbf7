//! Asks one node or gateway how it is.

use std::time::Duration;

use bytes::Bytes;
use http::header::HOST;
use http::{Request, StatusCode};
use http_body_util::Full;

use super::wire::Connection;
use crate::routing::problem;
use crate::types::Address;

/// Asks for this path, and succeeds if the status is 200. The connection must be made `within` that
/// time; the answer is waited for as long as the caller does.
///
/// # Errors
///
/// Says what it is not well with, for people.
pub async fn ask(address: &Address, path: &str, within: Duration) -> Result<(), String> {
    let request = Request::get(path)
        .header(HOST, address.as_str())
        .body(Full::new(Bytes::new()));
    let request = request.map_err(|error| error.to_string())?;
    let mut connection = Connection::open(address, within)
        .await
        .map_err(|error| error.to_string())?;
    let response = connection
        .exchange(request)
        .await
        .map_err(|error| error.to_string())?;
    match response.status() {
        StatusCode::OK => Ok(()),
        status => Err(problem::detail(status, response.body())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::testing::{answer, bind, nobody, serve};

    #[tokio::test]
    async fn only_200_is_health() {
        let (address, listener) = bind().await;
        serve(listener, |request| async move {
            Some(match request.uri().path() {
                "/healthz" => answer(200, "ok"),
                _ => answer(503, r#"{"detail":"it waits for others"}"#),
            })
        });
        let within = Duration::from_secs(20);
        assert_eq!(ask(&address, "/healthz", within).await, Ok(()));
        assert_eq!(
            ask(&address, "/readyz", within).await,
            Err("it waits for others".to_owned())
        );
        assert!(ask(&nobody().await, "/healthz", within).await.is_err());
    }
}
