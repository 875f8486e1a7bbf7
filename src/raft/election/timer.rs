//! [`ElectionTimer`]: decides when a leader sends heartbeats and when a follower campaigns. One
//! task ticks the timers of all replicas of a node.
//!
//! openraft's own ticks would wake each replica about forty times a second to find that nothing is
//! due; with a thousand replicas that alone takes most of a core. So they are off, and
//! [`run_election_timers`] looks at all replicas in one go. openraft decides what a campaign is
//! worth: it refuses to campaign while the lease of a leader holds, and asks for pre-votes first.
//!
//! On an overloaded machine a leader that is only slow must not pass for one that is gone. So
//! silence counts only while this node ran, judged by how late its own timer is
//! ([`ElectionTimer::skip_pause`]). And if messages of a leader that goes on leading come late,
//! later ones are awaited longer for a while ([`HeartbeatDelay`]).

use parking_lot::{Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::sync::futures::Notified;
use tokio::time::{Instant, MissedTickBehavior};

use crate::raft::runtime::Random;
use crate::raft::status::Role;
use crate::raft::timings::RaftTimings;
use crate::types::ReplicaKind;

/// Decides when a replica has to do something of its own accord.
pub struct ElectionTimer {
    heartbeat: Duration,
    lease: Duration,
    election: (Duration, Duration),
    /// Extra time that a witness waits before it campaigns.
    patience: Duration,
    state: Mutex<TimerState>,
    /// A leader has sent something.
    heard: Notify,
}

struct TimerState {
    next_heartbeat: Instant,
    /// Time of the next campaign, unless a leader is heard from before.
    campaign_at: Instant,
    /// Earliest time of the next campaign: the one before must have had its time.
    attempt_from: Instant,
    /// Time of the last message of a leader.
    heard: Option<Instant>,
    /// The term of that leader, and when its last word was read.
    word: Option<(u64, Instant)>,
    /// The term of that leader, and since when it has been silent; time in which this node did not
    /// run does not count.
    silent_since: Option<(u64, Instant)>,
    delay: HeartbeatDelay,
}

/// Measures how late the messages of a leader come that goes on leading: the worst delay, halved
/// every [`DELAY_HALF_LIFE`]. Zero on a machine that is not overloaded.
#[derive(Debug, Clone, Copy)]
struct HeartbeatDelay {
    worst: Duration,
    at: Instant,
}

/// Long enough for a delay that recurs every few seconds to be remembered.
const DELAY_HALF_LIFE: Duration = Duration::from_secs(20);
/// Limits the extra wait, so that a leader that is gone is replaced after a few seconds on any
/// machine.
const DELAY_MAX: Duration = Duration::from_secs(1);
/// Factor by which the worst delay lengthens the wait for a leader: the next delay may be worse.
const DELAY_MARGIN: u32 = 2;

impl HeartbeatDelay {
    fn none(now: Instant) -> Self {
        Self {
            worst: Duration::ZERO,
            at: now,
        }
    }

    fn at(&self, now: Instant) -> Duration {
        let half_lives = now.duration_since(self.at).as_secs_f64() / DELAY_HALF_LIFE.as_secs_f64();
        self.worst.mul_f64(0.5_f64.powf(half_lives))
    }

    fn note(&mut self, delay: Duration, now: Instant) {
        if delay > self.at(now) {
            *self = Self {
                worst: delay.min(DELAY_MAX),
                at: now,
            };
        }
        assert!(self.worst <= DELAY_MAX, "a leader that is gone is replaced");
    }
}

/// The action that the timer asks of a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimerAction {
    Nothing,
    Heartbeat,
    Campaign,
}

/// The part that a replica can take in elections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ElectionRole {
    Leader,
    /// A voter among others.
    Voter,
    /// The only voter.
    OnlyVoter,
    /// A learner, a replica that has stopped, or one whose group has not begun.
    Passive,
}

