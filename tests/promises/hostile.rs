//! No request of whatever bytes, to whatever route of whatever dialect, through a node or a
//! gateway, makes a server fail, hang or forget: every route times every kind of hostile body and
//! path.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::common::cluster::{Cluster, READY_LIMIT, Setup};
use crate::common::http::Request;
use crate::common::{eventually, say};

/// Longer than any answer takes. One that does not come in this time never will.
const HANG_LIMIT: Duration = Duration::from_secs(60);

/// Where keys come in the path, `KEY` stands for one.
const ROUTES: [&str; 28] = [
    "PUT /set",
    "POST /set",
    "PUT /fetch",
    "POST /fetch",
    "GET /fetch",
    "POST /query",
    "POST /get",
    "POST /set/KEY",
    "GET /set/KEY",
    "GET /get/KEY",
    "POST /get/KEY",
    "PUT /kvs/keys/KEY",
    "GET /kvs/keys/KEY",
    "DELETE /kvs/keys/KEY",
    "PUT /kvs/KEY",
    "GET /kvs/key-count",
    "GET /kvs/shards",
    "GET /kvs/shards/KEY",
    "PUT /kvs/view-change",
    "PUT /proxy/view-change",
    "PUT /v1/kv/KEY?proxy=true",
    "GET /v1/kv/KEY?proxy=true",
    "DELETE /v1/kv/KEY?proxy=true",
    "GET /v1/kv?start=KEY",
    "POST /v1/batch",
    "PUT /v1/cluster/view?dry_run=true",
    "GET /v1/cluster/operations/KEY",
    "POST /v1/cluster/shards/KEY/leader",
];

/// Instead of a key: more of it, less of it, and what is no text.
fn paths() -> Vec<String> {
    let numbers = ["0", "-1", "1e999", "18446744073709551616"].map(str::to_owned);
    let texts = [
        "%ff",
        "%FF%FE%00",
        "%",
        "%zz",
        "%c3%28",
        "..",
        "../../etc/passwd",
        "a%2Fb",
        "a//b",
        "%ED%A0%80",
        "'\"<>",
    ];
    let long = [50, 51, 4096, 4097, 60_000].map(|length| "k".repeat(length));
    let escaped = "%C3%BC".repeat(3000);
    numbers
        .into_iter()
        .chain(texts.map(str::to_owned))
        .chain(long)
        .chain([String::new(), "9".repeat(300), escaped])
        .collect()
}

