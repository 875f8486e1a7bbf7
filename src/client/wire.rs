//! One HTTP/1.1 connection, kept as lean as hyper makes it: for the native client and the load
//! generator, where each request counts.
//!
//! Paths go out as they are given: a key may be `..`, and a client that normalizes paths could not
//! name it.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::types::Address;

/// The longest answer that is read: a listing of a thousand of the largest values would be longer,
/// but none is made that long.
const ANSWER_BYTES_MAX: usize = 256 << 20;

/// A reason why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    #[error(transparent)]
    Broken(#[from] hyper::Error),
    #[error("the answer has more than {ANSWER_BYTES_MAX} bytes, which none of a node has")]
    TooLong,
}

impl ExchangeError {
    /// Returns whether nothing was sent, because the connection had been closed before.
    pub fn is_not_sent(&self) -> bool {
        matches!(self, ExchangeError::Broken(error) if error.is_canceled() || error.is_closed())
    }
}

/// A connection to one node. Closed when it is dropped.
#[derive(Debug)]
pub struct Connection {
    sender: SendRequest<Full<Bytes>>,
    driver: JoinHandle<()>,
}

impl Connection {
    /// # Errors
    ///
    /// Fails if nobody listens there, or no connection is made in time.
    pub async fn open(address: &Address, within: Duration) -> io::Result<Self> {
        let opening = async {
            let stream = TcpStream::connect(address.as_str()).await?;

            // Nagle's algorithm would hold a small request back until the answer before is
            // acknowledged.
            stream.set_nodelay(true)?;
            http1::handshake(TokioIo::new(stream))
                .await
                .map_err(io::Error::other)
        };
        let (sender, connection) = timeout(within, opening)
            .await
            .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        // Its end shows in the request that is in flight then.
        let driver = tokio::spawn(async move { drop(connection.await) });
        Ok(Self { sender, driver })
    }

    /// Returns true if another request can be sent.
    pub fn is_open(&self) -> bool {
        !self.sender.is_closed()
    }

    /// Sends a request and waits for the head of the answer. Its body is to be read, or the
    /// connection dropped, before the next one.
    ///
    /// # Errors
    ///
    /// The request may have been taken up nevertheless.
    pub async fn send(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> hyper::Result<Response<Incoming>> {
        self.sender.ready().await?;
        self.sender.send_request(request).await
    }

    /// As [`Connection::send`], with the whole body, which is longer than any answer of ours if it
    /// has more than `ANSWER_BYTES_MAX`.
    ///
    /// # Errors
    ///
    /// The request may have been taken up all the same.
    pub async fn exchange(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Bytes>, ExchangeError> {
        let (parts, body) = self.send(request).await?.into_parts();
        let body = Limited::new(body, ANSWER_BYTES_MAX)
            .collect()
            .await
            .map_err(|error| match error.downcast() {
                Ok(error) => ExchangeError::Broken(*error),
                Err(_) => ExchangeError::TooLong,
            })?;
        let body = body.to_bytes();
        Ok(Response::from_parts(parts, body))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}
