//! Many keys, written in batches by one client, and looked for in the map of one node.

use std::time::Duration;

use futures::{StreamExt, stream};
use serde_json::json;

use super::cluster::Cluster;
use super::eventually;
use super::http::Request;

/// Keys with a common name, each with a value of its own.
#[derive(Debug, Clone, Copy)]
pub struct Fill {
    pub name: &'static str,
    pub keys: u64,
    pub value_bytes: usize,
    /// Keys in one request, and so in one entry of the log.
    pub batch: u64,
    /// Requests under way at once. What waits together goes into one entry.
    pub concurrency: usize,
}

impl Fill {
    /// So many small keys, in large batches.
    pub fn small(name: &'static str, keys: u64) -> Self {
        Self {
            name,
            keys,
            value_bytes: 256,
            batch: 500,
            concurrency: 8,
        }
    }

    /// As much as it takes for the nodes to write a snapshot and to purge the log before it: more
    /// entries than the 4096 that are kept, and more than 64 MiB.
    pub async fn write_past_a_purge(cluster: &Cluster, node: usize) -> [Self; 2] {
        // One after another, or they would share entries.
        let entries = Self {
            name: "entry",
            keys: 4500,
            value_bytes: 16,
            batch: 1,
            concurrency: 1,
        };
        let bytes = Self {
            name: "bytes",
            keys: 9000,
            value_bytes: 8 << 10,
            batch: 50,
            concurrency: 4,
        };
        for fill in [entries, bytes] {
            fill.write(cluster, node).await;
        }
        [entries, bytes]
    }

    pub async fn write(&self, cluster: &Cluster, node: usize) {
        let batches = (0..self.keys.div_ceil(self.batch))
            .map(|batch| self.write_batch(cluster, node, batch * self.batch));
        stream::iter(batches)
            .buffer_unordered(self.concurrency)
            .collect::<Vec<()>>()
            .await;
    }

    async fn write_batch(&self, cluster: &Cluster, node: usize, first: u64) {
        let put = |n: u64| json!({"op": "put", "key": self.key(n), "value": self.value(n)});
        let operations: Vec<_> = (first..(first + self.batch).min(self.keys))
            .map(put)
            .collect();
        let body = json!({"operations": operations}).to_string();
        let request = Request {
            body: body.into_bytes(),
            ..Request::new(reqwest::Method::POST, "/v1/batch")
        };
        let request = request
            .header("content-type", "application/json")
            .timeout(Duration::from_secs(30));
        let mut last = String::new();
        let written = eventually(Duration::from_secs(60), async || {
            let answer = cluster
                .client
                .ask(&cluster.nodes[node].address, &request)
                .await;
            last = format!("{answer:?}").chars().take(500).collect();
            answer
                .is_ok_and(|answer| answer.status == 200)
                .then_some(())
        });
        written
            .await
            .unwrap_or_else(|| panic!("the batch from {first} was not written: {last}"));
    }

    /// Panics unless a node has a sample of the keys in its map, the first and the last among them.
    pub async fn assert_at(&self, cluster: &Cluster, node: usize) {
        for n in (0..self.keys).step_by(97).chain([self.keys - 1]) {
            let request = Request::get(format!("/v1/kv/{}?consistency=stale", self.key(n)));
            let mut last = String::new();
            let found = eventually(Duration::from_secs(30), async || {
                let answer = cluster
                    .client
                    .ask_only(&cluster.nodes[node].address, &request)
                    .await;
                last = format!("{answer:?}").chars().take(500).collect();
                let answer = answer.ok()?;
                (answer.status == 200 && answer.text() == self.value(n)).then_some(())
            });
            found.await.unwrap_or_else(|| {
                panic!("{} is not in the map of node {node}: {last}", self.key(n))
            });
        }
    }

    fn key(&self, n: u64) -> String {
        format!("{}-{n:08}", self.name)
    }

    fn value(&self, n: u64) -> String {
        format!("{n:0>width$}", width = self.value_bytes)
    }
}
