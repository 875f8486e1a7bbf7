//! What is refused because of where its slot is, or goes, is not replicated first.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::future::ready;
use tokio_util::sync::CancellationToken;

use super::case::{accept, hosts, settle, until};
use super::history::options;
use super::host::addresses;
use super::machine::End;
use quorate::api::store::{Options, Store};
use quorate::api::view_change::ViewChange;
use quorate::client::remote::RemoteStore;
use quorate::node::platform::Stepped;
use quorate::sm::kv::{Action, Condition, Media, Operation};
use quorate::sm::moves::{Move, MoveStep};
use quorate::sm::slots::slot_of;

/// Writes that are refused one after another, each for as long as it may take. By then each has
/// been tried about a dozen times.
const WRITES: u64 = 4;
const TIMEOUT: Duration = Duration::from_secs(1);

/// Entries that others may make meanwhile.
const ENTRIES_MAX: u64 = 10;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_to_a_frozen_slot_take_no_entries() {
    let all = addresses(4);
    let hosts = hosts(&all, &all[..3], 1);
    let (held, goes_on) = (Arc::new(Mutex::new(None::<Move>)), CancellationToken::new());
    for host in &hosts {
        let (held, goes_on) = (held.clone(), goes_on.clone());
        host.watch(Arc::new(move |stepped| match stepped {
            Stepped::Moved {
                slot_move,
                step: MoveStep::Freeze,
            } => {
                *held.lock().expect("no holder panics") = Some(slot_move.clone());
                let goes_on = goes_on.clone();
                Box::pin(async move { goes_on.cancelled().await })
            }
            _ => Box::pin(ready(())),
        }));
        host.start();
    }
    let store = RemoteStore::connect(all[..3].to_vec()).expect("a client");
    let change = ViewChange {
        nodes: Some(all.clone()),
        ..ViewChange::default()
    };
    let epoch = accept(&store, &change).await.expect("accepted");
    let frozen = async || held.lock().expect("no holder panics").is_some();
    until("slots are frozen", frozen).await.expect("frozen");

    let of = held.lock().expect("no holder panics").clone();
    let of = of.expect("it was there");
    let key = (0..u64::MAX)
        .map(|n| Bytes::from(format!("key {n}")))
        .find(|key| of.slots.contains(&slot_of(key)))
        .expect("a key of each slot");
    let source = hosts.iter().find(|host| host.leads(of.from));
    let source = source.and_then(|host| host.group(of.from));
    let source = source.expect("a leader took the step");
    let entries = || source.status().last_log.map_or(0, |id| id.index);
    let before = entries();
    for _ in 0..WRITES {
        let put = Operation {
            key: key.clone(),
            condition: Condition::None,
            action: Action::Put {
                media: Media::Text,
                value: Bytes::from_static(b"v"),
            },
        };
        let options = Options {
            timeout: TIMEOUT,
            ..options()
        };
        let written = store.write(vec![put], None, options).await;
        assert!(written.iter().all(Result::is_err), "{written:?}");
    }
    let taken = entries() - before;
    assert!(
        taken < ENTRIES_MAX,
        "{WRITES} refused writes took {taken} entries"
    );

    goes_on.cancel();
    settle(&store, epoch).await.expect("settled");
    for host in &hosts {
        host.end(End::Kill);
        host.bury();
    }
}
