//! Finds the node for each key's requests in the newest shard map.

use parking_lot::RwLock;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::api::shard_map::ShardMap;
use crate::client::native::NativeClient;
use crate::types::{Address, Slot};

/// At most this often: with a leader gone, every worker wants a newer map.
const REFRESH_INTERVAL_MIN: Duration = Duration::from_millis(100);

/// For every slot the nodes of its shard: the leader first, as far as it is known.
#[derive(Debug)]
pub struct SlotRoutes {
    /// For every slot, which of the lists.
    lists: Vec<usize>,
    nodes: Vec<Vec<Address>>,
}

impl SlotRoutes {
    /// Returns the nodes of a slot's shard, the likeliest leader first. Empty if nobody owns the
    /// slot.
    pub fn nodes(&self, slot: Slot) -> &[Address] {
        &self.nodes[self.lists[slot.index()]]
    }

    pub fn of(map: &ShardMap) -> Self {
        let owners = map.owners();
        let mut nodes: Vec<Vec<Address>> = owners
            .iter()
            .map(|shard| {
                map.candidates(*shard)
                    .into_iter()
                    .map(|node| node.public.clone())
                    .collect()
            })
            .collect();
        nodes.push(Vec::new());
        let list = |slot| {
            owners
                .binary_search(&map.owner(slot))
                .unwrap_or(owners.len())
        };
        Self {
            lists: Slot::all().map(list).collect(),
            nodes,
        }
    }
}

/// The routes that all workers share.
#[derive(Debug)]
pub struct RouteTable {
    current: RwLock<Arc<SlotRoutes>>,
    generation: AtomicU64,
    refreshing: Mutex<(NativeClient, Instant)>,
}

impl RouteTable {
    pub fn new(routes: SlotRoutes, client: NativeClient) -> Self {
        let refreshing = Mutex::new((client, Instant::now()));
        Self {
            current: RwLock::new(Arc::new(routes)),
            generation: AtomicU64::new(0),
            refreshing,
        }
    }

    /// Changes when the routes do.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    pub fn routes(&self) -> Arc<SlotRoutes> {
        Arc::clone(&self.current.read())
    }

    /// Asks for newer routes than those of `generation`. One worker asks; the others that want them
    /// wait for it.
    pub async fn refresh(&self, generation: u64) {
        let mut refreshing = self.refreshing.lock().await;
        if self.generation() != generation || refreshing.1.elapsed() < REFRESH_INTERVAL_MIN {
            return;
        }
        if let Ok(status) = refreshing.0.cluster().await {
            let routes = Arc::new(SlotRoutes::of(&ShardMap::from_status(&status)));
            *self.current.write() = routes;
            self.generation.fetch_add(1, Ordering::Release);
        }
        refreshing.1 = Instant::now();
    }
}
