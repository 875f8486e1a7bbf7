//! Each dialect while leaders are killed in the middle of its batches, asked of nodes and of a
//! gateway: what was acknowledged is there, what failed may or may not be, and nothing else has
//! changed, as another dialect tells.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, stream};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use reqwest::Method;
use serde_json::{Value, json};

use crate::common::cluster::{Cluster, Setup};
use crate::common::http::{Answer, Client, Failure, Request};
use crate::common::{eventually, say, seed};

/// Far beyond what a failover takes: a bound for a cluster that is stuck.
const FAILOVER_LIMIT: Duration = Duration::from_secs(60);

/// A dialect's way to write and to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dialect {
    EncodedBatch,
    LoadBalancer,
    Kvs,
    KvsReplicated,
    KvsByProxy,
    PlainBatch,
}

/// Each dialect, and by which other one it is read in the end.
const TABLE: [(Dialect, Dialect); 6] = [
    (Dialect::EncodedBatch, Dialect::PlainBatch),
    (Dialect::LoadBalancer, Dialect::EncodedBatch),
    (Dialect::Kvs, Dialect::LoadBalancer),
    (Dialect::KvsByProxy, Dialect::PlainBatch),
    (Dialect::PlainBatch, Dialect::Kvs),
    (Dialect::KvsReplicated, Dialect::EncodedBatch),
];

/// Single requests under way at once, by dialects without batches.
const CONCURRENCY: usize = 8;

/// What became of the write of one key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Acknowledged,
    /// It may have been done.
    Unknown,
    /// Nobody has seen it.
    NotSent,
}

impl Dialect {
    /// Keys that are written together: enough for more than one entry in each shard, where there
    /// are batches.
    fn keys(self) -> usize {
        match self {
            Dialect::EncodedBatch | Dialect::PlainBatch => 4500,
            Dialect::LoadBalancer | Dialect::Kvs | Dialect::KvsReplicated | Dialect::KvsByProxy => {
                60
            }
        }
    }

    /// Writes all pairs; the fate of each, in order.
    async fn write(self, client: &Client, address: &str, pairs: &[(String, String)]) -> Vec<Fate> {
        match self {
            Dialect::EncodedBatch => {
                let body: Vec<Value> = pairs
                    .iter()
                    .map(|(key, value)| json!({"key": encoded(key), "value": encoded(value)}))
                    .collect();
                fates_of_encoded(
                    send(client, address, "PUT", "/set", json!(body)).await,
                    pairs,
                )
            }
            Dialect::PlainBatch => {
                let body: Vec<Value> = pairs
                    .iter()
                    .map(|(key, value)| json!({"key": key, "value": value}))
                    .collect();
                vec![
                    fate(
                        send(client, address, "POST", "/set", json!(body)).await,
                        &[200],
                        &[503]
                    );
                    pairs.len()
                ]
            }
            Dialect::LoadBalancer | Dialect::Kvs | Dialect::KvsReplicated | Dialect::KvsByProxy => {
                let write = |(key, value): &'_ (String, String)| {
                    self.write_one(client, address, key.clone(), value.clone())
                        .boxed()
                };
                let writes: Vec<BoxFuture<'_, Fate>> = pairs.iter().map(write).collect();
                stream::iter(writes).buffered(CONCURRENCY).collect().await
            }
        }
    }

    async fn write_one(self, client: &Client, address: &str, key: String, value: String) -> Fate {
        if self == Dialect::LoadBalancer {
            return fate(
                send(
                    client,
                    address,
                    "POST",
                    &format!("/set/{key}"),
                    json!(value),
                )
                .await,
                &[200],
                &[503],
            );
        }
        let mut body = json!({"value": value});
        if self == Dialect::KvsReplicated {
            body["causal-context"] = json!({"after": key});
        }
        let answer = send(client, address, "PUT", &format!("/kvs/keys/{key}"), body).await;
        if let (Dialect::KvsReplicated, Ok(answer)) = (self, &answer) {
            assert_eq!(
                json_of(answer)["causal-context"],
                json!({"after": key}),
                "{}",
                answer.text()
            );
        }
        fate(answer, &[200, 201], &[503])
    }

    /// The values of these keys; none: there is no such key.
    async fn read(self, client: &Client, address: &str, keys: &[String]) -> Vec<Option<String>> {
        let asked: Vec<Value> = match self {
            Dialect::EncodedBatch => keys.iter().map(|key| encoded(key)).collect(),
            _ => keys.iter().map(|key| json!({"key": key})).collect(),
        };
        match self {
            Dialect::EncodedBatch => {
                let found = json_of(&read(client, address, "POST", "/fetch", json!(asked)).await);
                let values = found
                    .as_array()
                    .expect("a list")
                    .iter()
                    .map(|pair| &pair["value"]);
                values
                    .map(|value| (value["encoding"] == "string").then(|| text(&value["data"])))
                    .collect()
            }
            Dialect::PlainBatch => {
                let found = json_of(&read(client, address, "POST", "/get", json!(asked)).await);
                let pairs = found["existedKey"].as_array().cloned().unwrap_or_default();
                let mut values: BTreeMap<String, String> = pairs
                    .iter()
                    .map(|pair| (text(&pair["key"]), text(&pair["value"])))
                    .collect();
                keys.iter().map(|key| values.remove(key)).collect()
            }
            Dialect::LoadBalancer | Dialect::Kvs | Dialect::KvsReplicated | Dialect::KvsByProxy => {
                let reads = keys.iter().map(|key| self.read_one(client, address, key));
                stream::iter(reads).buffered(CONCURRENCY).collect().await
            }
        }
    }

    async fn read_one(self, client: &Client, address: &str, key: &str) -> Option<String> {
        if self == Dialect::LoadBalancer {
            let told = read(client, address, "GET", &format!("/get/{key}"), Value::Null)
                .await
                .text();
            let value = told.strip_prefix(r#"response from server:"retrived key value is "#);
            return value.map(|value| value.trim_end_matches('"').to_owned());
        }
        let found = read(
            client,
            address,
            "GET",
            &format!("/kvs/keys/{key}"),
            Value::Null,
        )
        .await;
        (found.status == 200).then(|| text(&json_of(&found)["value"]))
    }
}

