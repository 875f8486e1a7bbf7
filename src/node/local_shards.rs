//! [`LocalShards`]: answers for the shards that this node leads (or, for stale reads, has a replica
//! of), and forwards the rest.
//!
//! [`LocalShards`] is the [`ShardAccess`] under a node's router; [`LocalShards::answer`] also
//! answers `POST /peer/shard`. The invariant: a linearizable read looks at the map only after a
//! quorum round that began after the request came, and looks at the slot's ownership and at the
//! data under one guard. What may wait for the disk is read on another thread.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, timeout_at};

use super::context::{NodeContext, PeerPlace};
use super::local_reads::{
    KEYS_MAX, ManyKeys, RETRY_AFTER_MS, answer_gets, broken, charge_gets, in_time, read_count,
    read_key, read_keys, read_map, read_page, unavailable, written_reply,
};
use super::locator::Locator;
use super::move_destination;
use super::operator::Operator;
use crate::api::protocol::{ClusterStatus, Hop, ShardBody, ShardReply, ShardRequest};
use crate::api::shard_map::ShardMap;
use crate::api::store::{Consistency, Failure, Options, Routing, Staleness};
use crate::api::view_change::{ChangeInProgress, PlannedChange, ViewChange, ViewChangeFailure};
use crate::budget::{Budget, Share};
use crate::raft::Replica;
use crate::raft::transport::Resolver as _;
use crate::raft::{ProposeError, ReadError};
use crate::routing::call::{CallError, time_to_answer_ms};
use crate::routing::home_probe::HomeProbe;
use crate::routing::retry::FailureSource;
use crate::routing::router::{ShardAccess, check_operations};
use crate::routing::view_change_calls::{self, Unsettled};
use crate::sm::cluster::view::SlotMove;
use crate::sm::kv::{self, ANSWER_BYTES_MAX, PageRequest};
use crate::sm::ports::Direction;
use crate::storage::map::{MapRead, ReadKind};
use crate::types::{Address, GroupId, MapVersion, NodeId, PlanEpoch};

/// Time after which to try again when a disk is full.
const NO_ROOM_RETRY_AFTER_MS: u64 = 5000;

/// A node that has not answered after this time is looked for.
const DOUBT_AFTER: Duration = Duration::from_millis(300);

/// Time that one node has when another could answer, or half of the time that is left if
/// that is more.
const READ_ATTEMPT_MIN: Duration = Duration::from_secs(1);

/// Answers for the shards of this node, and reaches the others.
pub struct LocalShards {
    context: Arc<NodeContext>,
    home_probe: HomeProbe,
    locator: Locator,
    operator: Operator,
}

impl LocalShards {
    pub fn new(context: Arc<NodeContext>) -> Self {
        let home_probe = HomeProbe::new(context.caller.clone());
        let locator = Locator::new(context.clone());
        let operator = Operator::new(context.clone());
        Self {
            context,
            home_probe,
            locator,
            operator,
        }
    }

    /// Answers a request of a peer or client for a shard that this node should lead. As a relay it
    /// passes the request on if it does not.
    pub async fn answer(&self, request: ShardRequest, hop: Hop) -> ShardReply {
        if let Err(refusal) = self.context.ensure_ours(request.cluster) {
            return ShardReply::Failed(refusal);
        }
        let deadline = Instant::now() + Duration::from_millis(request.timeout_ms);

        // The meta group has no keys: nobody may read or write it as a shard.
        let local = self
            .context
            .registry
            .get(request.shard)
            .filter(|_| !request.shard.is_meta());
        match (local, hop) {
            (Some(group), Hop::Answer) => self.execute(&group, request.body, deadline).await,
            (Some(group), Hop::Relay) if group.leads() => {
                self.execute(&group, request.body, deadline).await
            }
            (_, Hop::Relay) if !request.shard.is_meta() => self.relay(request).await,
            _ => ShardReply::Failed(self.elsewhere(request.shard)),
        }
    }

