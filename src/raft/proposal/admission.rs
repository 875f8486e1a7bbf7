//! Admits proposals and reads to a replica: refuses what it must not take, and proposes the
//! commands that are entries of their own.
//!
//! An error other than `Unknown` means that nothing was proposed.

use std::sync::atomic::Ordering;
use std::time::Duration;

use openraft::error::ClientWriteError;
use openraft::errors::{ForwardReason, ForwardToLeader};
use openraft::raft::ClientWriteResult;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::proposer::propose_error;
use crate::raft::errors::{ProposeError, ReadError, SHUT_DOWN};
use crate::raft::replica::Replica;
use crate::raft::status::Role;
use crate::raft::types::{ApplyOutcome, Proposal, ResponderFn, Types};
use crate::sm::cluster::meta;
use crate::sm::disk_level::DiskLevel;
use crate::sm::kv;
use crate::sm::level::Feature;

/// Pause between attempts of a proposal while the leader's lease has expired.
const LEASE_PAUSE: Duration = Duration::from_millis(5);

impl Replica {
    /// Proposes a write, in one entry with others that are queued. After any error except `Unknown`
    /// it has certainly not been applied.
    pub async fn propose(
        &self,
        write: kv::Write,
        deadline: Instant,
    ) -> Result<kv::WriteOutcome, ProposeError> {
        self.propose_with_gets(write, 0, deadline).await
    }

    /// Proposes a write like [`Replica::propose`], whose gets return about `answer_bytes`; they
    /// count towards the size of the entry.
    pub async fn propose_with_gets(
        &self,
        write: kv::Write,
        answer_bytes: usize,
        deadline: Instant,
    ) -> Result<kv::WriteOutcome, ProposeError> {
        self.ensure_proposes()?;
        self.await_own_term(deadline).await?;
        self.ensure_writable(write.frees())?;
        if self.context.log.is_overloaded() {
            return Err(ProposeError::Overloaded {
                limit: "the log's disk does not keep up".into(),
            });
        }
        self.proposer.propose(write, answer_bytes, deadline).await
    }

    /// Proposes a command of a shard as an entry of its own.
    pub async fn propose_command(
        &self,
        command: kv::KvCommand,
        deadline: Instant,
    ) -> Result<kv::KvOutcome, ProposeError> {
        self.ensure_allowed(command.needs())?;

        // A read-only group must go on comparing, because only that ends the state.
        if !command.is_of_agreement() {
            self.await_own_term(deadline).await?;
            self.ensure_writable(false)?;
        }
        match self.propose_entry(command.encode(), deadline).await? {
            ApplyOutcome::Shard(outcome) => Ok(outcome),
            other => Err(ProposeError::unknown(format!(
                "a command of a shard was answered by {other:?}"
            ))),
        }
    }

    /// Proposes a command of the meta group.
    pub async fn propose_meta(
        &self,
        command: meta::MetaCommand,
        deadline: Instant,
    ) -> Result<meta::MetaOutcome, ProposeError> {
        self.ensure_allowed(command.needs())?;
        match self.propose_entry(command.encode(), deadline).await? {
            ApplyOutcome::Meta(outcome) => Ok(outcome),
            other => Err(ProposeError::unknown(format!(
                "a command of the meta group was answered by {other:?}"
            ))),
        }
    }

    /// Returns true if a leader may use `feature`, because every node of the cluster can read it.
    pub fn allows(&self, feature: Feature) -> bool {
        self.context.resolver.level() >= feature.level()
    }

    fn ensure_allowed(&self, needs: Option<Feature>) -> Result<(), ProposeError> {
        match needs.filter(|feature| !self.allows(*feature)) {
            Some(needs) => Err(ProposeError::NotYet { needs }),
            None => Ok(()),
        }
    }

    /// Waits until a leader has applied an entry of its own term, and with it everything that was
    /// decided before: until then its map may not know yet that the group is read-only. That entry
    /// is being replicated anyway, and a write would be applied only after it.
    async fn await_own_term(&self, deadline: Instant) -> Result<(), ProposeError> {
        if !self.allows(Feature::ReadOnlyEntries) {
            return Ok(());
        }
        let mut watch = self.watch();
        let (role, term) = {
            let watch = watch.borrow();
            (watch.role, watch.term)
        };
        if role != Role::Leader || self.apply_state.applied_term() >= term {
            return Ok(());
        }
        let mut applied = self.watch_applied();
        let leads_no_more = watch.wait_for(|now| now.role != Role::Leader || now.term != term);
        tokio::select! {
            _ = applied.wait_for(|_| self.apply_state.applied_term() >= term) => Ok(()),
            _ = leads_no_more => Ok(()),
            () = tokio::time::sleep_until(deadline) => Err(ProposeError::Expired),
        }
    }

