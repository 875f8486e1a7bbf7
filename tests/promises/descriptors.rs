//! Descriptors run out, by a crowd of connections or by a limit that somebody lowers: no node stops
//! or forgets, clients past the limit are told so in time, and all serve when it is over.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use rustix::process::{Pid, Resource, Rlimit, prlimit};

use crate::common::cluster::{Cluster, Setup};
use crate::common::http::Request;
use crate::common::load::Load;
use crate::common::{eventually, say};

/// Too few for what is connected below, and enough for a node.
const FEW: u64 = 220;
/// Idle connections to each node.
const CROWD: usize = 280;
/// More than the segment of the log that is open has room for, so that another has to be begun.
const PUTS: usize = 80;
const VALUE_BYTES: usize = 1 << 20;

/// Those of standard input and output stay open, so with this limit no other is given out.
const LOWERED: u64 = 3;

/// How long anything here may take. It tells stuck from slow.
const LIMIT: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crowd_of_connections_takes_nothing_from_log_maps_and_peers() {
    let mut cluster = Cluster::prepare(Setup::nodes(3).arguments(&["--shards", "1"])).await;
    let limited = format!("ulimit -n {FEW}; exec \"$0\" \"$@\"");
    for node in &mut cluster.nodes {
        node.wrapper = ["sh", "-c", &limited].map(str::to_owned).to_vec();
        node.start();
    }
    cluster.wait_ready().await;
    let leader = cluster.nodes[cluster.leader(0).await].address.clone();
    // A client that had its connection before the crowd came.
    let mut client = TcpStream::connect(&leader).expect("a connection");
    put(&mut client, 0);

    let mut crowd = Vec::new();
    for node in &cluster.nodes {
        crowd.extend(
            (0..CROWD).map(|_| TcpStream::connect(&node.address).expect("the kernel takes it")),
        );
    }
    for n in 0..PUTS {
        put(&mut client, n);
    }
    let (mut told, mut closed, mut open) = (0, 0, 0);
    for stream in &mut crowd {
        stream.set_nonblocking(true).expect("a socket");
        let mut answer = [0; 12];
        match stream.read(&mut answer) {
            Ok(12) if answer.ends_with(b"503") => told += 1,
            // Nobody waits for ever for somebody who says nothing, when others want the place.
            Ok(0) => closed += 1,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => open += 1,
            other => panic!("neither told, closed nor open: {other:?}"),
        }
    }
    say(&format!(
        "descriptors: {PUTS} puts of 1 MiB beside {open} idle connections; {told} were told of it, \
        {closed} closed"
    ));
    assert!(told > 0);
    for node in &cluster.nodes {
        let asked = cluster
            .client
            .ask_only(&node.address, &Request::get("/readyz"))
            .await;
        assert_eq!(
            asked.map(|answer| answer.status).ok(),
            Some(200),
            "{} is not ready",
            node.address
        );
        assert!(
            !node.log_text().contains("Too many open files"),
            "{} had none left",
            node.address
        );
    }

    drop(crowd);
    for n in 0..3 {
        let path = format!("/v1/kv/key-{n}?proxy=true");
        let served = eventually(LIMIT, async || {
            let answer = cluster
                .client
                .ask(&cluster.nodes[n].address, &Request::get(&path))
                .await
                .ok()?;
            (answer.status == 200 && answer.body.len() == VALUE_BYTES).then_some(())
        });
        served
            .await
            .unwrap_or_else(|| panic!("node {n} does not serve when it is over"));
    }
}

/// Writes one value on a connection of its own, and waits for the answer.
fn put(stream: &mut TcpStream, n: usize) {
    stream.set_read_timeout(Some(LIMIT)).expect("a socket");
    let head =
        format!("PUT /v1/kv/key-{n} HTTP/1.1\r\nhost: x\r\ncontent-length: {VALUE_BYTES}\r\n\r\n");
    stream
        .write_all(head.as_bytes())
        .and_then(|()| stream.write_all(&vec![b'v'; VALUE_BYTES]))
        .expect("it is sent");
    let mut answer = Vec::new();
    let mut piece = [0; 1024];
    while !answer.ends_with(b"}\n") {
        let bytes = stream.read(&mut piece).expect("an answer in time");
        assert!(
            bytes > 0,
            "closed after {}",
            String::from_utf8_lossy(&answer)
        );
        answer.extend_from_slice(&piece[..bytes]);
    }
    assert!(
        answer.starts_with(b"HTTP/1.1 20"),
        "{}",
        String::from_utf8_lossy(&answer)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_has_none_left_waits_and_goes_on() {
    let cluster = Cluster::start(Setup::nodes(3).arguments(&["--shards", "1"])).await;
    let leader = cluster.leader(0).await;
    let load = Load::new("descriptors").start(&cluster);
    load.writes(100).await;
    for victim in [leader, (leader + 1) % 3] {
        let before = limit_open_files(cluster.nodes[victim].pid(), LOWERED);
        let said = cluster.nodes[victim]
            .log_text()
            .matches("no descriptor is left")
            .count();
        let mut filled = 0;
        let waits = eventually(LIMIT, async || {
            let body = vec![b'f'; VALUE_BYTES];
            let request = Request::put(format!("/v1/kv/filler-{}?proxy=true", filled % 50), body);
            let other = &cluster.nodes[(victim + 2) % 3].address;
            // Any answer is fine: the node may be the leader.
            let _ = cluster
                .client
                .ask(other, &request.timeout(Duration::from_secs(5)))
                .await;
            filled += 1;
            (cluster.nodes[victim]
                .log_text()
                .matches("no descriptor is left")
                .count()
                > said)
                .then_some(())
        });
        let waits = waits.await.is_some();
        limit_open_files(cluster.nodes[victim].pid(), before);
        assert!(waits, "node {victim} says nothing of it after {filled} MiB");
        say(&format!(
            "descriptors: node {victim} has waited for one after {filled} MiB"
        ));
        load.writes(100).await;
    }
    let mut cluster = cluster;
    for node in &mut cluster.nodes {
        assert!(
            node.exited().is_none(),
            "{} has ended:\n{}",
            node.address,
            node.log_text()
        );
    }
    cluster.wait_ready().await;
    load.writes(100).await;
    let history = load.stop().await;
    for id in 0..3 {
        let lost = history.acknowledged_ledger().lost(&cluster, id).await;
        assert!(lost.is_empty(), "not in the map of node {id}: {lost:#?}");
    }
    history.judge(&cluster).await;
}

/// Sets the limit of a process, and returns what it was.
fn limit_open_files(pid: u32, limit: u64) -> u64 {
    let pid = Pid::from_raw(i32::try_from(pid).expect("a process id"));
    let maximum = prlimit(
        pid,
        Resource::Nofile,
        Rlimit {
            current: Some(limit),
            maximum: Some(20_000),
        },
    );
    maximum
        .expect("the limit of a child of ours")
        .current
        .expect("there was one")
}