    /// Does what is asked on the replica of this node.
    async fn execute(
        &self,
        group: &Arc<Replica>,
        body: ShardBody,
        deadline: Instant,
    ) -> ShardReply {
        let linearizable = Consistency::Linearizable;
        match body {
            ShardBody::Write(write) => self.write(group, write, deadline).await,
            ShardBody::Move(command) => self.take_move_step(group, command, deadline).await,
            ShardBody::Get { key, consistency } => {
                match self.before_read(group, consistency, deadline).await {
                    Ok(staleness) => self.read_one(group, key, staleness, deadline).await,
                    Err(failure) => ShardReply::Failed(failure),
                }
            }
            ShardBody::GetMany {
                keys,
                bytes_max,
                keys_only,
                consistency,
            } => match self.before_read(group, consistency, deadline).await {
                Ok(_) => {
                    // Whatever a peer asks for: the size of an answer is bounded by who gives it.
                    let many = ManyKeys {
                        keys,
                        bytes_max: bytes_max.min(ANSWER_BYTES_MAX),
                        keys_only,
                    };
                    read_keys(group, self.answers(), many, deadline).await
                }
                Err(failure) => ShardReply::Failed(failure),
            },
            ShardBody::Scan {
                range,
                reverse,
                limit,
                bytes_max,
                keys_only,
                consistency,
            } => match self.before_read(group, consistency, deadline).await {
                Ok(_) => {
                    let request = PageRequest {
                        range: range.into(),
                        direction: match reverse {
                            true => Direction::Reverse,
                            false => Direction::Forward,
                        },
                        limit: limit.min(KEYS_MAX),
                        bytes_max: bytes_max.min(ANSWER_BYTES_MAX),
                        keys_only,
                    };
                    read_page(group, self.answers(), request, deadline).await
                }
                Err(failure) => ShardReply::Failed(failure),
            },
            ShardBody::MoveState { id, slots } => {
                // The source gives its slots up on this answer, so it must be what a leader has
                // applied.
                match self.before_read(group, linearizable, deadline).await {
                    Ok(_) => match move_destination::destination_state(group, id, slots).await {
                        Ok(state) => ShardReply::MoveState(state),
                        Err(error) => ShardReply::Failed(broken(group, &error)),
                    },
                    Err(failure) => ShardReply::Failed(failure),
                }
            }
            ShardBody::Count => match self.before_read(group, linearizable, deadline).await {
                Ok(_) => {
                    let replica = group.clone();
                    let count = move |read: &MapRead<'_>| read_count(&replica, read);
                    read_map(group, ReadKind::Page, deadline, count).await
                }
                Err(failure) => ShardReply::Failed(failure),
            },
        }
    }

    /// Returns the record of a key, as of what the replica has applied.
    async fn read_one(
        &self,
        group: &Arc<Replica>,
        key: Bytes,
        staleness: Option<Staleness>,
        deadline: Instant,
    ) -> ShardReply {
        let (replica, answers) = (group.clone(), self.answers().clone());
        let read = move |read: &MapRead<'_>| read_key(&replica, &answers, read, &key, staleness);
        read_map(group, ReadKind::Keys, deadline, read).await
    }

    /// Proposes a step of a move to this shard, as the leader of the source has sent it.
    async fn take_move_step(
        &self,
        group: &Arc<Replica>,
        command: kv::KvCommand,
        deadline: Instant,
    ) -> ShardReply {
        // A peer may send steps of moves here, and no other command of a shard.
        if !move_destination::is_step(&command) {
            return ShardReply::Failed(Failure::Invalid {
                reason: "this is no step of a move".into(),
            });
        }

        move_destination::wait_ample_room(group, &command).await;
        let command = move_destination::timed(command, group);
        match group.propose_command(command, deadline).await {
            Ok(kv::KvOutcome::Moved(outcome)) => ShardReply::Moved(outcome),
            Ok(other) => ShardReply::Failed(Failure::Unknown {
                reason: format!("a step was answered by {other:?}"),
            }),
            Err(error) => ShardReply::Failed(self.propose_failure(group.key().group, error)),
        }
    }

    fn answers(&self) -> &Arc<Budget> {
        self.context.caller.answers()
    }