fn encoded(data: &str) -> Value {
    json!({"encoding": "string", "data": data})
}

fn text(value: &Value) -> String {
    value
        .as_str()
        .unwrap_or_else(|| panic!("{value} is no text"))
        .to_owned()
}

fn json_of(answer: &Answer) -> Value {
    serde_json::from_slice(&answer.body).unwrap_or_else(|error| panic!("{error}: {answer:?}"))
}

async fn send(
    client: &Client,
    address: &str,
    method: &str,
    path: &str,
    body: Value,
) -> Result<Answer, Failure> {
    let body = if body.is_null() {
        Vec::new()
    } else {
        body.to_string().into_bytes()
    };
    let request = Request {
        body,
        ..Request::new(method.parse::<Method>().expect("a method"), path)
    };
    client
        .ask_only(address, &request.timeout(FAILOVER_LIMIT))
        .await
}

/// Asks until there is an answer other than that there is none now.
async fn read(client: &Client, address: &str, method: &str, path: &str, body: Value) -> Answer {
    let mut last = String::new();
    let answer = eventually(FAILOVER_LIMIT, async || {
        let answer = send(client, address, method, path, body.clone()).await;
        last = format!("{answer:?}");
        answer.ok().filter(|answer| answer.status != 503)
    });
    answer
        .await
        .unwrap_or_else(|| panic!("{method} {path}: {last:.500}"))
}

fn fate(answer: Result<Answer, Failure>, done: &[u16], unable: &[u16]) -> Fate {
    match answer {
        Ok(answer) if done.contains(&answer.status) => Fate::Acknowledged,
        Ok(answer) if unable.contains(&answer.status) => Fate::Unknown,
        Ok(answer) => panic!("{} {:.500}", answer.status, answer.text()),
        Err(Failure::Lost(_)) => Fate::Unknown,
        Err(Failure::NotSent(_)) => Fate::NotSent,
    }
}

/// `PUT /set` names the keys that failed; the status and the count fit.
fn fates_of_encoded(answer: Result<Answer, Failure>, pairs: &[(String, String)]) -> Vec<Fate> {
    let all = match &answer {
        Ok(answer) if matches!(answer.status, 200 | 206) => json_of(answer),
        _ => return vec![fate(answer, &[], &[]); pairs.len()],
    };
    let failed: BTreeSet<String> = all[0]["keys_failed"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|key| text(&key["data"]))
        .collect();
    assert_eq!(all[0]["keys_added"], json!(pairs.len() - failed.len()));
    assert_eq!(
        answer.map(|answer| answer.status).ok(),
        Some(if failed.is_empty() { 200 } else { 206 })
    );
    pairs
        .iter()
        .map(|(key, _)| {
            if failed.contains(key) {
                Fate::Unknown
            } else {
                Fate::Acknowledged
            }
        })
        .collect()
}

/// What each key may hold: the last acknowledged value, and those that may have been stored since.
#[derive(Debug, Default)]
struct Ledger {
    keys: Vec<String>,
    possible: Vec<BTreeSet<Option<String>>>,
}

impl Ledger {
    fn new(keys: Vec<String>) -> Self {
        let possible = keys.iter().map(|_| BTreeSet::from([None])).collect();
        Self { keys, possible }
    }

