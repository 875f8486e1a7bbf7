//! A target for `fuzzing`: what clients are answered by whoever is at an address.

/// Answers as text: a status, header lines, an empty line, and a body.
pub mod answers {
    use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

    use crate::client::native::location;
    use crate::routing::problem;

    pub fn samples() -> Vec<Vec<u8>> {
        let problem = r#"{"type":"urn:quorate:problem:overloaded","title":"Too many requests",
            "status":429,"detail":"overloaded: 8 MiB","code":"overloaded","limit_bytes":4096}"#;
        [
            format!("429\ncontent-type: application/problem+json\nretry-after: 2\n\n{problem}"),
            format!("503\ncontent-type: application/problem+json; charset=utf-8\n\n{problem}"),
            "307\nlocation: http://node-1:4000/v1/kv/a%20b?timeout=5\n\n".into(),
            "307\nlocation: http://[::1]:4000/v1/kv/a\n\n".into(),
            "404\ncontent-type: text/html\n\n<h1>no such page</h1>".into(),
        ]
        .map(String::into_bytes)
        .into()
    }

    pub fn read(bytes: &[u8]) {
        let (head, body) = match bytes.windows(2).position(|two| two == b"\n\n") {
            Some(at) => (&bytes[..at], &bytes[at + 2..]),
            None => (bytes, &b""[..]),
        };
        let mut lines = head.split(|byte| *byte == b'\n');
        let status = lines.next().unwrap_or_default();
        let Ok(status) = StatusCode::from_bytes(status) else {
            return;
        };
        let mut headers = HeaderMap::new();
        for line in lines {
            let Some(colon) = line.iter().position(|byte| *byte == b':') else {
                continue;
            };
            let name = HeaderName::from_bytes(&line[..colon]);
            let value = HeaderValue::from_bytes(line[colon + 1..].trim_ascii());
            if let (Ok(name), Ok(value)) = (name, value) {
                headers.append(name, value);
            }
        }
        let failure = problem::failure(status, &headers, body);
        assert!(!failure.to_string().is_empty());
        if let Some(address) = location(&headers) {
            assert!(address.as_str().parse::<crate::types::Address>().is_ok());
        }
    }
}
