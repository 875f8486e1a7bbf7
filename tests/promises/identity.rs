//! Data directories are who they say they are: nobody is declared dead by mistake, and none is
//! taken for another.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::common::cluster::{Cluster, READY_LIMIT, Setup};
use crate::common::http::Request;
use crate::common::load::Load;
use crate::common::mounts::run;
use crate::common::{eventually, say};

/// Copies a data directory, as a backup does.
fn copy(data: &Path) -> PathBuf {
    let copy = data.with_extension("copy");
    run(
        "cp",
        &[
            "-a",
            &data.display().to_string(),
            &copy.display().to_string(),
        ],
    )
    .expect("a copy");
    copy
}

/// Puts one directory in the place of another.
fn put_back(copy: &Path, data: &Path) {
    std::fs::remove_dir_all(data).expect("a data directory to remove");
    std::fs::rename(copy, data).expect("the copy is put back");
}

/// Returns how often something is said in a node's log.
fn said(cluster: &Cluster, id: usize, what: &str) -> usize {
    cluster.nodes[id].log_text().matches(what).count()
}

/// Waits until the log of one of these nodes has a line with this in it.
async fn wait_logged(cluster: &Cluster, ids: &[usize], what: &str) {
    let found = async || {
        ids.iter()
            .any(|id| cluster.nodes[*id].log_text().contains(what))
            .then_some(())
    };
    let found = eventually(READY_LIMIT, found).await;
    assert!(found.is_some(), "no node of {ids:?} has said '{what}'");
}

/// A start with the disk not mounted, say: the node comes back with its data a moment later, and
/// nothing was done to it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_directory_for_a_moment_is_no_lost_disk() {
    let mut cluster = Cluster::start(Setup::nodes(3)).await;
    let load = Load::new("mistaken").start(&cluster);
    load.writes(50).await;
    let before = cluster.status().await;

    cluster.nodes[2].kill();
    let (data, aside) = (
        cluster.nodes[2].data.clone(),
        cluster.nodes[2].data.with_extension("aside"),
    );
    std::fs::rename(&data, &aside).expect("its data is put aside");
    cluster.nodes[2].start();
    wait_logged(&cluster, &[0, 1], "an empty data directory").await;

    cluster.nodes[2].kill();
    std::fs::remove_dir_all(&data).expect("the empty directory is removed");
    std::fs::rename(&aside, &data).expect("its data is put back");
    cluster.nodes[2].start();
    cluster.wait_ready().await;
    load.writes(50).await;
    let after = cluster.status().await;
    assert_eq!(after.epoch, before.epoch, "a node was given up");
    load.stop().await.judge(&cluster).await;
}

/// Whoever starts them need not know that they had data.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_only_join_found_nothing_where_all_data_is_gone() {
    let mut cluster = Cluster::prepare(Setup::nodes(2)).await;
    for node in &mut cluster.nodes {
        node.set_environment("JOIN_ONLY", "true");
        node.start();
    }
    for id in 0..2 {
        cluster.wait_code(id, "no-cluster").await;
    }

    for node in &mut cluster.nodes {
        node.kill();
        assert!(
            !node.data.join("log").exists(),
            "{} has founded",
            node.address
        );
        node.set_environment("JOIN_ONLY", "");
        node.start();
    }
    cluster.wait_ready().await;

    // With a cluster there, it holds nobody up.
    for node in &mut cluster.nodes {
        node.kill();
        node.set_environment("JOIN_ONLY", "true");
        node.start();
    }
    cluster.wait_ready().await;
}

/// What a node has acknowledged since a copy was made is not in the copy: with it and one that was
/// not there, a majority would have lost what was acknowledged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_copy_of_a_directory_is_refused_and_rebuilt() {
    let setup = Setup::nodes(3).arguments(&["--shards", "1", "--lost-disk-after", "2"]);
    let mut cluster = Cluster::start(setup).await;
    assert!(cluster.nodes[2].stop().await.success());
    let copy = copy(&cluster.nodes[2].data);
    cluster.nodes[2].start();
    cluster.wait_ready().await;
    // It has heard of the later start by now, or does when it goes on: whoever greets it waits for
    // its answer.
    cluster.nodes[1].pause();

    let paths: Vec<String> = (0..20)
        .map(|number| format!("/v1/kv/acknowledged-{number}"))
        .collect();
    for path in &paths {
        let stored = eventually(READY_LIMIT, async || {
            let put = Request::put(path.as_str(), "value").timeout(Duration::from_secs(5));
            let answer = cluster
                .client
                .ask(&cluster.nodes[0].address, &put)
                .await
                .ok()?;
            matches!(answer.status, 200 | 201).then_some(())
        });
        assert!(stored.await.is_some(), "{path} was not stored");
    }
    cluster.nodes[2].kill();
    cluster.nodes[0].kill();
    put_back(&copy, &cluster.nodes[2].data);
    cluster.nodes[2].start();
    cluster.nodes[1].resume();

    cluster.wait_spare(2).await;
    wait_logged(&cluster, &[1], "refused data directory").await;
    wait_logged(&cluster, &[2], "this data directory is an old copy").await;
    for path in &paths {
        let get = Request::get(path.as_str()).timeout(Duration::from_secs(2));
        let answer = cluster
            .client
            .ask_only(&cluster.nodes[1].address, &get)
            .await;
        assert!(
            !answer.as_ref().is_ok_and(|answer| answer.status == 404),
            "{path}: {answer:?}"
        );
    }

    cluster.nodes[0].start();
    cluster.wait_ready().await;
    for path in &paths {
        let answer = cluster
            .client
            .ask(&cluster.nodes[2].address, &Request::get(path.as_str()))
            .await
            .expect("an answer");
        assert_eq!(
            (answer.status, answer.text().as_str()),
            (200, "value"),
            "{path}"
        );
    }
    // What was put aside goes when the cluster has gone on without it.
    let aside = cluster.nodes[2].data.join("set-aside");
    assert!(
        eventually(READY_LIMIT, async || (!aside.exists()).then_some(()))
            .await
            .is_some(),
        "{} stays",
        aside.display()
    );
    assert_eq!(
        said(&cluster, 1, "refused data directory"),
        1,
        "it is said once"
    );
}