    /// Does a write, or answers one that only reads: that takes no entry.
    async fn write(&self, group: &Arc<Replica>, write: kv::Write, deadline: Instant) -> ShardReply {
        if let Err(failure) = check_operations(&write.operations) {
            return ShardReply::Failed(failure);
        }
        if write.is_read() {
            return match self
                .before_read(group, Consistency::Linearizable, deadline)
                .await
            {
                Ok(_) => {
                    let (replica, answers) = (group.clone(), self.answers().clone());
                    let read =
                        move |read: &MapRead<'_>| answer_gets(&replica, &answers, read, &write);
                    read_map(group, ReadKind::Keys, deadline, read).await
                }
                Err(failure) => ShardReply::Failed(failure),
            };
        }

        match in_time(group, deadline, self.refused(group, &write)).await {
            Ok(None) => {}
            Ok(Some(rejection)) => {
                return ShardReply::Written(kv::WriteOutcome::Rejected(rejection));
            }
            Err(failure) => return ShardReply::Failed(failure),
        }

        // What was applied can't be taken back for lack of room, so answers are charged before.
        let charged = match write.has_gets() {
            true => charge_gets(group, self.answers(), &write, deadline)
                .await
                .map(Some),
            false => Ok(None),
        };
        let share = match charged {
            Ok(share) => share,
            Err(failure) => return ShardReply::Failed(failure),
        };
        let answer_bytes = share.as_ref().map_or(0, Share::bytes);
        match group.propose_with_gets(write, answer_bytes, deadline).await {
            Ok(outcome) => written_reply(outcome, share),
            Err(error) => ShardReply::Failed(self.propose_failure(group.key().group, error)),
        }
    }

    /// Returns why a write is not proposed: the map says that its slots are elsewhere, or held back
    /// by a move. An entry would only be answered so, and many that wait for a frozen slot would
    /// fill the log. Of a shard that ends, the replicas stop as soon as nothing is left, and the
    /// outcome of a write that is proposed just before would not be known.
    ///
    /// Only where something moves: else the slots are here, and the map need not be looked at.
    async fn refused(&self, group: &Replica, write: &kv::Write) -> Option<kv::WriteRejection> {
        let (view, shard) = (self.context.view(), group.key().group);
        let moves = |held: &SlotMove| held.from == shard || held.to == shard;
        let stays = view.groups.get(&shard).is_some_and(|group| !group.draining);
        if stays && !view.moves.values().any(moves) {
            return None;
        }

        // The map of a replica that does not lead may be old, and proposing tells who leads.
        if !group.leads() {
            return None;
        }
        let write = write.clone();
        let look = move |read: &MapRead<'_>| kv::refused_by_place(read, &write);
        // What can't be read is told by whoever applies the write.
        group
            .state()
            .read_in(ReadKind::Keys, look)
            .await
            .ok()
            .flatten()
    }

    /// Makes sure that what the replica has applied is as new as asked. For a stale read: how old
    /// it may be.
    async fn before_read(
        &self,
        group: &Replica,
        consistency: Consistency,
        deadline: Instant,
    ) -> Result<Option<Staleness>, Failure> {
        match consistency {
            Consistency::Stale => Ok(Some(match group.staleness() {
                None => Staleness::Unknown,
                Some(age) => Staleness::AtMost {
                    age_ms: u64::try_from(age.as_millis()).unwrap_or(u64::MAX),
                },
            })),
            Consistency::Linearizable => {
                let read = group.read_barrier(deadline).await;
                read.map(|()| None)
                    .map_err(|error| self.read_failure(group.key().group, error))
            }
        }
    }

    /// Returns the node to pass a request on to. Any with a replica for a stale read; else the one
    /// that leads, as soon as it is known, or one that passes the request on where the leader can't
    /// be connected to.
    ///
    /// # Errors
    ///
    /// When there is none by the deadline, or this node leads by now.
    async fn peer_to_ask(
        &self,
        shard: GroupId,
        consistency: Consistency,
        deadline: Instant,
    ) -> Result<PeerPlace, Failure> {
        if consistency == Consistency::Stale {
            // It answers itself: a relay would look for the leader, which nobody needs for this.
            let peer = self.context.peer_for(shard).map(|peer| PeerPlace {
                hop: Hop::Answer,
                ..peer
            });
            return peer.ok_or_else(|| {
                unavailable(format!(
                    "no other node is known to have a replica of shard {shard:#}"
                ))
            });
        }
        let found = self.locator.find(shard, deadline).await?;
        let is_open =
            |leader: &NodeId| !self.context.registry.reachability().is_unreachable(*leader);
        let direct = found
            .filter(is_open)
            .filter(|leader| *leader != self.context.node)
            .and_then(|leader| self.context.place_of(leader, Hop::Answer));
        let around = || {
            // This node leads by now: then nobody else is to be asked.
            let is_here = found == Some(self.context.node);
            let peer = self.context.peer_for(shard).filter(|_| !is_here);
            peer.filter(|peer| peer.hop == Hop::Relay)
        };
        direct.or_else(around).ok_or_else(|| self.no_leader(shard))
    }

