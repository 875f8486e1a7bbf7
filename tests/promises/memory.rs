//! No request ends a process, and none comes back to end it at the next start: a node with 1.2 GB
//! is fed the largest and nastiest that every route takes, and is started again after each.
//!
//! `QUORATE_TEST_LARGE` says how many values of a mebibyte there are to list, to overwrite and to
//! delete (7000 for the whole campaign). Where a control group for memory can be made the kernel
//! holds the limit; where not, the peak of the process is compared with it.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::common::cluster::{Cluster, READY_LIMIT, Setup};
use crate::common::http::Request;
use crate::common::{eventually, from_environment, memory_peak_bytes, say};

const MEMORY_BYTES_MAX: u64 = 1200 << 20;
const MIB: usize = 1 << 20;
/// Longer than any of these requests takes.
const LIMIT: Duration = Duration::from_secs(120);
/// Clients that ask for a mebibyte and do not read it.
const SILENT_CLIENTS: usize = 3000;

/// A control group of the kernel with a limit on memory, for the processes of one node.
struct Group(PathBuf);

impl Group {
    /// None where it can't be made: no root, or no such controller.
    fn new(name: &str) -> Option<Self> {
        let name = format!("quorate-test-{}-{name}", std::process::id());
        let (old, new) = (
            PathBuf::from("/sys/fs/cgroup/memory"),
            PathBuf::from("/sys/fs/cgroup"),
        );
        let (dir, limit) = match old.is_dir() {
            true => (old.join(name), "memory.limit_in_bytes"),
            false => (new.join(name), "memory.max"),
        };
        fs::create_dir(&dir).ok()?;
        let group = Self(dir);
        fs::write(group.0.join(limit), MEMORY_BYTES_MAX.to_string()).ok()?;
        Some(group)
    }

