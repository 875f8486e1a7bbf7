//! [`MapCompactor`]: has the maps give back the space of what was overwritten and deleted, where
//! there is much of it.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::blocking;
use crate::node::pause;
use crate::sm::ports::StoreError;
use crate::storage::background;
use crate::storage::log::Log;
use crate::storage::map::MapStore;

/// Between two looks at how much the maps take.
const TICK: Duration = Duration::from_secs(3);
/// Ratio of a pause to the round before it: with many large values there are many files
/// to look at.
const PAUSE_FACTOR: u32 = 100;
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// Pause after a failure, such as a full disk: an attempt may write much for nothing.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_secs(60);

/// Copies maps to a fresh place when that pays.
pub struct MapCompactor {
    states: Arc<MapStore>,
    log: Log,
}

impl MapCompactor {
    pub fn new(states: Arc<MapStore>, log: Log) -> Self {
        Self { states, log }
    }

    pub async fn run(self, shutdown: &CancellationToken) {
        let mut pause = TICK;
        while pause::waited(shutdown, pause).await {
            let began = Instant::now();
            let ticked = self.tick(shutdown.clone()).await;
            pause = TICK.max((began.elapsed() * PAUSE_FACTOR).min(PAUSE_MAX));
            if let Err(error) = ticked {
                // Said once a minute: the next attempt is as far off.
                tracing::warn!(
                    "the maps were not copied, and keep the space of what was overwritten and \
                    deleted: {error}"
                );
                pause = PAUSE_AFTER_FAILURE;
            }
        }
    }

    async fn tick(&self, shutdown: CancellationToken) -> Result<(), StoreError> {
        let (states, stored) = (self.states.clone(), self.log.replicas());
        let work = blocking::start(move || {
            if !states.wants_compaction()? {
                return Ok(());
            }
            let compact = || states.compact(&stored, &|| !shutdown.is_cancelled());
            let no_thread = |source| StoreError::Io {
                context: "copying the maps".into(),
                source,
            };

            // At a low priority: whole maps are copied while clients are served.
            background::run("compact-maps", compact).map_err(no_thread)?
        });
        let broken_off = |error| StoreError::Io {
            context: "copying the maps".into(),
            source: std::io::Error::other(error),
        };
        work.await.map_err(broken_off)?
    }
}
