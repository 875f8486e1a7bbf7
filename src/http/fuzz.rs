//! Requests, as a target for `fuzzing`: of every dialect, and of the routes between nodes.

/// Requests as text: method and path, header lines, an empty line, and a body. They go through the
/// route table, to a store in memory.
pub mod requests {
    use std::time::Duration;

    use axum::body::Body;
    use http::{HeaderName, HeaderValue, Method, Request, StatusCode, Uri};
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    use crate::api::fuzz as peers;
    use crate::http::testing;

    /// Requests of the native dialect, of the fixed ones, and of peers.
    const SAMPLES: &[&str] = &[
        "GET /",
        "GET /healthz",
        "GET /readyz?group=1",
        "GET /metrics",
        "GET /v1/kv?prefix=a%20&limit=10&reverse=true&keys_only=true&timeout=100ms",
        "GET /v1/kv?prefix=a&cursor=YQ&consistency=stale&limit=1000",
        "GET /v1/kv/a%20b%FF?consistency=stale&timeout=2&proxy=true",
        "HEAD /v1/kv/a\nif-none-match: \"1\", W/\"2\" , *",
        "PUT /v1/kv/{tag}a?timeout=1s\ncontent-type: image/png\nidempotency-key: once\n\nvalue",
        "PUT /v1/kv/a\nif-match: \"1\", \"300\"\ncontent-type: application/json\n\n{\"a\":[1.5e3]}",
        "PUT /v1/kv/a\nif-none-match: *\ncontent-type: text/plain; charset=utf-8\n\ngr\u{fc}n",
        "DELETE /v1/kv/a\nif-match: *\n\n",
        "POST /v1/batch?timeout=1s\ncontent-type: application/json\nidempotency-key: once\n\n\
            {\"operations\":[{\"op\":\"put\",\"key\":\"a\",\"value\":\"1\",\"if_absent\":true},\
            {\"op\":\"put\",\"key\":\"b\",\"value\":\"AP8=\",\"encoding\":\"base64\",\
            \"media_type\":\"image/png\",\"if_revision\":3},{\"op\":\"get\",\"key\":\"YQ==\",\
            \"key_encoding\":\"base64\"},{\"op\":\"delete\",\"key\":\"c\",\"if_match\":[1,2],\
            \"if_present\":true}]}",
        "GET /v1/cluster",
        "GET /v1/cluster/view\nif-none-match: \"1\"",
        "PUT /v1/cluster/view?dry_run=true&wait=10ms\nif-match: \"1\"\n\n\
            {\"nodes\":[\"a:1\",\"b:2\"],\"shards\":3,\"replication_factor\":2,\"layout\":\
            \"exclusive\"}",
        "GET /v1/cluster/operations/2?wait=10ms",
        "POST /v1/cluster/shards/1/leader\n\n{\"to\":\"b:2\"}",
        "GET /v1/node/scrub",
        "POST /v1/node/scrub",
        "PUT /set\n\n[{\"key\":{\"encoding\":\"string\",\"data\":\"a\"},\
            \"value\":{\"encoding\":\"binary\",\"data\":\"01100001\"}}]",
        "POST /fetch\n\n[{\"encoding\":\"string\",\"data\":\"a\"},{\"encoding\":\"binary\",\
            \"data\":\"1010\"}]",
        "GET /fetch",
        "POST /query\n\n[{\"encoding\":\"string\",\"data\":\"\\u00e9\\ud83d\\ude00\"}]",
        "POST /set\n\n[{\"key\":\"hi\",\"value\":\"hello\"},{\"key\":\"h\\\"\",\"value\":7}]",
        "POST /get\n\n[{\"key\":\"hi\"},{\"key\":\"a\"}]",
        "POST /set/key1\n\n{\"hello\":[\"world\",1.0,null,true,-1e-7]}",
        "GET /get/key1",
        "GET /get/gr%C3%BC%C3%9Fe",
        "PUT /kvs/keys/a%2Fb\n\n{\"value\":\"v\",\"causal-context\":{\"a\":1}}",
        "GET /kvs/keys/a\n\n{\"causal-context\":{}}",
        "DELETE /kvs/a\n\n{\"causal-context\":null}",
        "GET /kvs/key-count",
        "GET /kvs/shards",
        "GET /kvs/shards/1",
        "PUT /kvs/view-change\n\n{\"view\":\"a:1,b:2\",\"repl-factor\":2}",
        "PUT /proxy/view-change\n\n{\"view\":[\"a:1\",\"b:2\"],\"repl-factor\":\"1\"}",
        "POST /peer/lane/log\n\nbytes",
        "GET /peer/identity\nif-none-match: \"0000000000000000\"",
        "GET /peer/replicas",
        "GET /peer/view",
        "POST /peer/invite\n\n[\"a:1\"]",
        "POST /peer/hold\n\n{\"cluster\":\"00000000000000000000000000000007\",\"hold\":true}",
    ];

    pub fn samples() -> Vec<Vec<u8>> {
        let mut samples: Vec<Vec<u8>> = SAMPLES.iter().map(|text| text.as_bytes().into()).collect();
        let post =
            |path: &str, body: Vec<u8>| [format!("POST {path}\n\n").into_bytes(), body].concat();
        for body in peers::shard_calls::samples() {
            samples.push(post("/peer/shard", body));
        }
        for body in peers::peer_messages::samples() {
            for path in ["promise", "announce", "greet", "failures", "disk"] {
                samples.push(post(&format!("/peer/{path}"), body.clone()));
            }
        }
        samples
    }

    fn parse(bytes: &[u8]) -> Option<Request<Body>> {
        let (head, body) = match bytes.windows(2).position(|two| two == b"\n\n") {
            Some(at) => (&bytes[..at], &bytes[at + 2..]),
            None => (bytes, &b""[..]),
        };
        let mut lines = head.split(|byte| *byte == b'\n');
        let line = lines.next()?;
        let space = line.iter().position(|byte| *byte == b' ')?;
        let mut request = Request::new(Body::from(body.to_vec()));
        *request.method_mut() = Method::from_bytes(&line[..space]).ok()?;
        *request.uri_mut() = Uri::try_from(&line[space + 1..]).ok()?;
        for line in lines {
            let colon = line.iter().position(|byte| *byte == b':')?;
            let name = HeaderName::from_bytes(&line[..colon]).ok()?;
            let value = HeaderValue::from_bytes(line[colon + 1..].trim_ascii()).ok()?;
            request.headers_mut().append(name, value);
        }
        Some(request)
    }

    pub fn read(bytes: &[u8]) {
        let Some(request) = parse(bytes) else {
            return;
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            let router = testing::router();
            let answered = async {
                let Ok(response) = router.oneshot(request).await;
                let (head, body) = response.into_parts();
                // An answer that breaks off is one that says so.
                let _ = body.collect().await;
                head.status
            };
            let status = tokio::time::timeout(Duration::from_secs(3600), answered)
                .await
                .expect("an answer");
            assert_ne!(status, StatusCode::INTERNAL_SERVER_ERROR);
        });
    }
}
