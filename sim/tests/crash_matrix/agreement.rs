//! Replicas whose maps were changed behind the back of the log: what differs from a majority is
//! rebuilt, and without a majority nothing is written.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::ready;

use super::case::{hosts, until};
use super::history::options;
use super::host::{Host, addresses};
use super::machine::End;
use quorate::api::store::{Failure, Store, WriteFailure};
use quorate::client::remote::RemoteStore;
use quorate::sm::kv::{self, Action, Condition, Media, Operation, ReadOutcome, Record};
use quorate::sm::level::Feature;
use quorate::sm::ports::WriteBatch;
use quorate::sm::slots::{data_key, slot_of};
use quorate::types::{GroupId, Revision};

const KEY: &str = "key";

fn put(value: &str) -> Operation {
    let action = Action::Put {
        media: Media::Text,
        value: Bytes::copy_from_slice(value.as_bytes()),
    };
    Operation {
        key: KEY.into(),
        condition: Condition::None,
        action,
    }
}

struct Cluster {
    hosts: Vec<Arc<Host>>,
    store: RemoteStore,
    /// The shard of the key.
    shard: GroupId,
}

impl Cluster {
    async fn start() -> Self {
        let all = addresses(3);
        let hosts = hosts(&all, &all, 1);
        for host in &hosts {
            host.watch(Arc::new(|_| Box::pin(ready(()))));
            host.start();
        }
        let store = RemoteStore::connect(all).expect("a client");
        until("it is founded", async || {
            store.status().await.is_ok_and(|status| status.level > 0)
        })
        .await
        .expect("founded");
        let slots = store.status().await.expect("a status").slots;
        let cluster = Self {
            hosts,
            store,
            shard: slots.owner(slot_of(KEY.as_bytes())),
        };
        cluster.write("right").await;
        cluster
    }

    async fn try_write(&self, value: &str) -> Result<(), WriteFailure> {
        self.store
            .write(vec![put(value)], None, options())
            .await
            .remove(0)
            .map(|_| ())
    }

    async fn write(&self, value: &str) {
        until("it is written", async || {
            self.try_write(value).await.is_ok()
        })
        .await
        .expect("written");
    }

    /// The host that leads the shard.
    async fn leader(&self) -> usize {
        let mut leader = None;
        let led = until("it is led", async || {
            leader = self.hosts.iter().position(|host| host.leads(self.shard));
            leader.is_some()
        });
        led.await.expect("led");
        leader.expect("it was just there")
    }

    /// Puts a wrong value under a key that is never written again.
    async fn spoil(&self, host: usize, value: &'static str) {
        let record = Record {
            revision: Revision(1),
            media: Media::Text,
            value: Bytes::from_static(value.as_bytes()),
        };
        let mut batch = WriteBatch::default();
        batch.put(
            data_key(slot_of(KEY.as_bytes()), b"odd"),
            kv::encode_record(&record),
        );
        let group = self.hosts[host].group(self.shard).expect("a replica");
        group.state().corrupt(batch);
    }

    /// Takes it away again.
    fn put_right(&self, host: usize) {
        let mut batch = WriteBatch::default();
        batch.delete(data_key(slot_of(KEY.as_bytes()), b"odd"));
        let group = self.hosts[host].group(self.shard).expect("a replica");
        group.state().corrupt(batch);
    }

    /// Ends all hosts and starts them again, with replicas compared so often.
    async fn restart(&self, compare_every: Duration) {
        self.end();
        for host in &self.hosts {
            host.compare_every(compare_every);
            host.start();
        }
        let has_all = async || {
            self.hosts
                .iter()
                .all(|host| host.group(self.shard).is_some())
        };
        until("all are back", has_all).await.expect("all");
        self.leader().await;
    }

    /// Spoils two of three replicas until nothing is written any more.
    async fn make_read_only(&self) {
        let mut refused = None;
        let read_only = until("it is read-only", async || {
            // Again, as a comparison that was under way may have seen but one of them, and had it
            // rebuilt.
            self.spoil(0, "wrong").await;
            self.spoil(1, "also wrong").await;
            refused = self.try_write("more").await.err();
            refused.as_ref().is_some_and(is_read_only)
        });
        read_only
            .await
            .unwrap_or_else(|error| panic!("{error}: {refused:?}"));
    }

    fn shows_odd(&self, host: usize) -> bool {
        let group = self.hosts[host].group(self.shard).expect("a replica");
        let state = group.state().read();
        quorate::sm::ports::Read::get(&state, &data_key(slot_of(KEY.as_bytes()), b"odd"))
            .expect("readable")
            .is_some()
    }