/// Nobody can tell such a copy by its starts; but the leader that had the acknowledgements misses
/// them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_made_while_its_node_ran_is_refused_by_the_leader_that_misses_what_it_acknowledged()
{
    let setup = Setup::nodes(3).arguments(&["--shards", "1", "--lost-disk-after", "2"]);
    let mut cluster = Cluster::start(setup).await;
    let leader = cluster.leader(0).await;
    let (away, copied) = ((leader + 1) % 3, (leader + 2) % 3);
    let paths: Vec<String> = (0..20)
        .map(|number| format!("/v1/kv/acknowledged-{number}"))
        .collect();
    let copy = copy(&cluster.nodes[copied].data);
    cluster.nodes[away].pause();
    for path in &paths {
        let stored = eventually(READY_LIMIT, async || {
            let put = Request::put(path.as_str(), "value").timeout(Duration::from_secs(5));
            let answer = cluster
                .client
                .ask(&cluster.nodes[leader].address, &put)
                .await
                .ok()?;
            matches!(answer.status, 200 | 201).then_some(())
        });
        assert!(stored.await.is_some(), "{path} was not stored");
    }
    cluster.nodes[copied].kill();
    put_back(&copy, &cluster.nodes[copied].data);
    cluster.nodes[copied].start();
    wait_logged(
        &cluster,
        &[leader],
        "lacks entries that it has acknowledged",
    )
    .await;
    cluster.wait_spare(copied).await;
    cluster.nodes[leader].kill();
    cluster.nodes[away].resume();
    for path in &paths {
        let get = Request::get(path.as_str()).timeout(Duration::from_secs(2));
        let answer = cluster
            .client
            .ask_only(&cluster.nodes[away].address, &get)
            .await;
        assert!(
            !answer.as_ref().is_ok_and(|answer| answer.status == 404),
            "{path}: {answer:?}"
        );
    }
    cluster.nodes[leader].start();
    cluster.wait_ready().await;
    for path in &paths {
        let answer = cluster
            .client
            .ask(&cluster.nodes[copied].address, &Request::get(path.as_str()))
            .await
            .expect("an answer");
        assert_eq!(
            (answer.status, answer.text().as_str()),
            (200, "value"),
            "{path}"
        );
    }
}