    fn note(&mut self, values: &[(String, String)], fates: &[Fate]) {
        for ((possible, (_, value)), fate) in self.possible.iter_mut().zip(values).zip(fates) {
            match fate {
                Fate::Acknowledged => *possible = BTreeSet::from([Some(value.clone())]),
                Fate::Unknown => drop(possible.insert(Some(value.clone()))),
                Fate::NotSent => {}
            }
        }
    }

    /// The first key that holds what it can't hold.
    fn wrong(&self, found: &[Option<String>]) -> Option<String> {
        assert_eq!(found.len(), self.keys.len());
        let mut keys = self.keys.iter().zip(&self.possible).zip(found);
        let wrong = keys.find(|((_, possible), found)| !possible.contains(found));
        wrong.map(|((key, possible), found)| format!("{key} is {found:?}, not one of {possible:?}"))
    }

    fn judge(&self, found: &[Option<String>], by: Dialect) {
        assert_eq!(self.wrong(found), None, "read by {by:?}; seed {}", seed());
    }
}

/// Writes all keys again and again, until told to stop.
struct Writer {
    dialect: Dialect,
    client: Client,
    /// Asked in turn.
    addresses: Vec<String>,
    stop: Arc<AtomicBool>,
    /// Rounds that were begun, and those of which every key was acknowledged.
    begun: Arc<AtomicUsize>,
    whole: Arc<AtomicUsize>,
}

impl Writer {
    async fn run(self, mut ledger: Ledger) -> (Ledger, usize) {
        let mut unknown = 0;
        for round in 0.. {
            if self.stop.load(Ordering::Relaxed) {
                break;
            }
            let pairs: Vec<(String, String)> = ledger
                .keys
                .iter()
                .map(|key| (key.clone(), format!("{key} in round {round}")))
                .collect();
            self.begun.fetch_add(1, Ordering::Relaxed);
            let fates = self
                .dialect
                .write(
                    &self.client,
                    &self.addresses[round % self.addresses.len()],
                    &pairs,
                )
                .await;
            unknown += fates.iter().filter(|fate| **fate == Fate::Unknown).count();
            self.whole.fetch_add(
                usize::from(fates.iter().all(|fate| *fate == Fate::Acknowledged)),
                Ordering::Relaxed,
            );
            ledger.note(&pairs, &fates);
        }
        (ledger, unknown)
    }
}

/// Waits until `count` has grown by so much.
async fn grown(count: &AtomicUsize, by: usize) {
    let from = count.load(Ordering::Relaxed);
    let grown = eventually(FAILOVER_LIMIT, async || {
        (count.load(Ordering::Relaxed) >= from + by).then_some(())
    })
    .await;
    grown.unwrap_or_else(|| panic!("stuck; seed {}", seed()));
}

/// One dialect by way of these addresses, while a leader is killed, and reads by another one.
async fn play(
    cluster: &mut Cluster,
    random: &mut StdRng,
    (dialect, reader): (Dialect, Dialect),
    way: &str,
    addresses: &[String],
) {
    let (began, name) = (Instant::now(), format!("{dialect:?}{way}"));
    let ledger = Ledger::new((0..dialect.keys()).map(|n| format!("{name}{n}")).collect());
    let writer = Writer {
        dialect,
        client: cluster.client.clone(),
        addresses: addresses.to_vec(),
        stop: Arc::default(),
        begun: Arc::default(),
        whole: Arc::default(),
    };
    let (stop, begun, whole) = (
        Arc::clone(&writer.stop),
        Arc::clone(&writer.begun),
        Arc::clone(&writer.whole),
    );
    let writing = tokio::spawn(writer.run(ledger));
    grown(&whole, 1).await;
    let shards = cluster.status().await.shards.len();
    let victim = cluster.leader(random.random_range(0..shards)).await;
    grown(&begun, 1).await;
    tokio::time::sleep(Duration::from_millis(random.random_range(0..60))).await;
    cluster.nodes[victim].kill();
    if dialect == Dialect::KvsByProxy {
        the_same_view_is_fine(cluster, victim).await;
    }
    // The first may have been as good as done before.
    grown(&whole, 2).await;
    stop.store(true, Ordering::Relaxed);
    let (ledger, unknown) = writing.await.expect("the writer does not panic");
    let asked = cluster
        .nodes
        .iter()
        .position(|node| node.address != cluster.nodes[victim].address)
        .expect("another");
    let found = reader
        .read(&cluster.client, &cluster.nodes[asked].address, &ledger.keys)
        .await;
    ledger.judge(&found, reader);
    let rounds = begun.load(Ordering::Relaxed);
    say(&format!(
        "dialect kills: {name}, read by {reader:?}: node {victim} killed; {rounds} rounds of {} \
        keys, {unknown} writes of unknown outcome; {:.1?}",
        ledger.keys.len(),
        began.elapsed()
    ));
    cluster.nodes[victim].start();
    cluster.wait_ready().await;
    let found = reader
        .read(
            &cluster.client,
            &cluster.nodes[victim].address,
            &ledger.keys,
        )
        .await;
    ledger.judge(&found, reader);
}