    fn value(&self, host: usize) -> Option<Bytes> {
        let group = self.hosts[host].group(self.shard).expect("a replica");
        match kv::read(&group.state().read(), KEY.as_bytes()).expect("readable") {
            ReadOutcome::Owned(record) => record.map(|record| record.value),
            ReadOutcome::NotOwned { .. } => None,
        }
    }

    fn end(&self) {
        for host in &self.hosts {
            host.end(End::Kill);
            host.bury();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_differs_from_a_majority_is_rebuilt_and_hands_over_first_where_it_leads() {
    let cluster = Cluster::start().await;
    for (round, leads) in [(1u64, false), (2, true)] {
        let leader = cluster.leader().await;
        let odd = if leads { leader } else { (leader + 1) % 3 };
        let before = cluster.hosts[odd]
            .group(cluster.shard)
            .expect("a replica")
            .rebuilt();
        cluster.spoil(odd, "wrong").await;
        assert!(cluster.shows_odd(odd));
        let rebuilt = until("it is rebuilt", async || {
            // An idle shard is not compared again and again.
            cluster.write(&format!("round {round}")).await;
            cluster.hosts[odd]
                .group(cluster.shard)
                .is_some_and(|group| group.rebuilt() > before)
        });
        rebuilt.await.expect("rebuilt");
        assert!(!cluster.shows_odd(odd), "what was wrong is gone");
        let value = format!("last of {round}");
        cluster.write(&value).await;
        let has_it = until("it goes on applying", async || {
            cluster.value(odd).as_deref() == Some(value.as_bytes())
        });
        has_it.await.expect("applied");
        assert!(
            (0..3).all(|host| !cluster.shows_odd(host)),
            "and nobody else took it over"
        );
    }
    cluster.end();
}

fn is_read_only(refused: &WriteFailure) -> bool {
    matches!(
        refused,
        WriteFailure::Failed(Failure::Overloaded { limit, .. }) if limit.contains("read-only")
    )
}

/// Whoever leads next has the alarm in its log: nobody has compared anything yet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_stays_read_only_under_its_next_leaders_until_its_replicas_agree() {
    let cluster = Cluster::start().await;
    let raised = until("entries may say so", async || {
        cluster
            .store
            .status()
            .await
            .is_ok_and(|status| status.level >= Feature::ReadOnlyEntries.level())
    });
    raised.await.expect("raised");
    cluster.make_read_only().await;
    let recorded = until("every replica has it in its map", async || {
        let groups = cluster
            .hosts
            .iter()
            .filter_map(|host| host.group(cluster.shard));
        groups
            .filter(|group| group.recorded_alarm().is_some())
            .count()
            == 3
    });
    recorded.await.expect("recorded");
    cluster.restart(Duration::from_secs(3600)).await;
    let mut is_written = false;
    let answered = until("the next leader answers", async || {
        match cluster.try_write("again").await {
            Ok(()) => {
                is_written = true;
                true
            }
            Err(failure) => is_read_only(&failure),
        }
    });
    answered.await.expect("it answers");
    assert!(
        !is_written,
        "the next leader has forgotten that nothing may be written"
    );
    let told = until("each node warns of it", async || {
        let nodes = cluster.hosts.iter().filter_map(|host| host.node());
        nodes
            .filter(|node| node.ready().is_ok() && !node.warnings().is_empty())
            .count()
            == 3
    });
    told.await.expect("told");
    let status = cluster.store.status().await.expect("a status");
    assert!(
        status
            .shards
            .iter()
            .any(|shard| shard.id == cluster.shard && shard.alarm.is_some())
    );

    cluster.restart(Duration::from_millis(500)).await;
    let agreed = until("its replicas agree, and it is written", async || {
        cluster.put_right(0);
        cluster.put_right(1);
        cluster.try_write("together").await.is_ok()
    });
    agreed.await.expect("agreed");
    let over = until("nothing warns of it", async || {
        let nodes = cluster.hosts.iter().filter_map(|host| host.node());
        nodes.filter(|node| node.warnings().is_empty()).count() == 3
    });
    over.await.expect("over");
    cluster.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_majority_of_one_mind_a_shard_is_read_only_and_says_so() {
    let cluster = Cluster::start().await;
    cluster.make_read_only().await;
    let told = until("the status tells", async || {
        let status = cluster.store.status().await;
        status.is_ok_and(|status| {
            status
                .shards
                .iter()
                .any(|shard| shard.id == cluster.shard && shard.alarm.is_some())
        })
    });
    told.await.expect("told");
    let found = cluster
        .store
        .get(KEY.into(), options())
        .await
        .expect("it is read");
    assert!(found.record.is_some());
    cluster.end();
}
