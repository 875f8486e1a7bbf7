//! [`RaftContext`]: the parts of a node that all of its replicas share. The registry makes one, and
//! every replica holds it.

use std::sync::Arc;

use tokio::sync::Semaphore;

use super::election::counters::ElectionCounters;
use super::fair_budget::RaftBudgets;
use super::timings::RaftTimings;
use super::transport::Resolver;
use super::transport::lanes::Lanes;
use crate::storage::log::Log;
use crate::supervisor::Supervisor;

/// The parts of a node that all of its replicas share.
pub struct RaftContext {
    pub log: Log,
    pub lanes: Arc<Lanes>,
    pub resolver: Arc<dyn Resolver>,
    pub timings: RaftTimings,
    pub snapshot_turns: Semaphore,
    pub budgets: Arc<RaftBudgets>,
    pub supervisor: Supervisor,
    pub elections: Arc<ElectionCounters>,
}