/// The view change of one who says it to every node, with one of them down.
async fn the_same_view_is_fine(cluster: &Cluster, down: usize) {
    let body = json!({"view": cluster.addresses().join(",")});
    let living = cluster
        .nodes
        .iter()
        .enumerate()
        .find(|(id, _)| *id != down)
        .expect("another")
        .1;
    let answer = read(
        &cluster.client,
        &living.address,
        "PUT",
        "/proxy/view-change",
        body,
    )
    .await;
    assert_eq!((answer.status, answer.text().as_str()), (200, "{}"));
}

/// Keys that nobody writes any more, and what they hold.
async fn bystanders(cluster: &Cluster) -> Ledger {
    let mut ledger = Ledger::new((0..50).map(|n| format!("bystander{n}")).collect());
    let pairs: Vec<(String, String)> = ledger
        .keys
        .iter()
        .map(|key| (key.clone(), format!("{key} stays")))
        .collect();
    let fates = Dialect::EncodedBatch
        .write(&cluster.client, &cluster.nodes[0].address, &pairs)
        .await;
    assert!(fates.iter().all(|fate| *fate == Fate::Acknowledged));
    ledger.note(&pairs, &fates);
    ledger
}

/// Nothing is stored under keys that nobody wrote.
async fn assert_only_known(cluster: &Cluster, known: &BTreeSet<String>) {
    let all = json_of(
        &read(
            &cluster.client,
            &cluster.nodes[0].address,
            "GET",
            "/fetch",
            Value::Null,
        )
        .await,
    );
    for pair in all.as_array().expect("a list") {
        assert!(
            known.contains(&text(&pair["key"]["data"])),
            "nobody wrote {pair}; seed {}",
            seed()
        );
    }
}

async fn play_all(setup: Setup, replicated: bool) {
    let mut random = StdRng::seed_from_u64(seed());
    let mut cluster = Cluster::start(setup).await;
    let bystanders = bystanders(&cluster).await;
    let nodes = cluster.addresses();
    let members: Vec<&str> = nodes.iter().map(String::as_str).collect();
    let mut gateway = cluster.gateway(0, &members);
    gateway.start();
    let served = read(
        &cluster.client,
        &gateway.address,
        "GET",
        "/get/bystander0",
        Value::Null,
    );
    assert_eq!(served.await.status, 200);
    let mut known: BTreeSet<String> = bystanders.keys.iter().cloned().collect();
    for row in TABLE
        .into_iter()
        .filter(|(dialect, _)| (*dialect == Dialect::KvsReplicated) == replicated)
    {
        for (way, addresses) in [
            ("ByNodes", nodes.clone()),
            ("ByGateway", vec![gateway.address.clone()]),
        ] {
            play(&mut cluster, &mut random, row, way, &addresses).await;
            known.extend((0..row.0.keys()).map(|n| format!("{:?}{way}{n}", row.0)));
        }
        let found = row
            .1
            .read(&cluster.client, &gateway.address, &bystanders.keys)
            .await;
        bystanders.judge(&found, row.1);
    }
    assert_only_known(&cluster, &known).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_leader_costs_no_dialect_what_it_acknowledged() {
    play_all(Setup::nodes(3), false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_leader_costs_the_replicated_kvs_nothing_either() {
    play_all(Setup::nodes(3).arguments(&["--repl-factor", "3"]), true).await;
}

#[test]
fn the_ledger_tells_lost_and_foreign_values_from_possible_ones() {
    let mut ledger = Ledger::new(vec!["k".to_owned()]);
    let mut write = |fate: Fate, value: &str| {
        ledger.note(&[("k".to_owned(), value.to_owned())], &[fate]);
        [None, Some("one"), Some("two"), Some("other")]
            .map(|found| ledger.wrong(&[found.map(str::to_owned)]).is_some())
    };
    assert_eq!(write(Fate::NotSent, "one"), [false, true, true, true]);
    assert_eq!(write(Fate::Unknown, "one"), [false, false, true, true]);
    assert_eq!(write(Fate::Acknowledged, "one"), [true, false, true, true]);
    assert_eq!(write(Fate::Unknown, "two"), [true, false, false, true]);
    assert_eq!(write(Fate::Acknowledged, "two"), [true, true, false, true]);
}
