//! Requests find their way where some nodes can't connect to others.

use std::time::{Duration, Instant};

use crate::common::cluster::{Cluster, READY_LIMIT, Setup};
use crate::common::firewall::Firewall;
use crate::common::http::Request;
use crate::common::{eventually, say};

/// How long requests may take to find another way. The promise is two seconds; a busy machine gets
/// more.
const LIMIT: Duration = Duration::from_secs(30);

/// A cluster whose nodes are in groups of their own.
async fn start(nodes: usize) -> (Cluster, impl Fn(usize) -> u32) {
    let mut cluster = Cluster::prepare(Setup::nodes(nodes).arguments(&["--shards", "1"])).await;
    let first = u32::from(cluster.first_port()) + 100_000;
    let group = move |id: usize| first + u32::try_from(id).expect("few nodes");
    for (id, node) in cluster.nodes.iter_mut().enumerate() {
        node.wrapper = Firewall::wrapper(group(id));
        node.start();
    }
    cluster.wait_ready().await;
    (cluster, group)
}

/// Waits until a node passes on what it is asked for a shard that it does not lead.
async fn wait_served(cluster: &Cluster, id: usize) {
    let (address, began) = (&cluster.nodes[id].address, Instant::now());
    let served = eventually(LIMIT, async || {
        let timeout = Duration::from_secs(2);
        let put = Request::put("/v1/kv/found?proxy=true", "a way").timeout(timeout);
        let get = Request::get("/v1/kv/found?proxy=true").timeout(timeout);
        let put = cluster.client.ask_only(address, &put).await.ok()?;
        let get = cluster.client.ask_only(address, &get).await.ok()?;
        (matches!(put.status, 200 | 201) && get.status == 200).then_some(())
    });
    assert!(
        served.await.is_some(),
        "node {id} serves nothing for {LIMIT:?}"
    );
    say(&format!("node {id} serves after {:?}", began.elapsed()));
}

/// It reaches the others, so nothing of Raft would ever depose it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_nobody_can_connect_to_hands_over() {
    let mut firewall = match Firewall::new() {
        Ok(firewall) => firewall,
        Err(reason) => return say(&format!("ways: left out, no iptables: {reason}")),
    };
    let (mut cluster, group) = start(3).await;
    for round in 0..2 {
        let leader = cluster.leader(0).await;
        let others: Vec<usize> = (0..3).filter(|id| *id != leader).collect();
        wait_served(&cluster, others[0]).await;
        for other in &others {
            let address = &cluster.nodes[leader].address;
            let cut = if round == 0 {
                firewall.refuse(group(*other), address)
            } else {
                firewall.lose(group(*other), address)
            };
            cut.expect("a rule");
        }
        for other in &others {
            wait_served(&cluster, *other).await;
        }
        // The one that led asks the others.
        wait_served(&cluster, leader).await;
        firewall.heal();
        cluster.wait_ready().await;
        assert!(
            eventually(READY_LIMIT, async || (cluster.leader(0).await == leader)
                .then_some(()))
            .await
            .is_some()
        );
    }
}

/// The third node has connections to both.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_cut_off_from_the_leader_serves_by_another() {
    let mut firewall = match Firewall::new() {
        Ok(firewall) => firewall,
        Err(reason) => return say(&format!("ways: left out, no iptables: {reason}")),
    };
    let (mut cluster, group) = start(3).await;
    let leader = cluster.leader(0).await;
    let other = (leader + 1) % 3;
    firewall
        .lose(group(other), &cluster.nodes[leader].address)
        .expect("a rule");
    wait_served(&cluster, other).await;
    assert_eq!(cluster.leader(0).await, leader, "most can connect to it");

    firewall
        .lose(group(leader), &cluster.nodes[other].address)
        .expect("a rule");
    wait_served(&cluster, other).await;
    wait_served(&cluster, leader).await;
    firewall.heal();
    cluster.wait_ready().await;
    wait_served(&cluster, other).await;
}

/// As behind a load balancer, which sends whoever follows a redirect to any of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_share_a_public_address_redirect_nobody_to_it() {
    let mut cluster = Cluster::prepare(Setup::nodes(3).arguments(&["--shards", "1"])).await;
    let balancer = format!("127.0.0.1:{}", cluster.first_port() + 9);
    for node in &mut cluster.nodes {
        node.set_environment("PUBLIC_ADDRESS", &balancer);
        node.start();
    }
    cluster.wait_ready().await;
    for id in 0..3 {
        let address = &cluster.nodes[id].address;
        let path = format!("/v1/kv/at-{id}");
        let served = eventually(LIMIT, async || {
            let put = cluster
                .client
                .ask_only(address, &Request::put(path.as_str(), "here"))
                .await
                .ok()?;
            let get = cluster
                .client
                .ask_only(address, &Request::get(path.as_str()))
                .await
                .ok()?;
            assert!(
                put.status != 307 && get.status != 307,
                "node {id} redirects"
            );
            (matches!(put.status, 200 | 201) && get.status == 200).then_some(())
        });
        assert!(
            served.await.is_some(),
            "node {id} serves nothing for {LIMIT:?}"
        );
    }
}