fn bodies() -> Vec<(&'static str, Vec<u8>)> {
    let deep = |open: &str, inner: &str, close: &str| {
        [
            open.repeat(100_000),
            inner.to_owned(),
            close.repeat(100_000),
        ]
        .concat()
    };
    let number = "9".repeat(300);
    let long_key = "k".repeat(5000);
    let texts: Vec<(&'static str, String)> = vec![
        ("nothing", String::new()),
        ("no JSON", "nonsense".into()),
        (
            "not all of it",
            r#"[{"key":{"encoding":"string","data":"a"#.into(),
        ),
        ("two of them", "[] []".into()),
        ("a comma too many", r#"[{"key":"a"},]"#.into()),
        (
            "a list that is not closed, 100,000 deep",
            "[".repeat(100_000),
        ),
        (
            "objects that are not closed, 100,000 deep",
            r#"{"value":"#.repeat(100_000),
        ),
        ("a list, 100,000 deep", deep("[", "", "]")),
        ("an object, 100,000 deep", deep(r#"{"a":"#, "1", "}")),
        (
            "a deep value",
            format!(r#"{{"value":{}}}"#, deep("[", "1", "]")),
        ),
        (
            "a deep view",
            format!(
                r#"{{"view":{0},"nodes":{0},"to":{0},"operations":{0}}}"#,
                deep("[", "", "]")
            ),
        ),
        (
            "a deep key of a pair",
            format!(r#"[{{"key":{},"value":"v"}}]"#, deep("[", "", "]")),
        ),
        (
            "a deep value of a pair",
            format!(r#"[{{"key":"a","value":{}}}]"#, deep(r#"{"a":"#, "1", "}")),
        ),
        (
            "deep data",
            format!(
                r#"[{{"key":{{"encoding":"string","data":{}}},"value":1}}]"#,
                deep("[", "", "]")
            ),
        ),
        ("null", "null".into()),
        ("a number", "7".into()),
        ("a text", r#""text""#.into()),
        ("an empty text", r#""""#.into()),
        ("an empty list", "[]".into()),
        ("an empty object", "{}".into()),
        (
            "elements of wrong types",
            r#"[1, null, "a", [], {}, true]"#.into(),
        ),
        (
            "wrong types of pairs",
            r#"[{"key":1,"value":{}},{"key":null},{"key":[],"value":[]}]"#.into(),
        ),
        (
            "wrong types of encoded pairs",
            r#"[{"key":{"encoding":1,"data":{}},"value":{"encoding":[],"data":null}}]"#.into(),
        ),
        (
            "unknown encodings",
            r#"[{"key":{"encoding":"hex","data":"ff"},"value":{"encoding":"","data":""}}]"#.into(),
        ),
        (
            "no bits",
            concat!(
                r#"[{"key":{"encoding":"binary","data":"012"},"#,
                r#""value":{"encoding":"binary","data":"é"}}]"#
            )
            .into(),
        ),
        (
            "wrong types of fields",
            concat!(
                r#"{"value":null,"view":5,"repl-factor":"2","#,
                r#""causal-context":[1],"nodes":{},"to":1}"#
            )
            .into(),
        ),
        (
            "a number beyond all",
            concat!(
                r#"{"value":1e999,"view":1e999,"repl-factor":1e999,"#,
                r#""replication_factor":1e999,"to":-1e999}"#
            )
            .into(),
        ),
        (
            "a number below all",
            r#"{"view":"","repl-factor":-1,"replication_factor":-1,"shards":-1}"#.into(),
        ),
        (
            "300 digits",
            format!(
                concat!(
                    r#"{{"value":{number},"repl-factor":{number},"#,
                    r#""shards":{number},"operations":{number}}}"#
                ),
                number = number
            ),
        ),
        (
            "pairs of 300 digits",
            format!(r#"[{{"key":{number},"value":{number}}},1e999,-1e-999,{number}]"#),
        ),
        (
            "a hundred thousand digits",
            format!(
                r#"{{"value":{0},"repl-factor":0.{0}e{0}}}"#,
                "7".repeat(100_000)
            ),
        ),
        (
            "a member twice",
            concat!(
                r#"{"value":1,"value":"b","view":"a","view":"","#,
                r#""nodes":[],"nodes":["x"],"to":"a","to":"b"}"#
            )
            .into(),
        ),
        (
            "members of pairs twice",
            r#"[{"key":"a","key":"b","value":"1","value":"2"},{"key":"a","key":{}}]"#.into(),
        ),
        (
            "the same key twice",
            r#"[{"key":"a","value":"1"},{"key":"a","value":"2"}]"#.into(),
        ),
        (
            "half a surrogate",
            r#"[{"key":"\ud800","value":"\udfff"}]"#.into(),
        ),
        (
            "half a surrogate as a value",
            r#"{"value":"\ud800","\ud800":"\ud800"}"#.into(),
        ),
        (
            "a key that is too long",
            format!(r#"[{{"key":"{long_key}","value":"v"}}]"#),
        ),
        (
            "an encoded key too long",
            format!(r#"[{{"key":{{"encoding":"string","data":"{long_key}"}},"value":{{}}}}]"#),
        ),
        (
            "an operation of a key too long",
            format!(r#"{{"operations":[{{"op":"get","key":"{long_key}"}}]}}"#),
        ),
        (
            "no addresses",
            concat!(
                r#"{"view":"nonsense,,:0,a:99999999,[::1","#,
                r#""nodes":["nonsense",":0"],"to":"nonsense"}"#
            )
            .into(),
        ),
        ("control characters", "{\"value\":\"\u{0}\u{1}\n\"}".into()),
        ("a byte order mark", "\u{feff}[]".into()),
    ];
    let mut bodies: Vec<(&'static str, Vec<u8>)> = texts
        .into_iter()
        .map(|(name, text)| (name, text.into_bytes()))
        .collect();
    bodies.push(("no text", b"\xff\xfe\x00\x80".to_vec()));
    bodies.push((
        "a text that is none",
        b"{\"value\":\"\xff\",\"view\":\"\xc3\x28\",\"to\":\"\xff\"}".to_vec(),
    ));
    bodies.push((
        "pairs that are no text",
        b"[{\"key\":\"\xff\",\"value\":\"\xed\xa0\x80\"}]".to_vec(),
    ));
    bodies.push((
        "encoded pairs that are none",
        b"[{\"key\":{\"encoding\":\"string\",\"data\":\"\xff\"}}]".to_vec(),
    ));
    bodies
}

/// A request as it goes over the wire, what is wrong with it, and whether its sender hangs up in
/// the middle.
struct Attack {
    name: String,
    bytes: Vec<u8>,
    cut_off: bool,
}

impl Attack {
    fn new(route: &str, key: &str, headers: &str, body: &[u8], what: &str) -> Self {
        let route = route.replace("KEY", key);
        let head = format!("{route} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n");
        Self {
            name: format!("{what}: {route:.80}"),
            bytes: [head.as_bytes(), body].concat(),
            cut_off: false,
        }
    }

    fn cut_off(self) -> Self {
        Self {
            cut_off: true,
            ..self
        }
    }
}

fn attacks(route: &str) -> Vec<Attack> {
    let mut attacks = Vec::new();
    for (what, body) in bodies() {
        let length = format!("content-length: {}\r\n", body.len());
        attacks.push(Attack::new(route, "hostile", &length, &body, what));
    }
    if route.contains("KEY") {
        for key in paths() {
            let body = br#"{"value":1}"#;
            attacks.push(Attack::new(
                route,
                &key,
                &format!("content-length: {}\r\n", body.len()),
                body,
                "a path",
            ));
        }
    }
    let chunked = "transfer-encoding: chunked\r\n";
    let declared = "content-length: 1000\r\n";
    attacks.extend([
        // Announced alone: the refusal does not wait for the bytes.
        Attack::new(
            route,
            "hostile",
            &format!("content-length: {}\r\n", (64 << 20) + 1),
            b"",
            "a body that is too large",
        )
        .cut_off(),
        Attack::new(
            route,
            "hostile",
            &format!("content-length: {}\r\n", u64::MAX),
            b"",
            "a body without end",
        )
        .cut_off(),
        Attack::new(
            route,
            "hostile",
            chunked,
            b"5\r\n[{\"ke\r\n",
            "chunks that are cut off",
        )
        .cut_off(),
        Attack::new(
            route,
            "hostile",
            chunked,
            b"ff",
            "a chunk's length that is cut off",
        )
        .cut_off(),
        Attack::new(
            route,
            "hostile",
            chunked,
            b"zz\r\n[]\r\n0\r\n\r\n",
            "chunks without a length",
        ),
        Attack::new(
            route,
            "hostile",
            chunked,
            b"ffffffffffffffffff\r\n[]\r\n",
            "a chunk of more bytes than there are",
        )
        .cut_off(),
        Attack::new(
            route,
            "hostile",
            declared,
            b"{\"value\":1}",
            "less than was declared",
        )
        .cut_off(),
    ]);
    attacks
}

/// What is answered; none: the connection was closed without an answer.
async fn answer(address: &str, attack: &Attack) -> Option<u16> {
    let mut stream = TcpStream::connect(address)
        .await
        .unwrap_or_else(|error| panic!("{}: {error}", attack.name));
    // It may be refused and closed before all is sent: what counts is the answer.
    let _ = stream.write_all(&attack.bytes).await;
    if attack.cut_off {
        let _ = stream.shutdown().await;
    }
    let (mut answer, mut piece) = (Vec::new(), vec![0; 64 << 10]);
    while let Ok(bytes @ 1..) = stream.read(&mut piece).await {
        answer.extend_from_slice(&piece[..bytes]);
    }
    let head = String::from_utf8_lossy(&answer[..answer.len().min(20)]).into_owned();
    (!head.is_empty()).then(|| {
        head.split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok())
            .unwrap_or(0)
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_makes_a_server_fail_or_hang() {
    let mut cluster = Cluster::start(Setup {
        no_view: true,
        ..Setup::nodes(1)
    })
    .await;
    let mut gateway = cluster.gateway(0, &[&cluster.nodes[0].address]);
    gateway.start();
    let kept = Request::put("/v1/kv/kept?proxy=true", "value");
    let stored = eventually(READY_LIMIT, async || {
        let answer = cluster.client.ask_only(&gateway.address, &kept).await;
        answer
            .is_ok_and(|answer| answer.status == 201 || answer.status == 200)
            .then_some(())
    });
    stored.await.expect("the gateway serves");
    let mut count = 0;
    for address in [cluster.nodes[0].address.clone(), gateway.address.clone()] {
        for attack in ROUTES.iter().flat_map(|route| attacks(route)) {
            let status = tokio::time::timeout(HANG_LIMIT, answer(&address, &attack)).await;
            let status =
                status.unwrap_or_else(|_| panic!("no answer at {address} to {}", attack.name));
            match status {
                Some(status) => assert!(
                    (200..500).contains(&status),
                    "{status} at {address} to {}",
                    attack.name
                ),
                None => assert!(
                    attack.cut_off,
                    "the connection was closed at {address} on {}",
                    attack.name
                ),
            }
            count += 1;
        }
        let got = cluster
            .client
            .ask_only(&address, &Request::get("/v1/kv/kept?proxy=true"))
            .await
            .expect("an answer");
        assert_eq!(
            (got.status, got.text().as_str()),
            (200, "value"),
            "at {address}"
        );
    }
    assert_eq!(
        (cluster.nodes[0].exited(), gateway.exited()),
        (None, None),
        "both live"
    );
    let status = cluster.status().await;
    assert_eq!(
        (status.epoch, status.nodes.len()),
        (1, 1),
        "the view has not changed"
    );
    say(&format!("hostile: {count} requests answered"));
}