impl ElectionRole {
    /// Returns the part of a replica in a group of so many voters.
    pub fn of(role: Role, is_voter: bool, voters: usize) -> Self {
        match role {
            Role::Leader => ElectionRole::Leader,
            Role::Stopped => ElectionRole::Passive,
            Role::Follower | Role::Candidate | Role::Learner => match (is_voter, voters) {
                (false, _) => ElectionRole::Passive,
                (true, 1) => ElectionRole::OnlyVoter,
                (true, _) => ElectionRole::Voter,
            },
        }
    }
}

impl ElectionTimer {
    /// Returns the timer of a replica that starts now.
    ///
    /// A witness campaigns at once after it has refused its vote to a candidate with an older log
    /// ([`ElectionTimer::on_older_log_refused`]), because the others need what it has. Otherwise it
    /// leaves replicas that can serve much time to campaign first, but not forever: one of them may
    /// have a vote without knowing it, if it lacks the entry that says so.
    pub fn new(timings: &RaftTimings, kind: ReplicaKind) -> Self {
        assert!(
            timings.heartbeat_ms < timings.election_ms_min
                && timings.election_ms_min <= timings.election_ms_max,
            "heartbeats come before any election timeout"
        );
        let now = Instant::now();
        let bounds = (
            Duration::from_millis(timings.election_ms_min),
            Duration::from_millis(timings.election_ms_max),
        );

        let patience = match kind {
            ReplicaKind::Witness => timings.witness_patience(),
            ReplicaKind::Data => Duration::ZERO,
        };
        // The replica may have granted a lease before it was restarted, without knowing.
        let from = now + timings.forgotten_lease();

        let state = TimerState {
            next_heartbeat: now,
            campaign_at: from + between(bounds) + patience,
            attempt_from: from,
            heard: None,
            word: None,
            silent_since: None,
            delay: HeartbeatDelay::none(now),
        };

        let heartbeat = Duration::from_millis(timings.heartbeat_ms);
        Self {
            heartbeat,
            lease: bounds.1,
            election: bounds,
            patience,
            state: Mutex::new(state),
            heard: Notify::new(),
        }
    }

    /// Notes a message of the leader of `term`, and draws the next campaign afresh. Earlier draws
    /// no longer count: the latest of many draws would always be a long one.
    pub fn on_leader_message(&self, term: u64) {
        let now = Instant::now();
        let mut state = self.lock();

        // The first message of a new leader says nothing about how late messages come.
        if let Some((_, since)) = state.silent_since.filter(|(before, _)| *before == term) {
            let late = now
                .saturating_duration_since(since)
                .saturating_sub(self.heartbeat * 2);
            state.delay.note(late, now);
        }
        state.campaign_at = now + self.lease + self.draw(&state, now);
        state.heard = Some(now);
        state.silent_since = Some((term, now));
        state.word = Some((term, now));
        drop(state);
        self.heard.notify_waiters();
    }

