//! What operators see of whole nodes: the metrics page, and what is said when there is no quorum.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::{join_all, ready};
use http::Request;
use http::header::HOST;
use http_body_util::Full;

use super::case::{accept, hosts, settle, until};
use super::history::options;
use super::host::{Host, addresses};
use super::machine::End;
use quorate::api::store::{Options, Store};
use quorate::api::view_change::ViewChange;
use quorate::client::remote::RemoteStore;
use quorate::client::wire::Connection;
use quorate::sm::cluster::view::PlacementSpec;
use quorate::types::Address;
use quorate_sim::exposition::{self, Family};

const PATIENCE: Duration = Duration::from_secs(60);

fn start(hosts: &[Arc<Host>]) {
    for host in hosts {
        host.watch(Arc::new(|_| Box::pin(ready(()))));
        host.start();
    }
}

async fn ready_all(hosts: &[Arc<Host>]) {
    let is_ready = |host: &Arc<Host>| host.node().is_some_and(|node| node.ready().is_ok());
    until("all are ready", async || hosts.iter().all(is_ready))
        .await
        .expect("ready");
}

fn stop(hosts: &[Arc<Host>]) {
    for host in hosts {
        host.end(End::Kill);
        host.bury();
    }
}

fn naming(nodes: &[Address]) -> ViewChange {
    ViewChange {
        nodes: Some(nodes.to_vec()),
        ..ViewChange::default()
    }
}

async fn page(address: &Address) -> Vec<Family> {
    let request = Request::get("/metrics")
        .header(HOST, address.as_str())
        .body(Full::new(Bytes::new()))
        .expect("a request");
    let mut connection = Connection::open(address, PATIENCE)
        .await
        .expect("a connection");
    let answer = connection.exchange(request).await.expect("an answer");
    let text = String::from_utf8(answer.body().to_vec()).expect("text");
    exposition::check(&text).unwrap_or_else(|error| panic!("{error} in\n{text}"))
}

fn value(families: &[Family], name: &str, label: (&str, &str)) -> Option<f64> {
    let family = families.iter().find(|family| family.name == name)?;
    family
        .samples
        .iter()
        .find(|sample| sample.label(label.0).is_none_or(|of| of == label.1))
        .map(|sample| sample.value)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_metrics_of_a_node_follow_the_rules_and_tell_who_is_silent() {
    let all = addresses(3);
    let hosts = hosts(&all, &all, 1);
    start(&hosts);
    ready_all(&hosts).await;
    let pages = join_all(all.iter().map(page)).await;
    let sum = |name: &str, label: (&str, &str)| {
        pages
            .iter()
            .filter_map(|page| value(page, name, label))
            .sum::<f64>()
    };
    for page in &pages {
        for name in [
            "quorate_ready",
            "quorate_build_info",
            "process_open_fds",
            "quorate_view_settled",
            "process_cpu_seconds_total",
        ] {
            assert!(value(page, name, ("", "")).is_some(), "{name}");
        }
    }
    assert_eq!(sum("quorate_ready", ("", "")), 3.0);
    assert_eq!(
        sum("quorate_groups", ("role", "leader")),
        4.0,
        "of three shards and the meta group"
    );

    let gone = hosts
        .iter()
        .position(|host| !host.leads(quorate::types::GroupId::META))
        .expect("one that does not lead");
    hosts[gone].end(End::Kill);
    hosts[gone].bury();
    let others: Vec<&Address> = all
        .iter()
        .filter(|address| **address != all[gone])
        .collect();
    until(
        "its silence is told, and by whom it was replaced",
        async || {
            let pages = join_all(others.iter().map(|address| page(address))).await;
            let silence = |page: &Vec<Family>| {
                value(
                    page,
                    "quorate_peer_silence_seconds",
                    ("address", all[gone].as_str()),
                )
            };
            let changes: f64 = pages
                .iter()
                .filter_map(|page| value(page, "quorate_leader_changes_total", ("", "")))
                .sum();
            // The first leader of a group is elected as the group begins, and counts as no
            // campaign.
            let campaigns = pages
                .iter()
                .filter_map(|page| value(page, "quorate_elections_total", ("", "")));
            let is_silent = pages.iter().filter_map(silence).any(|silent| silent > 2.0);
            is_silent && changes >= 1.0 && campaigns.sum::<f64>() >= 1.0
        },
    )
    .await
    .expect("told");
    stop(&hosts);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_without_a_quorum_names_who_is_missing() {
    let all = addresses(3);
    let hosts = hosts(&all, &all, 1);
    start(&hosts);
    ready_all(&hosts).await;
    stop(&hosts[1..]);
    let store = RemoteStore::connect(all.clone()).expect("a client");
    let options = Options {
        timeout: Duration::from_secs(4),
        ..options()
    };
    let told = parking_lot::Mutex::new(String::new());
    let named = until("both that are missing are named", async || {
        let Err(failure) = store.plan_view(naming(&all[..2]), options).await else {
            return false;
        };
        let text = failure.to_string();
        let names_both = all[1..].iter().all(|gone| text.contains(gone.as_str()));
        let is_said = text.contains("the meta group") && text.contains("2 needed") && names_both;
        *told.lock() = text;
        is_said
    });
    named
        .await
        .unwrap_or_else(|error| panic!("{error}: {}", told.lock()));
    stop(&hosts[..1]);
}

/// A node notices that it has left only in a moment, and starts again then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_has_just_left_is_waited_for_by_a_dry_run_too() {
    let all = addresses(2);
    // One shard: nothing has to be moved away.
    let asked = PlacementSpec {
        shards: Some(1),
        ..PlacementSpec::default()
    };
    let host = |at: usize| Host::new(all[at].clone(), all.clone(), asked, 1000 + at as u64);
    let hosts = [host(0), host(1)];
    start(&hosts);
    ready_all(&hosts).await;
    let store = RemoteStore::connect(all.clone()).expect("a client");
    let epoch = accept(&store, &naming(&all[..1])).await.expect("accepted");
    settle(&store, epoch).await.expect("settled");
    let options = Options {
        timeout: PATIENCE,
        ..options()
    };
    let planned = store.plan_view(naming(&all), options).await;
    assert_eq!(
        planned.map(|planned| planned.nodes_added),
        Ok(all[1..].to_vec())
    );
    stop(&hosts);
}