    /// Sends the request to the node that leads the shard, or has it passed on.
    async fn forward(&self, shard: GroupId, body: ShardBody, options: Options) -> ShardReply {
        let deadline = Instant::now() + options.timeout;
        let peer = match self.peer_to_ask(shard, options.consistency, deadline).await {
            Ok(peer) => peer,
            Err(failure) => return ShardReply::Failed(failure),
        };

        let writes = !body.is_read();
        let left = deadline.saturating_duration_since(Instant::now());
        // A node that says nothing must not use up the time of a read that another may answer. Of a
        // write nobody knows what it did.
        let timeout = if writes {
            left
        } else {
            left.min((left / 2).max(READ_ATTEMPT_MIN))
        };

        let request = ShardRequest {
            cluster: self.context.cluster,
            shard,
            timeout_ms: time_to_answer_ms(timeout),
            body,
        };

        let question = self.context.leader_question(shard);
        match self.call(&peer, &request, timeout).await {
            Ok(ShardReply::Failed(Failure::Elsewhere { address, .. })) => {
                match peer.hop {
                    Hop::Answer => self.context.learn_leader(shard, &address),
                    Hop::Relay => self.context.forget_leader(shard, peer.node),
                }
                // No client is sent to whom another node names.
                ShardReply::Failed(unavailable(format!(
                    "shard {shard:#} is changing its leader, perhaps to {address}"
                )))
            }
            // It leads nobody, or has stopped: the others are asked before it.
            Ok(ShardReply::Failed(failure @ Failure::Unavailable { .. })) => {
                self.context.forget_leader(shard, peer.node);
                ShardReply::Failed(failure)
            }
            Ok(reply) => {
                // Any replica answers a stale read, and who answers through a relay is not known.
                if options.consistency == Consistency::Linearizable
                    && peer.hop == Hop::Answer
                    && reply.shows_leadership()
                {
                    self.context.note_leader(shard, peer.node, question);
                }
                reply
            }
            Err(error) => {
                self.context.forget_leader(shard, peer.node);
                ShardReply::Failed(call_failure(error, writes))
            }
        }
    }

    /// Passes on what a node asks that can't connect to the leader. Only once: nodes of which none
    /// can would send it in a circle.
    async fn relay(&self, mut request: ShardRequest) -> ShardReply {
        let shard = request.shard;
        let deadline = Instant::now() + Duration::from_millis(request.timeout_ms);
        let peer = self
            .peer_to_ask(shard, Consistency::Linearizable, deadline)
            .await;
        let peer = match peer {
            Ok(peer) if peer.hop == Hop::Answer => peer,
            Ok(_) => {
                return ShardReply::Failed(unavailable(format!(
                    "nor can the leader of shard {shard} be reached here"
                )));
            }
            Err(failure) => return ShardReply::Failed(failure),
        };
        let (timeout, writes) = (
            deadline.saturating_duration_since(Instant::now()),
            !request.body.is_read(),
        );
        // The leader's own "not in time" is to arrive before it is given up here.
        request.timeout_ms = time_to_answer_ms(timeout);
        // Perhaps nobody can, and then it should be told so soon.
        self.context.registry.reachability().suspect(peer.node);
        match self.call(&peer, &request, timeout).await {
            Ok(reply) => reply,
            Err(error) => {
                self.context.forget_leader(shard, peer.node);
                ShardReply::Failed(call_failure(error, writes))
            }
        }
    }

