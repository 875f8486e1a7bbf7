//! A client that follows redirects arrives: never in a circle, and never at a node that has fallen
//! silent, whoever hands over to whom meanwhile.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use reqwest::Method;
use tokio::task::JoinSet;

use crate::common::cluster::{Cluster, READY_LIMIT, Setup, operate};
use crate::common::firewall::Firewall;
use crate::common::http::{Answer, Client, Failure, Request};
use crate::common::{eventually, say};

/// To the leader, to the next one, and to one more where two took over on the way.
const REDIRECTS_MAX: usize = 3;

/// What a walk gives up after: a node that never stops redirecting is seen before.
const REDIRECTS_GIVEN_UP: usize = 20;

/// Between two walks of one client, so that the nodes have the machine.
const STEP: Duration = Duration::from_millis(3);

/// How often a lead is handed over, and taken away.
const TRANSFERS: usize = 12;

/// What became of a request that was sent to one node, and then wherever it was told.
#[derive(Debug)]
struct Walk {
    /// Every node that it came to, in order.
    visited: Vec<String>,
    end: Result<Answer, Failure>,
}

impl Walk {
    async fn take(client: &Client, start: &str, request: &Request) -> Self {
        let mut visited = vec![start.to_owned()];
        loop {
            let address = visited.last().expect("the start at least");
            let end = client.ask_only(address, request).await;
            let next = match &end {
                Ok(answer) if answer.status == 307 => location(answer),
                Ok(_) | Err(_) => return Self { visited, end },
            };
            visited.push(next);
            if visited.len() > REDIRECTS_GIVEN_UP {
                return Self { visited, end };
            }
        }
    }

    fn redirects(&self) -> usize {
        self.visited.len() - 1
    }

    fn status(&self) -> Option<u16> {
        self.end.as_ref().ok().map(|answer| answer.status)
    }

    fn outcome(&self) -> String {
        match &self.end {
            Err(Failure::NotSent(_)) => "not sent".to_owned(),
            Err(Failure::Lost(_)) => "lost".to_owned(),
            Ok(answer) if answer.status < 500 => answer.status.to_string(),
            Ok(answer) => {
                let problem: serde_json::Value =
                    serde_json::from_slice(&answer.body).unwrap_or_default();
                format!("{} {}", answer.status, problem["detail"])
            }
        }
    }
}

fn location(answer: &Answer) -> String {
    let location = answer.headers.get("location");
    let location = location.expect("a redirect names a node");
    let location = location.to_str().expect("text").strip_prefix("http://");
    let (address, _) = location
        .and_then(|rest| rest.split_once('/'))
        .expect("an address and a path");
    address.to_owned()
}

/// What the walks of a while came to.
#[derive(Debug, Default)]
struct Tally {
    walks: usize,
    /// How many walks had so many redirects.
    redirects: BTreeMap<usize, usize>,
    /// How many ended with which status, and code of a problem.
    ends: BTreeMap<String, usize>,
    wrong: Vec<String>,
}

impl Tally {
    fn note(&mut self, what: &str, walk: &Walk) {
        self.walks += 1;
        *self.redirects.entry(walk.redirects()).or_default() += 1;
        *self.ends.entry(walk.outcome()).or_default() += 1;

        if walk.redirects() > REDIRECTS_MAX {
            self.wrong.push(format!("{what}: {:?}", walk.visited));
        }
        if let Ok(answer) = &walk.end
            && answer.status == 503
            && !answer.headers.contains_key("retry-after")
        {
            self.wrong.push(format!(
                "{what}: 503 without Retry-After: {}",
                answer.text()
            ));
        }
    }
}

/// Clients of every node, one that reads and one that writes, which walk until they are told to
/// stop.
struct Walkers {
    tally: Arc<Mutex<Tally>>,
    stop: Arc<AtomicBool>,
    clients: JoinSet<()>,
}

