//! A node alone is a whole cluster: it is ready, and stays so, though nobody ever answers it.

use std::time::Duration;

use crate::common::cluster::{Cluster, Setup};
use crate::common::eventually;
use crate::common::http::Request;

/// Longer than the age from which a replica counts as catching up.
const WATCHED_FOR: Duration = Duration::from_secs(9);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_alone_is_ready_and_stays_so_and_its_reads_are_not_stale() {
    let mut cluster = Cluster::start(Setup {
        no_view: true,
        ..Setup::nodes(1)
    })
    .await;
    let address = cluster.nodes[0].address.clone();
    let written = cluster
        .client
        .ask(&address, &Request::put("/v1/kv/k", "v"))
        .await
        .expect("an answer");
    assert_eq!(written.status, 201);

    for start in ["the first start", "another start"] {
        let unready = eventually(WATCHED_FOR, async || {
            let answer = cluster
                .client
                .ask_only(&address, &Request::get("/readyz"))
                .await
                .expect("an answer");
            (answer.status != 200).then(|| answer.text())
        });
        assert_eq!(unready.await, None, "after {start}");
        let read = cluster
            .client
            .ask_only(&address, &Request::get("/v1/kv/k?consistency=stale"))
            .await
            .expect("an answer");
        let staleness = read
            .headers
            .get("quorate-staleness")
            .map(|age| age.as_bytes());
        assert_eq!(
            (read.text().as_str(), staleness),
            ("v", Some(&b"0"[..])),
            "after {start}"
        );
        cluster.nodes[0].restart().await;
        cluster.wait_ready().await;
    }
}