    /// Makes one attempt at a node. A node that is slow to answer, or not there, is looked for;
    /// what may be done twice is not waited for once it is known that nobody can connect to it, or
    /// that another leads.
    async fn call(
        &self,
        peer: &PeerPlace,
        request: &ShardRequest,
        timeout: Duration,
    ) -> Result<ShardReply, CallError> {
        let reachability = self.context.registry.reachability();
        // A relay is asked because the leader, as it is known, can't be connected to.
        let leader = match peer.hop {
            Hop::Answer => Some(peer.node),
            Hop::Relay => self.locator.known(request.shard),
        };
        let mut call = std::pin::pin!(self.context.caller.call_by(
            peer.hop,
            &peer.address,
            request,
            timeout
        ));

        // After a moment without an answer the way to the node is looked at.
        let answered = match tokio::time::timeout(DOUBT_AFTER, &mut call).await {
            Ok(answered) => answered,
            Err(_) => {
                reachability.suspect(peer.node);
                let given_up = |reason: &str| {
                    Err(CallError::NoAnswer {
                        address: peer.address.clone(),
                        reason: reason.to_owned(),
                    })
                };
                let is_repeatable = request.body.is_repeatable();
                tokio::select! {
                    biased;
                    answered = &mut call => answered,
                    () = reachability.until_unreachable(peer.node), if is_repeatable => {
                        given_up("no connection can be made to it any more")
                    }
                    () = self.led_by_another(request.shard, leader), if is_repeatable => {
                        given_up("another node leads by now")
                    }
                }
            }
        };

        if let Err(CallError::NotConnected { .. }) = answered {
            reachability.suspect(peer.node);
        }
        answered
    }

    /// Resolves when another node than this leads the shard, as far as is known here, and can be
    /// connected to.
    async fn led_by_another(&self, shard: GroupId, node: Option<NodeId>) {
        let reachability = self.context.registry.reachability();
        loop {
            // Before the look: a change that comes after it is not missed, nor one that came before
            // anybody waited for it.
            let changed = self.locator.lead_changed(shard);
            let other = self
                .locator
                .known(shard)
                .filter(|leader| Some(*leader) != node);
            if other.is_some_and(|leader| !reachability.is_unreachable(leader)) {
                return;
            }
            changed.await;
        }
    }

    fn propose_failure(&self, shard: GroupId, error: ProposeError) -> Failure {
        match error {
            ProposeError::NotLeader { .. } => self.not_leader(shard),
            ProposeError::Overloaded { limit } => overloaded(format!("{limit} (shard {shard:#})")),
            ProposeError::Expired => unavailable(format!(
                "shard {shard:#} had no time left to begin it{}",
                self.context.missing_of(shard)
            )),
            ProposeError::Stopped { reason } => unavailable(format!(
                "the replica of shard {shard:#} on this node has stopped: {reason}"
            )),
            // Final for the caller, whose retries would find the same.
            ProposeError::ReadOnly { reason } => {
                overloaded(format!("shard {shard:#} is read-only: {reason}"))
            }
            // Waited for like a leader: it may be that another takes over, or that there is room
            // again.
            ProposeError::NoRoom { reason } => Failure::Unavailable {
                reason: format!(
                    "node {} ({}) takes no writes to shard {shard:#}: {reason}",
                    self.context.node, self.context.address
                ),
                retry_after_ms: NO_ROOM_RETRY_AFTER_MS,
            },
            error @ ProposeError::NotYet { .. } => unavailable(error.to_string()),
            ProposeError::Unknown { reason } => Failure::Unknown {
                reason: format!(
                    "shard {shard:#}: {reason}{}",
                    self.context.missing_of(shard)
                ),
            },
        }
    }

    fn read_failure(&self, shard: GroupId, error: ReadError) -> Failure {
        match error {
            ReadError::NotLeader { .. } => self.not_leader(shard),
            ReadError::Overloaded { limit } => overloaded(format!("{limit} (shard {shard:#})")),
            ReadError::Expired => unavailable(format!(
                "no quorum of shard {shard:#} is in reach{}",
                self.context.missing_of(shard)
            )),
            ReadError::Stopped { reason } => unavailable(format!(
                "the replica of shard {shard:#} on this node has stopped: {reason}"
            )),
        }
    }

    /// Returns where a shard is led that the replica here does not lead, as far as is known at
    /// once. The router waits for the next leader where nobody is: one that has just ended, has
    /// fallen silent or is handing over is not named, nor whom it hands over to.
    fn not_leader(&self, shard: GroupId) -> Failure {
        self.locator
            .known(shard)
            .and_then(|leader| self.elsewhere_at(shard, leader))
            .unwrap_or_else(|| self.no_leader(shard))
    }

    /// Sends a request to a node, unless that is this one, which begins to lead.
    fn elsewhere_at(&self, shard: GroupId, leader: NodeId) -> Option<Failure> {
        let map = self.context.map();
        let address = map
            .name_of(leader)
            .filter(|_| leader != self.context.node)?;
        Some(Failure::Elsewhere {
            shard,
            address: address.clone(),
        })
    }