impl Walkers {
    fn start(cluster: &Cluster) -> Self {
        let tally = Arc::new(Mutex::new(Tally::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let mut clients = JoinSet::new();
        for address in cluster.addresses() {
            for writes in [false, true] {
                let (tally, stop, address) = (tally.clone(), stop.clone(), address.clone());
                let client = cluster.client.clone();
                clients.spawn(async move {
                    let mut number = 0_u64;
                    while !stop.load(Ordering::Relaxed) {
                        number += 1;
                        let path = format!("/v1/kv/walk-{}", number % 50);
                        let request = match writes {
                            true => Request::put(path.as_str(), number.to_string()),
                            false => Request::get(path.as_str()),
                        };
                        let walk = Walk::take(&client, &address, &request).await;
                        let what = format!("{} {path}", request.method);
                        tally.lock().expect("no panic").note(&what, &walk);
                        tokio::time::sleep(STEP).await;
                    }
                });
            }
        }
        Self {
            tally,
            stop,
            clients,
        }
    }

    /// Returns once so many more walks have been made.
    async fn walks(&self, more: usize) {
        let walks = || self.tally.lock().expect("no panic").walks;
        let enough = walks() + more;
        let made = eventually(READY_LIMIT, async || (walks() >= enough).then_some(()));
        made.await.expect("clients that walk on");
    }

    /// Tells what was seen since the last time, and that it was as promised.
    fn judge(&self, phase: &str) {
        let tally = std::mem::take(&mut *self.tally.lock().expect("no panic"));
        say(&format!(
            "{phase}: {} walks, by redirects {:?}, by outcome {:?}",
            tally.walks, tally.redirects, tally.ends
        ));
        assert!(
            tally.wrong.is_empty(),
            "{phase}: {} of {} walks: {:#?}",
            tally.wrong.len(),
            tally.walks,
            &tally.wrong[..tally.wrong.len().min(20)]
        );
    }

    async fn stop(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(ended) = self.clients.join_next().await {
            ended.expect("a client that does not panic");
        }
        self.judge("in the end");
    }
}

async fn transfer(cluster: &Cluster, shard: usize, by: usize, to: usize) -> u16 {
    let body = serde_json::json!({ "to": cluster.nodes[to].address }).to_string();
    let request = Request {
        body: body.into_bytes(),
        ..Request::new(
            Method::POST,
            format!("/v1/cluster/shards/{}/leader?timeout=3s", shard + 1),
        )
    };
    let walk = Walk::take(&cluster.client, &cluster.nodes[by].address, &request).await;
    assert!(walk.redirects() <= REDIRECTS_MAX, "{walk:?}");
    walk.status().unwrap_or(0)
}

/// The positions of the nodes with a replica of the shard.
async fn replicas(cluster: &Cluster, shard: usize) -> Vec<usize> {
    let status = cluster.status().await;
    let address_of = |id: u64| {
        &status
            .nodes
            .iter()
            .find(|node| node.id == id)
            .expect("it")
            .address
    };
    let on: Vec<&String> = status.shards[shard]
        .replicas
        .iter()
        .map(|replica| address_of(replica.node))
        .collect();
    (0..cluster.nodes.len())
        .filter(|id| on.contains(&&cluster.nodes[*id].address))
        .collect()
}

/// Whoever is asked sends the client on at most three times: with a replica or without, while the
/// lead is handed over, the leader is silent or dead, nodes restart, and replicas move.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_most_three_redirects_lead_to_the_leader_through_every_hand_over() {
    let setup = Setup::nodes(4).arguments(&["--shards", "2", "--repl-factor", "3"]);
    let mut cluster = Cluster::start(setup).await;
    let walkers = Walkers::start(&cluster);
    walkers.walks(100).await;
    walkers.judge("undisturbed");

    for round in 0..TRANSFERS {
        let shard = round % 2;
        let (on, leader) = (replicas(&cluster, shard).await, cluster.leader(shard).await);
        let to = *on
            .iter()
            .cycle()
            .skip(round)
            .find(|id| **id != leader)
            .expect("three replicas");
        // Perhaps the last one is under way yet.
        transfer(&cluster, shard, round % 4, to).await;
        walkers.walks(20).await;
    }
    walkers.judge("handed over");

    for shard in 0..2 {
        let leader = cluster.leader(shard).await;
        cluster.nodes[leader].pause();
        let others: Vec<usize> = (0..4).filter(|id| *id != leader).collect();
        wait_served(&cluster, &others).await;
        cluster.nodes[leader].resume();
        cluster.wait_ready().await;
        walkers.walks(50).await;
    }
    walkers.judge("paused");

    for shard in 0..2 {
        let leader = cluster.leader(shard).await;
        cluster.nodes[leader].kill();
        let others: Vec<usize> = (0..4).filter(|id| *id != leader).collect();
        wait_served(&cluster, &others).await;
        cluster.nodes[leader].start();
        cluster.wait_ready().await;
        walkers.walks(50).await;
    }
    walkers.judge("killed");

    for id in 0..4 {
        cluster.nodes[id].restart().await;
        cluster.wait_node_ready(id).await;
    }
    walkers.judge("restarted in turn");

    // One leaves with its replicas, and comes back.
    let (leaving, servers) = (cluster.leader(0).await, cluster.addresses());
    for verb in ["remove", "add"] {
        let address = cluster.nodes[leaving].address.clone();
        let others: Vec<String> = servers
            .iter()
            .filter(|at| **at != address)
            .cloned()
            .collect();
        // The nodes have just been started, and may not be done with that.
        let mut said = String::new();
        let done = eventually(READY_LIMIT, async || {
            let (code, text) = operate(&others, &[verb, &address, "--yes"]).await;
            said = text;
            (code == 0).then_some(())
        });
        assert!(done.await.is_some(), "{verb} {address}: {said}");
        walkers.walks(50).await;
    }
    walkers.judge("removed and added");
    walkers.stop().await;
}

/// Waits until each of these nodes serves whoever follows.
async fn wait_served(cluster: &Cluster, ids: &[usize]) {
    for id in ids {
        let served = eventually(READY_LIMIT, async || {
            for key in 0..8 {
                let put = Request::put(format!("/v1/kv/served-{key}"), "here")
                    .timeout(Duration::from_secs(5));
                let address = &cluster.nodes[*id].address;
                let walk = Walk::take(&cluster.client, address, &put).await;
                if !matches!(walk.status(), Some(200 | 201)) {
                    return None;
                }
            }
            Some(())
        });
        assert!(served.await.is_some(), "node {id} sends clients nowhere");
    }
}

/// No other can be elected, so a node that named whom it follows would name the silent one for as
/// long as that is silent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_is_sent_to_a_leader_that_has_fallen_silent() {
    let mut cluster = Cluster::start(Setup::nodes(3).arguments(&["--shards", "1"])).await;
    let leader = cluster.leader(0).await;
    let (dead, asked) = ((leader + 1) % 3, (leader + 2) % 3);
    let address = &cluster.nodes[asked].address.clone();
    cluster.nodes[dead].kill();
    cluster.nodes[leader].pause();