/// A directory that is started again and again, with kills, is never taken for an old copy, whoever
/// was away meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_that_was_only_killed_is_never_refused() {
    let mut cluster = Cluster::start(Setup::nodes(3)).await;
    cluster.nodes[1].pause();
    for _ in 0..5 {
        cluster.nodes[2].kill();
        cluster.nodes[2].start();
        cluster.wait_up(2).await;
    }
    cluster.nodes[1].resume();
    cluster.nodes[0].kill();
    cluster.nodes[2].kill();
    cluster.nodes[2].start();
    cluster.nodes[0].start();
    cluster.wait_ready().await;
    for id in 0..3 {
        assert_eq!(said(&cluster, id, "refused data directory"), 0, "node {id}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clone_beside_its_original_is_refused() {
    let mut cluster = Cluster::start(Setup::nodes(3)).await;
    let before = cluster.status().await;
    let copy = copy(&cluster.nodes[2].data);
    let view = cluster.addresses().join(",");
    let clone = cluster.prepare_node(copy, &["--view", &view]);
    for _ in 0..2 {
        cluster.nodes[clone].start();
        assert!(!cluster.nodes[clone].end(READY_LIMIT).await.success());
    }
    let at = cluster.nodes[2].address.clone();
    assert_eq!(
        said(
            &cluster,
            clone,
            &format!("a node runs at {at} with a copy of this data directory")
        ),
        2
    );
    assert_eq!(
        said(
            &cluster,
            2,
            "was started with a copy of this data directory"
        ),
        1,
        "it is told once"
    );
    cluster.wait_ready_of(&[0, 1, 2]).await;
    assert_eq!(
        cluster.status().await.version,
        before.version,
        "the view has changed"
    );

    // Once the original is gone, the copy is an old one: nobody may go on with it, at whatever
    // address.
    cluster.nodes[2].kill();
    cluster.nodes[2].start();
    cluster.wait_ready_of(&[0, 1, 2]).await;
    cluster.nodes[2].kill();
    cluster.nodes[clone].start();
    cluster.wait_spare(clone).await;
    cluster.nodes[2].start();
    cluster.wait_ready_of(&[0, 1, 2]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_members_that_change_places_are_found() {
    let mut cluster = Cluster::start(Setup::nodes(3)).await;
    let load = Load::new("places").start(&cluster);
    load.writes(50).await;
    for id in [1, 2] {
        cluster.nodes[id].kill();
    }
    let (one, two) = (cluster.nodes[1].data.clone(), cluster.nodes[2].data.clone());
    let between = one.with_extension("between");
    for (from, to) in [(&one, &between), (&two, &one), (&between, &two)] {
        std::fs::rename(from, to).expect("moved");
    }
    let before = cluster.nodes[0].log_text().len();
    for id in [1, 2] {
        cluster.nodes[id].start();
    }
    cluster.wait_ready().await;
    assert_places(&cluster).await;
    load.writes(50).await;
    load.stop().await.judge(&cluster).await;
    let warnings =
        |id: usize, from: usize| cluster.nodes[id].log_text()[from..].matches("WARN").count();
    say(&format!(
        "identity: warnings after two changed places: {:?}",
        [warnings(0, before), warnings(1, 0), warnings(2, 0)]
    ));
    for id in [1, 2] {
        assert!(
            said(&cluster, id, "announcements were rejected") <= 2,
            "node {id} repeats itself"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_members_may_come_back_at_new_addresses() {
    let mut cluster = Cluster::start(Setup::nodes(3)).await;
    let load = Load::new("moved").start(&cluster);
    load.writes(50).await;
    for node in &mut cluster.nodes {
        node.kill();
    }
    let first = cluster.first_port() + 5;
    let addresses: Vec<String> = (first..first + 3)
        .map(|port| format!("127.0.0.1:{port}"))
        .collect();
    for (node, address) in cluster.nodes.iter_mut().zip(&addresses) {
        node.move_to(address);
        node.set_flag("--view", &addresses.join(","));
        node.start();
    }
    cluster.wait_ready().await;
    assert_places(&cluster).await;
    load.use_nodes(addresses);
    load.writes(50).await;
    load.stop().await.judge(&cluster).await;
}

/// Waits until the view has the nodes where they run.
async fn assert_places(cluster: &Cluster) {
    let mut expected = cluster.addresses();
    expected.sort();
    let found = eventually(READY_LIMIT, async || {
        let mut addresses: Vec<String> = cluster
            .status()
            .await
            .nodes
            .into_iter()
            .map(|node| node.address)
            .collect();
        addresses.sort();
        (addresses == expected).then_some(())
    });
    assert!(
        found.await.is_some(),
        "the view has {:?}",
        cluster.status().await.nodes
    );
    for id in 0..expected.len() {
        let own_place = async || {
            let answer = cluster
                .client
                .ask_only(&cluster.nodes[id].address, &Request::get("/v1/cluster"))
                .await
                .ok()?;
            let status: serde_json::Value = serde_json::from_slice(&answer.body).ok()?;
            let own = status["nodes"]
                .as_array()?
                .iter()
                .find(|node| node["id"] == status["answered_by"])?;
            (own["address"] == cluster.nodes[id].address.as_str()).then_some(())
        };
        assert!(
            eventually(READY_LIMIT, own_place).await.is_some(),
            "node {id} does not find itself in the view"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_of_another_cluster_does_not_start_among_the_members_of_this() {
    let mut cluster = Cluster::start(Setup::nodes(3)).await;
    let stranger = cluster.add_stranger().await;
    cluster.nodes[stranger].kill();
    cluster.nodes[2].kill();
    let (own, other) = (
        cluster.nodes[2].data.clone(),
        cluster.nodes[stranger].data.clone(),
    );
    let aside = own.with_extension("aside");
    std::fs::rename(&own, &aside).expect("put aside");
    std::fs::rename(&other, &own).expect("put in its place");
    cluster.nodes[2].start();
    assert!(!cluster.nodes[2].end(READY_LIMIT).await.success());
    assert_eq!(said(&cluster, 2, "this data directory is of cluster"), 1);
    std::fs::remove_dir_all(&own).expect("removed");
    std::fs::rename(&aside, &own).expect("put back");
    cluster.nodes[2].start();
    cluster.wait_ready_of(&[0, 1, 2]).await;
}