    /// Refuses writes for this reason as long as this replica leads, or allows them again, unless
    /// the map says that the group is read-only.
    pub fn set_alarm(&self, alarm: Option<String>) {
        let mut now = self.alarm.lock();
        self.is_read_only.store(alarm.is_some(), Ordering::Relaxed);
        *now = alarm;
    }

    /// Returns the reason why writes are refused, if they are.
    pub fn alarm(&self) -> Option<String> {
        let own = self.alarm.lock().clone();
        own.or_else(|| self.recorded_alarm())
    }

    /// Returns the reason why writes are refused that is recorded in the map, for this leader and
    /// those to come.
    pub fn recorded_alarm(&self) -> Option<String> {
        self.apply_state.read_only()
    }

    /// Notes how full the disks of a majority of the voters are, as far as is known here.
    pub fn set_voters_disk_level(&self, level: DiskLevel) {
        *self.voters_disk_level.lock() = level;
    }

    /// A user frees space by deleting, so what does nothing else (`frees`) is taken for longer.
    fn ensure_room(&self, frees: bool) -> Result<(), ProposeError> {
        let log = &self.context.log;
        if !log.disk_level().takes_write(frees) {
            let reason = log.lacks_room().unwrap_or_default();
            return Err(ProposeError::NoRoom { reason });
        }
        let of_voters = *self.voters_disk_level.lock();
        if !of_voters.takes_write(frees) {
            // An entry would wait for them, and who wrote it would not learn what became of it.
            let reason = "the disks of most of its shard's replicas are nearly full".to_owned();
            return Err(ProposeError::NoRoom { reason });
        }
        Ok(())
    }

    fn ensure_writable(&self, frees: bool) -> Result<(), ProposeError> {
        self.ensure_room(frees)?;
        if !self.is_read_only.load(Ordering::Relaxed) && !self.apply_state.is_read_only() {
            return Ok(());
        }
        Err(ProposeError::ReadOnly {
            reason: self.alarm().unwrap_or_default(),
        })
    }

    /// Refuses proposals on a witness, even one that leads, and on a leader that has stepped down.
    fn ensure_proposes(&self) -> Result<(), ProposeError> {
        let is_none = self.is_witness() || self.has_stepped_down(&self.watch.borrow());
        if is_none {
            Err(ProposeError::NotLeader { leader: None })
        } else {
            Ok(())
        }
    }

    async fn propose_entry(
        &self,
        entry: bytes::Bytes,
        deadline: Instant,
    ) -> Result<ApplyOutcome, ProposeError> {
        self.ensure_proposes()?;

        loop {
            if Instant::now() >= deadline {
                return Err(ProposeError::Expired);
            }

            // The reservation lives in the responder, so that it is held until openraft lets go of
            // the entry, even if this caller has given up.
            let (sender, answered) = oneshot::channel::<ClientWriteResult<Types>>();
            let place = self.proposer.reserve(entry.len())?;
            let answer = ResponderFn(Box::new(move |result| {
                drop(place);
                drop(sender.send(result));
            }));

            if self
                .raft
                .client_write_ff(Proposal(entry.clone()), Some(answer))
                .await
                .is_err()
            {
                return Err(ProposeError::Stopped {
                    reason: self.stop_reason(),
                });
            }

            // A leader whose lease has expired has not appended the entry: only that attempt is
            // repeated.
            match tokio::time::timeout_at(deadline, answered).await {
                Ok(Ok(Ok(response))) => return Ok(response.data),
                Ok(Ok(Err(ClientWriteError::ForwardToLeader(ForwardToLeader {
                    reason: ForwardReason::LeaseExpired,
                    ..
                })))) => {
                    tokio::time::sleep(LEASE_PAUSE).await;
                }
                Ok(Ok(Err(error))) => return Err(propose_error(error)),
                Ok(Err(_)) => return Err(ProposeError::unknown("the replica stopped")),
                Err(_) => return Err(ProposeError::unknown("it was not applied in time")),
            }
        }
    }

    /// Waits until everything that was acknowledged before the call can be read from
    /// [`Replica::state`].
    pub async fn read_barrier(&self, deadline: Instant) -> Result<(), ReadError> {
        if self.is_witness() || self.has_stepped_down(&self.watch.borrow()) {
            return Err(ReadError::NotLeader { leader: None });
        }
        self.reads.confirm(deadline).await
    }

    fn stop_reason(&self) -> String {
        self.apply_state
            .failure()
            .unwrap_or_else(|| SHUT_DOWN.to_owned())
    }
}
