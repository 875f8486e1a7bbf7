//! Requests to any HTTP server, by templates.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST};
use http::{HeaderValue, Method, Request, Uri};
use http_body_util::Full;
use percent_encoding::percent_encode;

use crate::client::native::KEY_ESCAPES;
use crate::types::Address;

/// The parts that requests are made of.
#[derive(Debug)]
pub struct Template {
    method: Method,
    content_type: HeaderValue,
    /// One for each server that the URL leads to: where to connect, and the path.
    targets: Vec<(Address, HeaderValue, TemplateText)>,
    body: Option<TemplateText>,
}

/// Text with places to fill.
#[derive(Debug, PartialEq, Eq)]
struct TemplateText(Vec<TemplatePart>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum TemplatePart {
    Text(String),
    Key,
    KeyBase64,
    Value,
    ValueBase64,
}

const PLACES: [(&str, TemplatePart); 4] = [
    ("{key}", TemplatePart::Key),
    ("{key_b64}", TemplatePart::KeyBase64),
    ("{value}", TemplatePart::Value),
    ("{value_b64}", TemplatePart::ValueBase64),
];

impl Template {
    /// Parses the templates of the URL and of the body.
    ///
    /// # Errors
    ///
    /// Says what is wrong with the URL or the content type.
    pub fn new(
        url: &str,
        method: Option<Method>,
        body: Option<&str>,
        content_type: &str,
        servers: &[Address],
    ) -> Result<Self, String> {
        let urls: Vec<String> = match url.contains("{server}") {
            true => servers
                .iter()
                .map(|server| url.replace("{server}", server.as_str()))
                .collect(),
            false => vec![url.to_owned()],
        };
        let targets = urls
            .iter()
            .map(|url| target(url))
            .collect::<Result<Vec<_>, String>>()?;
        let body_default = if body.is_some() {
            Method::POST
        } else {
            Method::GET
        };
        Ok(Self {
            method: method.unwrap_or(body_default),
            content_type: content_type
                .parse()
                .map_err(|_| format!("'{content_type}' is no content type"))?,
            targets,
            body: body.map(TemplateText::parse),
        })
    }

    /// Returns the server that a worker keeps to.
    pub fn server(&self, worker: usize) -> &Address {
        &self.targets[worker % self.targets.len()].0
    }

    /// Fills the templates in and returns the request.
    ///
    /// # Errors
    ///
    /// Fails if the filled-in URL is no URI.
    pub fn request(
        &self,
        worker: usize,
        key: &[u8],
        value: &[u8],
    ) -> Result<Request<Full<Bytes>>, http::Error> {
        let (_, host, path) = &self.targets[worker % self.targets.len()];
        let escaped = percent_encode(key, KEY_ESCAPES).to_string();
        let uri = Uri::from_maybe_shared(Bytes::from(path.fill(escaped.as_bytes(), key, value)))?;
        let request = Request::builder()
            .method(self.method.clone())
            .uri(uri)
            .header(HOST, host.clone());
        let Some(body) = &self.body else {
            return request.body(Full::default());
        };
        let request = request.header(CONTENT_TYPE, self.content_type.clone());
        request.body(Full::new(Bytes::from(body.fill(key, key, value))))
    }
}

fn target(url: &str) -> Result<(Address, HeaderValue, TemplateText), String> {
    let rest = url
        .strip_prefix("http://")
        .ok_or_else(|| format!("'{url}' does not begin with http://"))?;
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let with_port = if authority.contains(':') {
        authority.to_owned()
    } else {
        format!("{authority}:80")
    };
    let address: Address = with_port
        .parse()
        .map_err(|error| format!("'{url}': {error}"))?;
    let host = HeaderValue::from_str(authority).map_err(|error| format!("'{url}': {error}"))?;
    Ok((
        address,
        host,
        TemplateText::parse(if path.is_empty() { "/" } else { path }),
    ))
}

impl TemplateText {
    /// Braces that enclose no known name are text: JSON is full of them.
    fn parse(text: &str) -> Self {
        let mut parts = Vec::new();
        let mut rest = text;
        let next = |rest: &str| {
            let found = PLACES
                .into_iter()
                .filter_map(|(name, part)| rest.find(name).map(|at| (at, name.len(), part)));
            found.min_by_key(|(at, _, _)| *at)
        };
        while let Some((at, length, part)) = next(rest) {
            if at > 0 {
                parts.push(TemplatePart::Text(rest[..at].to_owned()));
            }
            parts.push(part);
            rest = &rest[at + length..];
        }
        if !rest.is_empty() {
            parts.push(TemplatePart::Text(rest.to_owned()));
        }
        Self(parts)
    }

    /// Fills in the placeholders. `key` is the key as it stands in this kind of text, `raw_key` is
    /// what base64 is made of.
    fn fill(&self, key: &[u8], raw_key: &[u8], value: &[u8]) -> Vec<u8> {
        let mut text = Vec::with_capacity(64 + value.len() * 2);
        for part in &self.0 {
            match part {
                TemplatePart::Text(part) => text.extend_from_slice(part.as_bytes()),
                TemplatePart::Key => text.extend_from_slice(key),
                TemplatePart::KeyBase64 => {
                    text.extend_from_slice(STANDARD.encode(raw_key).as_bytes())
                }
                TemplatePart::Value => text.extend_from_slice(value),
                TemplatePart::ValueBase64 => {
                    text.extend_from_slice(STANDARD.encode(value).as_bytes())
                }
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;

    #[tokio::test]
    async fn a_template_drives_the_json_gateway_of_etcd() {
        let body = Some(r#"{"key":"{key_b64}","value":"{value_b64}"}"#);
        let template = Template::new(
            "http://127.0.0.1:2379/v3/kv/put",
            None,
            body,
            "application/json",
            &[],
        )
        .expect("a template");
        assert_eq!(template.server(5).as_str(), "127.0.0.1:2379");
        let request = template.request(0, b"foo", b"bar").expect("a request");
        assert_eq!(
            (request.method(), request.uri().to_string().as_str()),
            (&Method::POST, "/v3/kv/put")
        );
        assert_eq!(request.headers()[HOST], "127.0.0.1:2379");
        let body = request
            .into_body()
            .collect()
            .await
            .expect("in memory")
            .to_bytes();
        assert_eq!(body, r#"{"key":"Zm9v","value":"YmFy"}"#);
    }

    #[test]
    fn workers_share_the_servers_and_keys_are_escaped_in_urls() {
        let servers: Vec<Address> = ["a:1", "b:2"]
            .iter()
            .map(|text| text.parse().expect("an address"))
            .collect();
        let template = Template::new(
            "http://{server}/kv/{key}?x={value}",
            None,
            None,
            "a/b",
            &servers,
        )
        .expect("a template");
        assert_eq!(
            (template.server(0).as_str(), template.server(3).as_str()),
            ("a:1", "b:2")
        );
        let request = template.request(1, b"a b", b"v").expect("a request");
        assert_eq!(
            (request.method(), request.uri().to_string().as_str()),
            (&Method::GET, "/kv/a%20b?x=v")
        );
        assert_eq!(request.headers()[HOST], "b:2");
        for bad in ["https://a:1/", "a:1/x", "http://a:b/", "http:///x"] {
            assert!(Template::new(bad, None, None, "a/b", &[]).is_err(), "{bad}");
        }
    }
}
