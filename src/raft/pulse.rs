//! The pulse of a node: one timer that makes leaders send heartbeats and followers campaign, for every group.
//!
//! Openraft's own ticks would wake each replica about forty times a second to find that nothing is due; with a thousand replicas that
//! alone takes most of a core. So they are off, and [`beat`] looks at all groups in one go. What a replica then does is openraft's: it
//! refuses to campaign while the lease of a leader holds, and asks for pre-votes first.

use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior};

use super::registry::Registry;
use super::runtime::Random;
use super::status::Role;
use super::timings::RaftTimings;

/// When a replica has to do something by itself.
pub struct Timer {
    heartbeat: Duration,
    lease: Duration,
    election: (Duration, Duration),
    /// By how much longer it waits before it campaigns.
    patience: Duration,
    state: Mutex<State>,
}

struct State {
    next_heartbeat: Instant,
    /// Unless a leader is heard of before.
    campaign_at: Instant,
    /// One campaign must have had its time before the next.
    attempt_from: Instant,
    /// When a leader has last sent something.
    heard: Option<Instant>,
}

/// What a replica has to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    Nothing,
    Heartbeat,
    Campaign,
}

/// What a replica may do by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    Leader,
    /// Has a vote, among others.
    Voter,
    /// Is the only voter.
    OnlyVoter,
    /// Learners, those that have stopped, and those whose group has not begun.
    Passive,
}

impl Standing {
    pub fn of(role: Role, is_voter: bool, voters: usize) -> Self {
        match role {
            Role::Leader => Standing::Leader,
            Role::Stopped => Standing::Passive,
            Role::Follower | Role::Candidate | Role::Learner => match (is_voter, voters) {
                (false, _) => Standing::Passive,
                (true, 1) => Standing::OnlyVoter,
                (true, _) => Standing::Voter,
            },
        }
    }
}

impl Timer {
    /// A witness campaigns at once after it has refused its vote to one with an older log ([`Timer::refused_older_log`]): the others need what it
    /// has. Else it gives those that can serve much time to do so first, but not for ever: one of them may have a vote and not know it,
    /// when it lacks the entry that says so.
    pub fn new(timings: &RaftTimings, is_witness: bool) -> Self {
        let now = Instant::now();
        let bounds = (Duration::from_millis(timings.election_ms_min), Duration::from_millis(timings.election_ms_max));
        let patience = if is_witness { timings.witness_patience() } else { Duration::ZERO };
        // It may have given a lease before it was started, and does not know.
        let from = now + timings.forgotten_lease();
        let state =
            State { next_heartbeat: now, campaign_at: from + between(bounds) + patience, attempt_from: from, heard: None };
        let heartbeat = Duration::from_millis(timings.heartbeat_ms);
        Self { heartbeat, lease: bounds.1, election: bounds, patience, state: Mutex::new(state) }
    }

    /// A leader has sent something. What an earlier one drew no longer counts: the latest of many draws would always be a long one.
    pub fn heard_leader(&self) {
        let now = Instant::now();
        let mut state = self.lock();
        state.campaign_at = now + self.lease + between(self.election) + self.patience;
        state.heard = Some(now);
    }

    /// Whether a leader has sent something so lately that it holds a lease.
    pub fn is_leased(&self) -> bool {
        self.lock().heard.is_some_and(|heard| heard.elapsed() < self.lease)
    }

    /// The leader has probably just ended: no silence need tell so. The others are left a moment to notice it too, and those before this
    /// one in the succession the time to win: chance would have two campaign at once now and then, and neither win.
    pub fn leader_cut(&self, rank: u32) {
        if self.patience.is_zero() {
            let moment = self.heartbeat / 4;
            let at = Instant::now() + between((moment, moment * 2)) + self.heartbeat * rank;
            let mut state = self.lock();
            state.campaign_at = state.campaign_at.min(at);
        }
    }

    /// Another replica has this one's vote, and now its time to win.
    pub fn granted_vote(&self) {
        let at = Instant::now() + between(self.election) + self.patience;
        let mut state = self.lock();
        state.campaign_at = state.campaign_at.max(at);
    }

    /// Another wants to lead that lacks entries which this replica has: it will not, while the entries are needed for a majority.
    pub fn refused_older_log(&self) {
        if !self.patience.is_zero() {
            self.lock().campaign_at = Instant::now();
        }
    }