    fn no_leader(&self, shard: GroupId) -> Failure {
        unavailable(format!(
            "shard {shard:#} has no leader now{}",
            self.context.missing_of(shard)
        ))
    }

    /// Returns the node that leads a shard without a replica here, or that has one at least.
    fn elsewhere(&self, shard: GroupId) -> Failure {
        match self.context.peer_for(shard) {
            Some(peer) => Failure::Elsewhere {
                shard,
                address: peer.name,
            },
            None => unavailable(format!("shard {shard:#} is unknown here")),
        }
    }

    /// Returns where a client that follows is sent with a request for a shard that this node does
    /// not lead, as soon as that is known. None: the request is to be passed on, because the leader
    /// is reached only by another node, or several nodes share what clients call it, and they might
    /// come to any of them.
    async fn redirect(&self, shard: GroupId, options: Options) -> Option<Failure> {
        // What is at hand is not kept waiting for a leader.
        let found = match options.consistency {
            Consistency::Stale => Some(self.locator.known(shard)?),
            Consistency::Linearizable => {
                let deadline = Instant::now() + options.timeout;
                match self.locator.find(shard, deadline).await {
                    Ok(found) => found,
                    Err(failure) => return Some(failure),
                }
            }
        };
        let Some(leader) = found else {
            let peer = self.context.peer_for(shard);
            let is_around = peer.is_some_and(|peer| peer.hop == Hop::Relay);
            return (!is_around).then(|| self.no_leader(shard));
        };
        let failure = self.elsewhere_at(shard, leader);
        let failure = failure.unwrap_or_else(|| self.no_leader(shard));
        let map = self.context.map();
        let is_shared = match &failure {
            Failure::Elsewhere { address, .. } => !map.is_public(address),
            _ => false,
        };
        (!is_shared).then_some(failure)
    }
}

impl ShardAccess for LocalShards {
    fn answers(&self) -> Arc<Budget> {
        Arc::clone(self.context.caller.answers())
    }

    fn map(&self) -> Option<Arc<ShardMap>> {
        Some(self.context.map())
    }

    async fn refresh(&self, older_than: MapVersion) {
        self.context.wait_for_map(older_than).await;
    }

    async fn call(&self, shard: GroupId, body: ShardBody, options: Options) -> ShardReply {
        let deadline = Instant::now() + options.timeout;
        let stale = options.consistency == Consistency::Stale;
        let local = self
            .context
            .registry
            .get(shard)
            .filter(|group| stale || group.leads());
        match (local, options.routing) {
            (Some(group), _) => self.execute(&group, body, deadline).await,
            (None, Routing::Proxy) => self.forward(shard, body, options).await,
            (None, Routing::Redirect) => match self.redirect(shard, options).await {
                Some(failure) => ShardReply::Failed(failure),
                None => {
                    // The search for the leader has used up some of the time.
                    let timeout = deadline.saturating_duration_since(Instant::now());
                    let options = Options { timeout, ..options };
                    self.forward(shard, body, options).await
                }
            },
        }
    }

    fn lead_changed(&self, shard: GroupId) -> impl Future<Output = ()> + Send {
        self.locator.lead_changed(shard)
    }

    async fn locate(&self, shard: GroupId, options: Options) -> Result<(), Failure> {
        match self
            .context
            .registry
            .get(shard)
            .is_some_and(|group| group.leads())
        {
            true => Ok(()),
            false => self.redirect(shard, options).await.map_or(Ok(()), Err),
        }
    }

    fn this_node(&self) -> Option<NodeId> {
        Some(self.context.node)
    }

    async fn contact(&self, shard: GroupId) -> Option<Address> {
        self.home_probe
            .node_to_ask(
                &self.context.map(),
                shard,
                self.context.known_leader(shard),
                |node| &node.address,
            )
            .await
    }

    async fn status(&self) -> Result<ClusterStatus, Failure> {
        Ok(self.context.status().await)
    }