    for request in [
        Request::get("/v1/kv/k?timeout=500ms"),
        Request::put("/v1/kv/k?timeout=500ms", "v"),
    ] {
        let answered = eventually(Duration::from_secs(10), async || {
            let answer = cluster.client.ask_only(address, &request).await;
            let answer = answer.expect("an answer in time");
            (answer.status == 503).then_some(answer)
        });
        let answer = answered.await;
        let answer = answer.unwrap_or_else(|| panic!("{} is sent to it", request.method));
        assert!(answer.headers.contains_key("retry-after"), "{answer:?}");
    }

    // A write that is passed on waits for the next leader, and is not lost at the silent one.
    let path = "/v1/kv/k?proxy=true&timeout=60s";
    let put = Request::put(path, "v").timeout(READY_LIMIT);
    let (client, at) = (cluster.client.clone(), address.clone());
    let write = tokio::spawn(async move { client.ask_only(&at, &put).await });
    cluster.nodes[dead].start();
    let written = write.await.expect("no panic").expect("an answer");
    assert!(matches!(written.status, 200 | 201), "{written:?}");
    cluster.nodes[leader].resume();
}

/// The next leader hears nobody, and so can't take over; the old one knows of no other meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_goes_in_a_circle_while_the_next_leader_can_not_take_over() {
    let mut firewall = match Firewall::new() {
        Ok(firewall) => firewall,
        Err(reason) => return say(&format!("redirects: left out, no iptables: {reason}")),
    };
    let mut cluster = Cluster::prepare(Setup::nodes(3).arguments(&["--shards", "1"])).await;
    let first = u32::from(cluster.first_port()) + 100_000;
    let group = |id: usize| first + u32::try_from(id).expect("few nodes");
    for (id, node) in cluster.nodes.iter_mut().enumerate() {
        node.wrapper = Firewall::wrapper(group(id));
        node.start();
    }
    cluster.wait_ready().await;

    let walkers = Walkers::start(&cluster);
    for round in 0..6 {
        let leader = cluster.leader(0).await;
        let to = (leader + 1 + round % 2) % 3;
        // Once what it sends is lost, once what is sent to it.
        for other in (0..3).filter(|id| *id != to) {
            let (from, address) = match round % 3 {
                0 => (to, &cluster.nodes[other].address),
                _ => (other, &cluster.nodes[to].address),
            };
            let cut = match round % 2 {
                0 => firewall.lose(group(from), address),
                _ => firewall.refuse(group(from), address),
            };
            cut.expect("a rule");
        }
        transfer(&cluster, 0, leader, to).await;
        walkers.walks(60).await;
        firewall.heal();
        cluster.wait_ready().await;
        walkers.judge(&format!("round {round}"));
    }
    walkers.stop().await;
}