    /// Returns the term of the leader that was heard of last, and for how many milliseconds it has
    /// been silent.
    pub fn last_word(&self) -> Option<(u64, u64)> {
        let (term, at) = self.lock().word?;
        Some((
            term,
            u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX),
        ))
    }

    /// Resolves when a leader is heard of after the call.
    pub fn next_word(&self) -> Notified<'_> {
        self.heard.notified()
    }

    /// Discounts a pause in which this node, or this part of it, did not run. Messages of the
    /// leader may be waiting to be read, so the pause was no silence, and a moment is left to read
    /// them.
    pub fn skip_pause(&self, pause: Duration) {
        let now = Instant::now();
        let mut state = self.lock();
        let moment = now + self.heartbeat;
        state.campaign_at = (state.campaign_at + pause).max(moment);
        state.attempt_from = state.attempt_from.max(moment);
        if let Some((_, since)) = &mut state.silent_since {
            *since = (*since + pause).min(now);
        }
    }

    /// Returns the random wait before the next campaign, on top of the lease.
    fn draw(&self, state: &TimerState, now: Instant) -> Duration {
        between(self.election) + self.patience + state.delay.at(now) * DELAY_MARGIN
    }

    /// Returns true if a leader has sent something recently enough to hold a lease.
    pub fn is_leased(&self) -> bool {
        self.lock()
            .heard
            .is_some_and(|heard| heard.elapsed() < self.lease)
    }

    /// Notes that the leader's process has probably died: the replica does not wait for the
    /// election timeout.
    ///
    /// It still waits a moment for the other voters to notice as well, and for each voter that
    /// comes before it in the succession (`rank`) a heartbeat to win. Otherwise two would now and
    /// then campaign at once, and neither win.
    pub fn on_leader_disconnected(&self, rank: u32) {
        if self.patience.is_zero() {
            let moment = self.heartbeat / 4;
            let now = Instant::now();
            let at = now + between((moment, moment * 2)) + self.heartbeat * rank;
            let mut state = self.lock();
            state.campaign_at = state.campaign_at.min(at);
            // The leader was not slow but dead, so the next one gets no extra time.
            state.delay = HeartbeatDelay::none(now);
        }
    }

    /// Notes that this replica has voted for another, which now gets its time to win.
    pub fn on_vote_granted(&self) {
        let now = Instant::now();
        let mut state = self.lock();
        state.campaign_at = state.campaign_at.max(now + self.draw(&state, now));
    }

    /// Notes that this replica refused its vote to a candidate that lacks entries which it has.
    /// Such a candidate cannot win while the entries are needed for a majority.
    pub fn on_older_log_refused(&self) {
        if !self.patience.is_zero() {
            self.lock().campaign_at = Instant::now();
        }
    }

    /// Returns what is due now, and takes it for done.
    pub fn take_action(&self, role: ElectionRole) -> TimerAction {
        let now = Instant::now();
        let mut state = self.lock();
        let campaign = match role {
            ElectionRole::Passive => return TimerAction::Nothing,
            ElectionRole::Leader => {
                // A leader that is deposed starts its election timeout then.
                state.campaign_at = state.campaign_at.max(now + self.election.0);
                if now < state.next_heartbeat {
                    return TimerAction::Nothing;
                }
                state.next_heartbeat = now + self.heartbeat;
                return TimerAction::Heartbeat;
            }
            ElectionRole::Voter => now >= state.campaign_at && now >= state.attempt_from,
            ElectionRole::OnlyVoter => now >= state.attempt_from,
        };

        if !campaign {
            return TimerAction::Nothing;
        }
        // Votes may come as late as other messages do.
        let next = now + between(self.election) + state.delay.at(now);
        state.campaign_at = next + self.patience;
        state.attempt_from = next;
        assert!(now < next, "a campaign has time before the next");
        TimerAction::Campaign
    }

    fn lock(&self) -> MutexGuard<'_, TimerState> {
        self.state.lock()
    }
}

fn between((min, max): (Duration, Duration)) -> Duration {
    min + Duration::from_micros(
        Random.below(u64::try_from((max - min).as_micros()).unwrap_or(u64::MAX)),
    )
}

/// Runs the election timers of all replicas: calls `tick_all` at every tick, with the length of the
/// pause if this node did not run for a while, until it returns false.
pub async fn run_election_timers(
    every: Duration,
    mut tick_all: impl FnMut(Option<Duration>) -> bool,
) {
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last = Instant::now();
    loop {
        ticks.tick().await;
        let pause = pause_of(last.elapsed(), every);
        last = Instant::now();
        if !tick_all(pause) {
            return;
        }
    }
}

