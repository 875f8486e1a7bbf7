//! A server over a store in memory, on a port of its own, and a client that sends raw bytes.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::{Echo, FakeStore, PATIENCE, Switch};
use crate::http::{App, Limits, Server};

/// A server over a [`FakeStore`].
pub struct Site {
    pub address: SocketAddr,
    pub store: Arc<FakeStore>,
    pub readiness: Arc<Switch>,
    shutdown: CancellationToken,
    serving: JoinHandle<()>,
}

/// Returns the routes over a [`FakeStore`], without a server.
pub fn router() -> axum::Router {
    let app = App::new(
        Arc::new(FakeStore::default()),
        Arc::new(Switch::default()),
        Vec::new(),
        Some(Arc::new(Echo)),
        Limits::default(),
    );
    crate::http::router(app)
}

impl Site {
    pub async fn start() -> Site {
        Self::with(Limits::default()).await
    }

    pub async fn with(limits: Limits) -> Site {
        let server = Server::bind(&["127.0.0.1:0"]).await.expect("a free port");
        let (store, readiness) = (Arc::new(FakeStore::default()), Arc::new(Switch::default()));
        let app = App::new(
            store.clone(),
            readiness.clone(),
            vec![Box::new(server.stats())],
            Some(Arc::new(Echo)),
            limits.clone(),
        );
        let (address, shutdown) = (server.addresses()[0], CancellationToken::new());
        let stopped = shutdown.clone();
        let serving = tokio::spawn(async move { server.serve_app(app, stopped, &limits).await });
        Site {
            address,
            store,
            readiness,
            shutdown,
            serving,
        }
    }

    pub async fn stop(self) {
        self.shutdown.cancel();
        timeout(PATIENCE, self.serving)
            .await
            .expect("it stops in time")
            .expect("it does not panic");
    }

    pub fn begin_stop(&self) {
        self.shutdown.cancel();
    }

    /// Waits until the metrics have this line.
    pub async fn wait_for_metric(&self, line: &str) {
        let found = async {
            while !self
                .get("/metrics")
                .await
                .text()
                .lines()
                .any(|found| found == line)
            {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(PATIENCE, found)
            .await
            .unwrap_or_else(|_| panic!("never: {line}"));
    }

    pub async fn connect(&self) -> Wire {
        Wire {
            stream: TcpStream::connect(self.address).await.expect("it listens"),
            read: Vec::new(),
        }
    }

    /// As [`Site::connect`], without giving the server a chance to do anything meanwhile.
    pub fn connect_at_once(&self) -> Wire {
        let stream = std::net::TcpStream::connect(self.address).expect("it listens");
        stream.set_nonblocking(true).expect("a socket");
        Wire {
            stream: TcpStream::from_std(stream).expect("a socket"),
            read: Vec::new(),
        }
    }

    /// Sends one request on a connection of its own. `head` is the request line and header lines,
    /// parted by newlines.
    pub async fn ask(&self, head: &str, body: impl AsRef<[u8]>) -> Reply {
        let mut wire = self.connect().await;
        wire.send(&request(head, body.as_ref())).await;
        wire.reply_to(head.split(' ').next().unwrap_or_default())
            .await
    }

    pub async fn get(&self, path: &str) -> Reply {
        self.ask(&format!("GET {path}"), "").await
    }

    pub async fn put(&self, path: &str, value: impl AsRef<[u8]>) -> Reply {
        self.ask(&format!("PUT {path}"), value).await
    }

    pub async fn post_json(&self, path: &str, body: Value) -> Reply {
        self.ask(&format!("POST {path}"), body.to_string()).await
    }
}

/// The bytes of a request with a declared length.
pub fn request(head: &str, body: &[u8]) -> Vec<u8> {
    let (line, headers) = head
        .split_once('\n')
        .map_or((head, None), |(line, headers)| (line, Some(headers)));
    let mut text = format!("{line} HTTP/1.1\r\nhost: test\r\n");
    for header in headers.into_iter().flat_map(str::lines) {
        text.push_str(&format!("{header}\r\n"));
    }
    if !body.is_empty() {
        text.push_str(&format!("content-length: {}\r\n", body.len()));
    }
    [format!("{text}\r\n").as_bytes(), body].concat()
}

/// A connection spoken to in raw bytes.
pub struct Wire {
    stream: TcpStream,
    read: Vec<u8>,
}

impl Wire {
    /// Sends what it can. The other side may have closed: only its answer counts.
    pub async fn send(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes).await;
    }

    pub async fn close_sending(&mut self) {
        self.stream
            .shutdown()
            .await
            .expect("the connection is open");
    }

    /// Ends the connection as a machine does that knows nothing of it any more.
    pub fn reset(self) {
        let linger = socket2::SockRef::from(&self.stream).set_linger(Some(Duration::ZERO));
        linger.expect("a socket");
    }

    /// Returns whether the other side has closed it, as far as is known.
    pub fn is_closed(&self) -> bool {
        let mut bytes = [0; 1024];
        loop {
            match self.stream.try_read(&mut bytes) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return error.kind() != std::io::ErrorKind::WouldBlock,
            }
        }
    }

    async fn more(&mut self) -> bool {
        let read = timeout(PATIENCE, self.stream.read_buf(&mut self.read))
            .await
            .expect("something comes in time");
        read.is_ok_and(|bytes| bytes > 0)
    }

    /// Everything until the other side closes.
    pub async fn rest(mut self) -> String {
        while self.more().await {}
        String::from_utf8_lossy(&self.read).into_owned()
    }

    /// Reads until `text` has come.
    pub async fn expect(&mut self, text: &str) {
        while !self
            .read
            .windows(text.len())
            .any(|window| window == text.as_bytes())
        {
            assert!(
                self.more().await,
                "closed before '{text}', after {:?}",
                String::from_utf8_lossy(&self.read)
            );
        }
    }

    pub async fn reply(&mut self) -> Reply {
        self.reply_to("GET").await
    }

    pub async fn reply_to(&mut self, method: &str) -> Reply {
        self.expect("\r\n\r\n").await;
        let end = self
            .read
            .windows(4)
            .position(|window| window == b"\r\n\r\n")
            .expect("it was found")
            + 4;
        let head = String::from_utf8(self.read.drain(..end).collect()).expect("a head is text");
        let mut lines = head.lines();
        let status = lines
            .next()
            .and_then(|line| line.split(' ').nth(1))
            .and_then(|code| code.parse().ok())
            .expect("a status");
        let headers: HashMap<String, String> = lines
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect();
        let length = headers
            .get("content-length")
            .map_or(0, |length| length.parse().expect("a number"));
        let length = if method == "HEAD" || status == 304 || status == 100 {
            0
        } else {
            length
        };
        while self.read.len() < length {
            assert!(self.more().await, "closed within a body");
        }
        Reply {
            status,
            headers,
            body: self.read.drain(..length).collect(),
        }
    }
}

#[derive(Debug, Clone)]
pub struct Reply {
    pub status: u16,
    pub headers: HashMap<String, String>,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error} in {self:?}"))
    }

    /// The status and, of a problem, the code.
    pub fn verdict(&self) -> (u16, String) {
        if self.header("content-type") != "application/problem+json" {
            return (self.status, String::new());
        }
        let body = self.json();
        assert_eq!(body["status"], self.status);
        assert!(
            body["title"].is_string() && body["type"].is_string() && body["detail"].is_string(),
            "{body}"
        );
        (
            self.status,
            body["code"].as_str().expect("a code").to_owned(),
        )
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}
