//! A client of the native dialect that never retries and tells apart what was not sent from what
//! was lost.

use std::time::Duration;

use reqwest::header::{HeaderMap, HeaderName, HeaderValue, LOCATION};
use reqwest::redirect::Policy;
use reqwest::{Method, Url};

/// A chain of redirects longer than this is a loop: the leader is one hop away, two when it has
/// just changed.
const HOPS_MAX: usize = 5;

#[derive(Debug, Clone)]
pub struct Request {
    pub method: Method,
    /// Path and query, encoded.
    pub path: String,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
    pub timeout: Duration,
}

impl Request {
    pub fn new(method: Method, path: impl Into<String>) -> Self {
        Self {
            method,
            path: path.into(),
            headers: Vec::new(),
            body: Vec::new(),
            timeout: Duration::from_secs(10),
        }
    }

    pub fn get(path: impl Into<String>) -> Self {
        Self::new(Method::GET, path)
    }

    pub fn put(path: impl Into<String>, body: impl Into<Vec<u8>>) -> Self {
        Self {
            body: body.into(),
            ..Self::new(Method::PUT, path)
        }
    }

    pub fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub fn timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }
}

#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The revision in the ETag.
    pub fn revision(&self) -> Option<u64> {
        self.headers
            .get("etag")?
            .to_str()
            .ok()?
            .trim_matches('"')
            .parse()
            .ok()
    }
}

/// Why there is no answer.
#[derive(Debug, Clone)]
pub enum Failure {
    /// No node has seen the request, or each that did sent it elsewhere: certainly nothing
    /// happened.
    NotSent(String),
    /// It may have been done.
    Lost(String),
}

#[derive(Debug, Clone)]
pub struct Client(reqwest::Client);

impl Default for Client {
    fn default() -> Self {
        let builder = reqwest::Client::builder()
            .redirect(Policy::none())
            .connect_timeout(Duration::from_secs(2))
            .retry(reqwest::retry::never());
        Self(builder.no_proxy().build().expect("a client"))
    }
}

impl Client {
    /// Asks this node, and whom it redirects to.
    pub async fn ask(&self, address: &str, request: &Request) -> Result<Answer, Failure> {
        let mut url: Url = format!("http://{address}{}", request.path)
            .parse()
            .expect("a URL");
        for _ in 0..HOPS_MAX {
            let answer = self.send(url.clone(), request).await?;
            if answer.status != 307 {
                return Ok(answer);
            }
            let location = answer
                .headers
                .get(LOCATION)
                .and_then(|location| location.to_str().ok());
            let location = location
                .unwrap_or_else(|| panic!("{url} redirects without a Location: {}", answer.text()));
            url = url
                .join(location)
                .unwrap_or_else(|error| panic!("{url} redirects to {location:?}: {error}"));
        }
        Err(Failure::NotSent(format!(
            "more than {HOPS_MAX} redirects, the last to {url}"
        )))
    }

    /// Asks this node alone: a redirect is an answer.
    pub async fn ask_only(&self, address: &str, request: &Request) -> Result<Answer, Failure> {
        self.send(
            format!("http://{address}{}", request.path)
                .parse()
                .expect("a URL"),
            request,
        )
        .await
    }

    async fn send(&self, url: Url, request: &Request) -> Result<Answer, Failure> {
        let mut headers = HeaderMap::new();
        for (name, value) in &request.headers {
            headers.append(
                HeaderName::from_static(name),
                HeaderValue::from_str(value).expect("a header value"),
            );
        }
        let sent = self
            .0
            .request(request.method.clone(), url)
            .headers(headers)
            .timeout(request.timeout)
            .body(request.body.clone())
            .send();
        let failure = |error: reqwest::Error| match error.is_connect() {
            true => Failure::NotSent(reason(&error)),
            false => Failure::Lost(reason(&error)),
        };
        let answer = sent.await.map_err(failure)?;
        let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
        // An answer that breaks off told its status, but not all of itself: lost.
        let body = answer
            .bytes()
            .await
            .map_err(|error| Failure::Lost(reason(&error)))?;
        Ok(Answer {
            status,
            headers,
            body: body.to_vec(),
        })
    }
}

/// The innermost cause, which is the one that tells.
fn reason(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