/// Returns how long this node did not run, judged by how late its own timer was; None if that is
/// negligible.
fn pause_of(took: Duration, every: Duration) -> Option<Duration> {
    Some(took.saturating_sub(every)).filter(|late| *late > every)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::LeaseReads;

    const STEP: Duration = Duration::from_millis(10);

    /// Until something is due, and what.
    async fn wait(timer: &ElectionTimer, role: ElectionRole) -> (u128, TimerAction) {
        let start = Instant::now();
        loop {
            match timer.take_action(role) {
                TimerAction::Nothing => tokio::time::advance(STEP).await,
                due => return (start.elapsed().as_millis(), due),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn followers_campaign_after_lease_and_timeout_and_again_after_a_timeout() {
        let timer = ElectionTimer::new(&RaftTimings::default(), ReplicaKind::Data);
        let (first, due) = wait(&timer, ElectionRole::Voter).await;
        assert_eq!(due, TimerAction::Campaign);
        assert!((210..=430).contains(&first), "the first after {first} ms");
        timer.on_leader_message(1);
        let (silent_ms, _) = wait(&timer, ElectionRole::Voter).await;
        assert!(
            (630..=850).contains(&silent_ms),
            "after {silent_ms} ms of silence"
        );
        timer.on_vote_granted();
        let (next, _) = wait(&timer, ElectionRole::Voter).await;
        assert!((210..=430).contains(&next), "the next after {next} ms");
        assert_eq!(
            timer.take_action(ElectionRole::Passive),
            TimerAction::Nothing
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_witness_campaigns_late_or_when_it_has_refused_an_older_log() {
        let timer = ElectionTimer::new(&RaftTimings::default(), ReplicaKind::Witness);
        timer.on_leader_message(1);
        let (silent_ms, _) = wait(&timer, ElectionRole::Voter).await;
        assert!(
            silent_ms >= 630 + 4 * 420,
            "after {silent_ms} ms of silence"
        );
        tokio::time::advance(Duration::from_secs(1)).await;
        timer.on_leader_message(2);
        timer.on_older_log_refused();
        assert_eq!(
            wait(&timer, ElectionRole::Voter).await,
            (0, TimerAction::Campaign)
        );
        timer.on_older_log_refused();
        let (next, _) = wait(&timer, ElectionRole::Voter).await;
        assert!(
            (210..=430).contains(&next),
            "one campaign has its time before the next: {next} ms"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn leaders_beat_and_an_only_voter_does_not_wait() {
        let timer = ElectionTimer::new(&RaftTimings::default(), ReplicaKind::Data);
        assert_eq!(
            wait(&timer, ElectionRole::OnlyVoter).await,
            (0, TimerAction::Campaign)
        );
        assert_eq!(
            wait(&timer, ElectionRole::Leader).await,
            (0, TimerAction::Heartbeat)
        );
        assert_eq!(
            wait(&timer, ElectionRole::Leader).await,
            (120, TimerAction::Heartbeat)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_that_has_just_ended_is_not_waited_for() {
        let timer = ElectionTimer::new(&RaftTimings::default(), ReplicaKind::Data);
        timer.on_leader_message(1);
        timer.on_leader_disconnected(0);
        let (first, due) = wait(&timer, ElectionRole::Voter).await;
        assert_eq!(due, TimerAction::Campaign);
        assert!(
            (30..=70).contains(&first),
            "the first heir after {first} ms"
        );
        tokio::time::advance(Duration::from_secs(1)).await;
        timer.on_leader_message(1);
        timer.on_leader_disconnected(2);
        let (third, _) = wait(&timer, ElectionRole::Voter).await;
        assert!((270..=310).contains(&third), "the third after {third} ms");
        // It lives after all.
        timer.on_leader_disconnected(0);
        timer.on_leader_message(1);
        let (silent_ms, _) = wait(&timer, ElectionRole::Voter).await;
        assert!(silent_ms >= 630, "after {silent_ms} ms of silence");
        let witness = ElectionTimer::new(&RaftTimings::default(), ReplicaKind::Witness);
        witness.on_leader_message(1);
        witness.on_leader_disconnected(0);
        let (late, _) = wait(&witness, ElectionRole::Voter).await;
        assert!(
            late >= 630 + 4 * 420,
            "a witness leaves it to the others for {late} ms"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn the_time_that_a_node_did_not_run_is_no_silence() {
        let timer = ElectionTimer::new(&RaftTimings::default(), ReplicaKind::Data);
        timer.on_leader_message(1);
        tokio::time::advance(Duration::from_millis(300)).await;
        // It is stopped for longer than any timeout, and does not know yet that the leader has
        // spoken meanwhile.
        tokio::time::advance(Duration::from_secs(5)).await;
        timer.skip_pause(Duration::from_secs(5));
        let (more, due) = wait(&timer, ElectionRole::Voter).await;
        assert_eq!(due, TimerAction::Campaign);
        assert!(
            (330..=550).contains(&more),
            "it campaigns {more} ms after it went on"
        );

        // However little was left, there is a moment to hear what waits to be read.
        timer.on_leader_message(2);
        tokio::time::advance(Duration::from_secs(2)).await;
        timer.skip_pause(Duration::from_millis(50));
        let (more, _) = wait(&timer, ElectionRole::Voter).await;
        assert!(
            (120..=140).contains(&more),
            "it campaigns {more} ms after it went on"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_whose_words_come_late_is_waited_for_longer_for_a_while() {
        let timer = ElectionTimer::new(&RaftTimings::default(), ReplicaKind::Data);
        for _ in 0..3 {
            timer.on_leader_message(1);
            tokio::time::advance(Duration::from_millis(600)).await;
        }
        timer.on_leader_message(1);
        let (silent_ms, _) = wait(&timer, ElectionRole::Voter).await;
        assert!(
            (1330..=1570).contains(&silent_ms),
            "after {silent_ms} ms of silence"
        );
        // Once it has certainly ended, there is nothing to wait for.
        tokio::time::advance(Duration::from_secs(2)).await;
        timer.on_leader_message(1);
        timer.on_leader_disconnected(0);
        assert!((30..=70).contains(&wait(&timer, ElectionRole::Voter).await.0));
        let (next, _) = wait(&timer, ElectionRole::Voter).await;
        assert!(
            (210..=430).contains(&next),
            "the next campaign after {next} ms"
        );

        timer.on_leader_message(2);
        tokio::time::advance(Duration::from_millis(600)).await;
        timer.on_leader_message(2);
        tokio::time::advance(DELAY_HALF_LIFE * 8).await;
        timer.on_leader_message(3);
        let (silent_ms, _) = wait(&timer, ElectionRole::Voter).await;
        assert!(
            (630..=860).contains(&silent_ms),
            "it has forgotten: after {silent_ms} ms of silence"
        );

        // A leader that was gone for long, and another after it, are no sign of delay, nor is what
        // this node itself missed.
        tokio::time::advance(Duration::from_secs(3)).await;
        timer.on_leader_message(4);
        tokio::time::advance(Duration::from_secs(3)).await;
        timer.skip_pause(Duration::from_secs(3));
        timer.on_leader_message(4);
        let (silent_ms, _) = wait(&timer, ElectionRole::Voter).await;
        assert!(
            (630..=860).contains(&silent_ms),
            "after {silent_ms} ms of silence"
        );
    }

    #[test]
    fn a_timer_that_comes_a_little_late_means_nothing() {
        let (every, ms) = (Duration::from_millis(20), Duration::from_millis);
        assert_eq!(
            [20, 25, 40].map(|took| pause_of(ms(took), every)),
            [None; 3]
        );
        assert_eq!(pause_of(ms(520), every), Some(ms(500)));
        assert_eq!(pause_of(ms(3), every), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_that_may_have_been_forgotten_is_waited_for() {
        let timings = RaftTimings {
            lease: LeaseReads::On { drift_ms: 100 },
            ..RaftTimings::default()
        };
        let timer = ElectionTimer::new(&timings, ReplicaKind::Data);
        timer.on_vote_granted();
        let (first, _) = wait(&timer, ElectionRole::Voter).await;
        assert!(first >= 730, "the first after {first} ms");
    }
}