    /// Returns what is put before a program to run it in the group.
    fn wrapper(&self) -> Vec<String> {
        let join = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", self.0.display());
        ["sh", "-c", &join, "sh"].map(str::to_owned).to_vec()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

fn large_values() -> usize {
    usize::try_from(from_environment("QUORATE_TEST_LARGE").unwrap_or(40)).expect("a number of keys")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_ends_a_node_of_its_own() {
    feed_everything(Setup {
        no_view: true,
        ..Setup::nodes(1)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_ends_a_node_of_three() {
    feed_everything(Setup::nodes(3)).await;
}

async fn feed_everything(setup: Setup) {
    let mut cluster = Cluster::prepare(setup).await;
    let groups: Vec<_> = (0..cluster.nodes.len())
        .map_while(|id| Group::new(&id.to_string()))
        .collect();
    if groups.len() < cluster.nodes.len() {
        say(
            "memory: no control group can be made here, so the peak of each process is looked at \
            instead of a limit",
        );
    }
    for (node, group) in cluster.nodes.iter_mut().zip(&groups) {
        node.wrapper = group.wrapper();
    }
    cluster.nodes.iter_mut().for_each(|node| node.start());
    cluster.wait_ready().await;

    let mut victim = Victim {
        cluster,
        large: large_values(),
    };
    victim.fill().await;
    victim.batches_of_gets().await;
    victim.lists().await;
    victim.dialects().await;
    victim.conditions().await;
    victim.clients_that_do_not_read().await;
    victim.batches_that_change_much().await;
}

struct Victim {
    cluster: Cluster,
    /// Keys with a mebibyte each.
    large: usize,
}

impl Victim {
    fn address(&self) -> &str {
        &self.cluster.nodes[0].address
    }

    async fn ask(&self, request: Request) -> (u16, String) {
        let answer = self
            .cluster
            .client
            .ask(self.address(), &request.clone().timeout(LIMIT))
            .await;
        let answer = answer.unwrap_or_else(|failure| panic!("{}: {failure:?}", request.path));
        (answer.status, answer.text())
    }

    async fn batch(&self, operations: &[String]) -> (u16, String) {
        let body = format!(r#"{{"operations":[{}]}}"#, operations.join(","));
        self.ask(post("/v1/batch?timeout=60s", body)).await
    }

    async fn put(&self, key: &str, value: Vec<u8>) {
        let (status, told) = self
            .ask(Request::put(
                format!("/v1/kv/{key}?proxy=true&timeout=60s"),
                value,
            ))
            .await;
        assert!(matches!(status, 200 | 201), "{key}: {status} {told}");
    }

    /// After an attack: every node lives within its memory, knows what it knew, and comes back from
    /// a kill.
    async fn assert_well(&mut self, after: &str) {
        for node in &mut self.cluster.nodes {
            assert_eq!(node.exited(), None, "{} ended after {after}", node.address);
            let peak = memory_peak_bytes(node.pid());
            assert!(
                peak < MEMORY_BYTES_MAX,
                "{} took {peak} bytes after {after}",
                node.address
            );
        }
        let peak = self
            .cluster
            .nodes
            .iter()
            .map(|node| memory_peak_bytes(node.pid()))
            .max()
            .unwrap_or(0);
        say(&format!("memory: {after}: at most {} MiB", peak >> 20));
        self.assert_kept().await;

        for node in &mut self.cluster.nodes {
            node.kill();
            node.start();
        }
        self.cluster.wait_ready().await;
        self.assert_kept().await;
    }

    async fn assert_kept(&self) {
        let kept = eventually(READY_LIMIT, async || {
            let (status, text) = self.ask(Request::get("/v1/kv/kept?proxy=true")).await;
            (status == 200).then_some(text)
        });
        assert_eq!(kept.await.as_deref(), Some("value"));
    }

    async fn fill(&mut self) {
        self.put("kept", b"value".to_vec()).await;
        self.put("{m}huge", vec![b'h'; 8 * MIB]).await;
        for n in 0..self.large {
            let mut value = vec![b'v'; MIB];
            value[..8].copy_from_slice(format!("{n:08}").as_bytes());
            self.put(&format!("{{m}}{n}"), value).await;
        }
        self.assert_well("filling").await;
    }

    async fn batches_of_gets(&mut self) {
        let get = |key: &str| format!(r#"{{"op":"get","key":"{key}"}}"#);
        let put = r#"{"op":"put","key":"{m}side","value":"x"}"#.to_owned();
        for (key, count) in [("{m}0", 8000), ("{m}huge", 60), ("{m}huge", 100)] {
            let gets = vec![get(key); count];
            let (status, told) = self.batch(&gets).await;
            assert_eq!(status, 413, "{count} gets: {told:.300}");
            let (status, told) = self.batch(&[gets, vec![put.clone()]].concat()).await;
            assert_eq!(status, 413, "{count} gets and a put: {told:.300}");
            let (status, _) = self.ask(Request::get("/v1/kv/{m}side?proxy=true")).await;
            assert_eq!(status, 404, "what is too large is not done");
            self.assert_well(&format!("{count} gets of {key}")).await;
        }
        for rest in [vec![], vec![put]] {
            let gets = vec![get("{m}0"); 15];
            let before = self.cluster.metric(0, "quorate_group_applied_index").await;
            let (status, told) = self.batch(&[gets, rest.clone()].concat()).await;
            assert_eq!(status, 200, "{told:.300}");
            assert_eq!(told.matches("00000000vvvv").count(), 15);
            if rest.is_empty() && self.cluster.nodes.len() == 1 {
                let after = self.cluster.metric(0, "quorate_group_applied_index").await;
                assert_eq!(after, before, "gets alone make no entry");
            }
        }
        self.assert_well("gets that fit").await;
    }

    async fn lists(&mut self) {
        for query in [
            "limit=1000",
            "limit=1000&reverse=true",
            "limit=1&keys_only=true",
            "limit=1000&keys_only=true",
        ] {
            let asked =
                (0..16).map(|_| self.ask(Request::get(format!("/v1/kv?{query}&timeout=60s"))));
            for (status, told) in futures::future::join_all(asked).await {
                // A small machine may have no time left for all of them.
                assert!(
                    matches!(status, 200 | 429 | 503),
                    "{query}: {status} {told:.300}"
                );
            }
        }
        let (status, told) = self
            .ask(Request::get("/v1/kv?limit=1000&keys_only=true&timeout=60s"))
            .await;
        assert_eq!(
            (status, told.matches("{m}").count() > self.large.min(900)),
            (200, true),
            "{told:.300}"
        );
        self.assert_well("listings").await;
    }

    async fn dialects(&mut self) {
        let plain = |count: usize| format!("[{}]", vec![r#"{"key":"{m}0"}"#; count].join(","));
        let encoded = |count: usize| {
            format!(
                "[{}]",
                vec![r#"{"encoding":"string","data":"{m}0"}"#; count].join(",")
            )
        };
        let bodies = [
            ("POST /get", plain(100)),
            ("POST /fetch", encoded(100)),
            ("POST /query", encoded(8000)),
            ("GET /fetch", String::new()),
        ];
        for (route, body) in bodies {
            let length = body.len();
            let request = format!(
                "{route} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: \
                {length}\r\n\r\n{body}"
            );
            let (status, bytes) = read_through(self.address(), &request).await;
            assert_eq!(status, 200, "{route}");
            say(&format!("memory: {route}: {} MiB", bytes >> 20));
        }
        let value = "w".repeat(MIB);
        let pairs: Vec<String> = (0..20)
            .map(|n| format!(r#"{{"key":"{{m}}{n}","value":"{value}"}}"#))
            .collect();
        let (status, told) = self
            .ask(post("/set", format!("[{}]", pairs.join(","))))
            .await;
        assert_eq!(status, 200, "{told:.300}");
        self.assert_well("the batches of the dialects").await;
    }

    async fn conditions(&mut self) {
        let revisions = format!("1{}", ",1".repeat(12_000_000));
        let (status, told) = self
            .batch(&[format!(
                r#"{{"op":"put","key":"{{m}}side","value":"x","if_revision":[{revisions}]}}"#
            )])
            .await;
        assert!((400..500).contains(&status), "{status} {told:.300}");
        self.assert_well("twelve million revisions").await;
    }

    async fn clients_that_do_not_read(&mut self) {
        for route in ["/v1/kv/%7Bm%7D1", "/kvs/keys/%7Bm%7D1"] {
            let mut silent = Vec::new();
            for _ in 0..SILENT_CLIENTS {
                // What the node has no room for it may refuse to take at all.
                if let Ok(client) = ask_and_stay_silent(self.address(), route).await {
                    silent.push(client);
                }
            }
            let served = eventually(READY_LIMIT, async || {
                let (status, _) = self.ask(Request::get("/v1/kv/kept?proxy=true")).await;
                (status == 200).then_some(())
            });
            assert!(served.await.is_some(), "others are served meanwhile");
            drop(silent);
            self.assert_well(&format!("{SILENT_CLIENTS} silent clients of {route}"))
                .await;
        }
    }

    async fn batches_that_change_much(&mut self) {
        let keys = |count: usize| (0..count).map(|n| format!("{{m}}{n}"));
        let puts: Vec<String> = keys(7000.min(self.large))
            .map(|key| format!(r#"{{"op":"put","key":"{key}","value":"x"}}"#))
            .collect();
        let (status, told) = self.batch(&puts[..puts.len() / 2]).await;
        assert_eq!(status, 200, "{told:.300}");
        self.assert_well("overwriting").await;
        let deletes: Vec<String> = keys(7000)
            .map(|key| format!(r#"{{"op":"delete","key":"{key}"}}"#))
            .collect();
        let (status, told) = self.batch(&deletes).await;
        assert_eq!(status, 200, "{told:.300}");
        self.assert_well("7000 deletions").await;
        let (status, told) = self
            .ask(Request::get("/v1/kv?limit=10&keys_only=true&timeout=60s"))
            .await;
        assert_eq!(
            (status, told.matches("{m}").count()),
            (200, 2),
            "what is left: {told:.300}"
        );
    }
}

fn post(path: &str, body: String) -> Request {
    Request {
        body: body.into(),
        ..Request::new(reqwest::Method::POST, path)
    }
}

/// Asks for a large answer over a connection that takes in little, and does not read it.
async fn ask_and_stay_silent(address: &str, path: &str) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(4096)?;
    let mut stream = socket.connect(address.parse().expect("an address")).await?;
    stream
        .write_all(format!("GET {path}?proxy=true HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes())
        .await?;
    Ok(stream)
}

/// The status of an answer, and how long it is; nothing of it is kept.
async fn read_through(address: &str, request: &str) -> (u16, usize) {
    let mut stream = TcpStream::connect(address).await.expect("a connection");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let (mut status, mut bytes, mut piece) = (0, 0, vec![0; 64 << 10]);
    loop {
        let read = tokio::time::timeout(LIMIT, stream.read(&mut piece))
            .await
            .expect("an answer in time")
            .expect("an answer");
        if read == 0 {
            return (status, bytes);
        }
        if bytes == 0 {
            let head = String::from_utf8_lossy(&piece[..read.min(20)]).into_owned();
            status = head
                .split(' ')
                .nth(1)
                .and_then(|status| status.parse().ok())
                .unwrap_or(0);
        }
        bytes += read;
    }
}