    async fn transfer_leader(
        &self,
        shard: GroupId,
        to: Option<Address>,
        options: Options,
    ) -> Result<Address, Failure> {
        let deadline = Instant::now() + options.timeout;
        let view = self.context.view();
        let group = view.groups.get(&shard).ok_or_else(|| Failure::Invalid {
            reason: format!("there is no shard {shard:#}"),
        })?;

        let node = match &to {
            None => group.home,
            Some(address) => {
                let named = self.context.map().node_named(address);
                named.ok_or_else(|| Failure::Invalid {
                    reason: format!("{address} is no node of the view, or several are"),
                })?
            }
        };
        let replica = view.replica_on(shard, node);
        let replica = replica.ok_or_else(|| Failure::Invalid {
            reason: format!(
                "{} has no replica of shard {shard:#}",
                to.as_ref().map_or("its home", Address::as_str)
            ),
        })?;

        // Only the leader can hand over: a client is sent there.
        let local = self.context.registry.get(shard);
        let Some(local) = local.filter(|group| group.leads()) else {
            let found = self.locator.find(shard, deadline).await?;
            let elsewhere = found.and_then(|leader| self.elsewhere_at(shard, leader));
            return Err(elsewhere.unwrap_or_else(|| self.no_leader(shard)));
        };

        if node != self.context.node {
            let transferred = timeout_at(deadline, local.transfer_leader(replica)).await;
            let reason = match transferred {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(error.to_string()),
                Err(_) => Some("it took too long".to_owned()),
            };
            if let Some(reason) = reason {
                return Err(unavailable(format!(
                    "the leadership of shard {shard:#} was not handed over: {reason}"
                )));
            }
        }

        Ok(view.nodes.get(&node).map_or_else(
            || self.context.address.clone(),
            |node| node.public().clone(),
        ))
    }

    async fn change_view(
        &self,
        change: ViewChange,
        only_if: Option<PlanEpoch>,
        options: Options,
    ) -> Result<ChangeInProgress, ViewChangeFailure> {
        match self.meta_leader().map_err(ViewChangeFailure::Failed)? {
            None => self.operator.change(&change, only_if, options).await,
            Some(leader) => {
                let asked = view_change_calls::change(
                    self.context.caller.transport(),
                    leader,
                    &change,
                    only_if,
                    options,
                )
                .await;
                asked.map_err(|unsettled| self.of_meta_leader(unsettled))
            }
        }
    }

    async fn plan_view(
        &self,
        change: ViewChange,
        options: Options,
    ) -> Result<PlannedChange, ViewChangeFailure> {
        match self.meta_leader().map_err(ViewChangeFailure::Failed)? {
            None => self.operator.preview(&change, options).await,
            Some(leader) => {
                let asked = view_change_calls::plan(
                    self.context.caller.transport(),
                    leader,
                    &change,
                    options,
                )
                .await;
                asked.map_err(|unsettled| self.of_meta_leader(unsettled))
            }
        }
    }

    async fn operation(
        &self,
        id: PlanEpoch,
        options: Options,
    ) -> Result<Option<ChangeInProgress>, Failure> {
        match self.meta_leader()? {
            None => self.operator.operation(id, options).await,
            Some(leader) => {
                let asked = view_change_calls::operation(
                    self.context.caller.transport(),
                    leader,
                    id,
                    options,
                )
                .await;
                Ok(asked.map_err(|unsettled| self.of_meta_leader(unsettled))?)
            }
        }
    }

    async fn await_change(&self, id: PlanEpoch, at_most: Duration) -> Option<bool> {
        Some(self.context.hears_of_end(id, at_most).await)
    }
}

impl LocalShards {
    /// Returns the failure as it is told. Where the leader of the meta group, as it is known here,
    /// says nothing, it may be gone: that is not what was asked for, so what the group lacks is
    /// said beside it.
    fn of_meta_leader(&self, unsettled: Unsettled) -> ViewChangeFailure {
        match unsettled {
            Unsettled {
                by: FailureSource::Nobody,
                failure: ViewChangeFailure::Failed(failure),
            } => ViewChangeFailure::Failed(self.context.for_want_of_meta(failure)),
            Unsettled { failure, .. } => failure,
        }
    }

    /// Returns the address of the meta group's leader; None if this node leads it.
    fn meta_leader(&self) -> Result<Option<Address>, Failure> {
        let meta = self.context.registry.get(GroupId::META);
        let meta = meta.ok_or_else(|| unavailable("the meta group is not open here".to_owned()))?;
        if meta.leads() {
            return Ok(None);
        }

        // A leader whose lanes have all broken may have ended: a call would only use up the time.
        let is_known = |leader: &NodeId| {
            *leader != self.context.node && !self.context.registry.is_disconnected(*leader)
        };
        let leader = meta.status().leader.filter(is_known);
        let address = leader
            .and_then(|leader| self.context.views().resolve(leader))
            .map(|peer| peer.address);
        let none = || {
            format!(
                "the meta group has no leader now{}",
                self.context.missing_of(GroupId::META)
            )
        };
        address.map(Some).ok_or_else(|| unavailable(none()))
    }
}