    /// What is due, which is then taken for done.
    pub fn take_due(&self, standing: Standing) -> Due {
        let now = Instant::now();
        let mut state = self.lock();
        let campaign = match standing {
            Standing::Passive => return Due::Nothing,
            Standing::Leader => {
                // A leader that is deposed begins to wait then.
                state.campaign_at = state.campaign_at.max(now + self.election.0);
                if now < state.next_heartbeat {
                    return Due::Nothing;
                }
                state.next_heartbeat = now + self.heartbeat;
                return Due::Heartbeat;
            }
            Standing::Voter => now >= state.campaign_at && now >= state.attempt_from,
            Standing::OnlyVoter => now >= state.attempt_from,
        };
        if !campaign {
            return Due::Nothing;
        }
        let next = now + between(self.election);
        state.campaign_at = next + self.patience;
        state.attempt_from = next;
        Due::Campaign
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }
}

fn between((min, max): (Duration, Duration)) -> Duration {
    min + Duration::from_micros(Random.below(u64::try_from((max - min).as_micros()).unwrap_or(u64::MAX)))
}

/// Looks at every group in turn, for as long as the registry lives.
pub async fn beat(registry: Weak<Registry>, every: Duration) {
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(registry) = Weak::upgrade(&registry) else { return };
        registry.with_groups(|group| Arc::as_ref(group).pulse());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::LeaseReads;

    const STEP: Duration = Duration::from_millis(10);

    /// Until something is due, and what.
    async fn wait(timer: &Timer, standing: Standing) -> (u128, Due) {
        let start = Instant::now();
        loop {
            match timer.take_due(standing) {
                Due::Nothing => tokio::time::advance(STEP).await,
                due => return (start.elapsed().as_millis(), due),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn followers_campaign_after_lease_and_timeout_and_again_after_a_timeout() {
        let timer = Timer::new(&RaftTimings::default(), false);
        let (first, due) = wait(&timer, Standing::Voter).await;
        assert_eq!(due, Due::Campaign);
        assert!((210..=430).contains(&first), "the first after {first} ms");
        timer.heard_leader();
        let (silent, _) = wait(&timer, Standing::Voter).await;
        assert!((630..=850).contains(&silent), "after {silent} ms of silence");
        timer.granted_vote();
        let (next, _) = wait(&timer, Standing::Voter).await;
        assert!((210..=430).contains(&next), "the next after {next} ms");
        assert_eq!(timer.take_due(Standing::Passive), Due::Nothing);
    }

    #[tokio::test(start_paused = true)]
    async fn a_witness_campaigns_late_or_when_it_has_refused_an_older_log() {
        let timer = Timer::new(&RaftTimings::default(), true);
        timer.heard_leader();
        let (silent, _) = wait(&timer, Standing::Voter).await;
        assert!(silent >= 630 + 4 * 420, "after {silent} ms of silence");
        tokio::time::advance(Duration::from_secs(1)).await;
        timer.heard_leader();
        timer.refused_older_log();
        assert_eq!(wait(&timer, Standing::Voter).await, (0, Due::Campaign));
        timer.refused_older_log();
        let (next, _) = wait(&timer, Standing::Voter).await;
        assert!((210..=430).contains(&next), "one campaign has its time before the next: {next} ms");
    }

    #[tokio::test(start_paused = true)]
    async fn leaders_beat_and_an_only_voter_does_not_wait() {
        let timer = Timer::new(&RaftTimings::default(), false);
        assert_eq!(wait(&timer, Standing::OnlyVoter).await, (0, Due::Campaign));
        assert_eq!(wait(&timer, Standing::Leader).await, (0, Due::Heartbeat));
        assert_eq!(wait(&timer, Standing::Leader).await, (120, Due::Heartbeat));
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_that_has_just_ended_is_not_waited_for() {
        let timer = Timer::new(&RaftTimings::default(), false);
        timer.heard_leader();
        timer.leader_cut(0);
        let (first, due) = wait(&timer, Standing::Voter).await;
        assert_eq!(due, Due::Campaign);
        assert!((30..=70).contains(&first), "the first heir after {first} ms");
        tokio::time::advance(Duration::from_secs(1)).await;
        timer.heard_leader();
        timer.leader_cut(2);
        let (third, _) = wait(&timer, Standing::Voter).await;
        assert!((270..=310).contains(&third), "the third after {third} ms");
        // It lives after all.
        timer.leader_cut(0);
        timer.heard_leader();
        let (silent, _) = wait(&timer, Standing::Voter).await;
        assert!(silent >= 630, "after {silent} ms of silence");
        let witness = Timer::new(&RaftTimings::default(), true);
        witness.heard_leader();
        witness.leader_cut(0);
        let (late, _) = wait(&witness, Standing::Voter).await;
        assert!(late >= 630 + 4 * 420, "a witness leaves it to the others for {late} ms");
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_that_may_have_been_forgotten_is_waited_for() {
        let timings = RaftTimings { lease: LeaseReads::On { drift_ms: 100 }, ..RaftTimings::default() };
        let timer = Timer::new(&timings, false);
        timer.granted_vote();
        let (first, _) = wait(&timer, Standing::Voter).await;
        assert!(first >= 730, "the first after {first} ms");
    }
}