fn overloaded(limit: String) -> Failure {
    Failure::Overloaded {
        limit,
        retry_after_ms: RETRY_AFTER_MS,
    }
}

/// Returns the failure of a call: a read that got no answer can be asked again; a write that got
/// none may have been done.
fn call_failure(error: CallError, writes: bool) -> Failure {
    match Failure::from(error) {
        Failure::Unknown { reason } if !writes => unavailable(reason),
        failure => failure,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::testing::{ScriptedTransport, TestContext, reply_after, silent};

    const SHARD: GroupId = GroupId(1);

    fn get() -> ShardBody {
        ShardBody::Get {
            key: Bytes::from_static(b"k"),
            consistency: Consistency::Linearizable,
        }
    }

    /// Has a node show that it leads, by an answer that takes no time.
    fn note_leader(node: &TestContext, leader: NodeId) {
        let question = node.context.leader_question(SHARD);
        node.context.note_leader(SHARD, leader, question);
    }

    fn proxied() -> Options {
        Options {
            consistency: Consistency::Linearizable,
            routing: Routing::Proxy,
            timeout: Duration::from_secs(60),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_read_does_not_wait_for_a_leader_that_another_followed_just_after_it_was_asked() {
        let transport = ScriptedTransport::new(|_| silent());
        let node = TestContext::new(5, &transport);
        let shards = LocalShards::new(node.context.clone());
        let replicas = node.replicas_of(SHARD);
        let (before, after) = (replicas[0].0, replicas[1].0);
        note_leader(&node, before);

        let read = async {
            let reply = ShardAccess::call(&shards, SHARD, get(), proxied()).await;
            (reply, Instant::now())
        };
        // Heard of before the first is doubted, and it stays as fresh as a leader's word is.
        let change = async {
            let began = Instant::now();
            while began.elapsed() < Duration::from_secs(5) {
                tokio::time::sleep(Duration::from_millis(100)).await;
                note_leader(&node, after);
            }
            began
        };
        let ((reply, ended), began) = tokio::join!(read, change);
        assert!(
            matches!(&reply, ShardReply::Failed(Failure::Unavailable { reason, .. })
                if reason.contains("another node leads")),
            "{reply:?}"
        );
        assert!(ended.duration_since(began) < Duration::from_secs(2));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stale_read_is_asked_of_a_replica_and_not_of_the_leader_by_way_of_it() {
        let transport = ScriptedTransport::new(|_| {
            reply_after(Duration::ZERO, &ShardReply::GotMany(Vec::new()))
        });
        let node = TestContext::new(5, &transport);
        let shards = LocalShards::new(node.context.clone());
        let home = node.context.map().shard(SHARD).expect("a shard").home;
        let reachability = node.context.registry.reachability();
        reachability.set_unreachable(home, true);

        let stale = Options {
            consistency: Consistency::Stale,
            ..proxied()
        };
        ShardAccess::call(&shards, SHARD, get(), stale).await;
        let paths: Vec<String> = transport
            .calls()
            .into_iter()
            .map(|call| call.path)
            .collect();
        assert_eq!(paths, ["/peer/shard"], "nobody need lead for it");
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_shows_only_that_its_node_led_when_it_was_asked() {
        let answer = ShardReply::GotMany(Vec::new());
        let transport =
            ScriptedTransport::new(move |_| reply_after(Duration::from_secs(1), &answer));
        let node = TestContext::new(5, &transport);
        let shards = LocalShards::new(node.context.clone());
        let leader = node.replicas_of(SHARD)[0].0;
        note_leader(&node, leader);
        assert_eq!(shards.locator.known(SHARD), Some(leader));

        let reply = ShardAccess::call(&shards, SHARD, get(), proxied()).await;
        assert!(reply.shows_leadership(), "{reply:?}");
        assert_eq!(
            shards.locator.known(SHARD),
            None,
            "it may have lost its lead in the second that its answer took"
        );
    }
}
