//! [`WakeGate`]: polls a secondary future of a task only when that future was woken itself.
//!
//! A task that waits for a connection and also for a stop and some timers is woken by the
//! connection at every request. Polling all the others each time takes locks, one of them shared by
//! all connections. So they have a waker of their own here, which sets a flag; without that flag a
//! poll costs two atomic reads.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures::task::AtomicWaker;

/// Wakes the task, and notes for whom.
#[derive(Debug, Default)]
struct WakeFlag {
    is_woken: AtomicBool,
    task: AtomicWaker,
}

impl Wake for WakeFlag {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // The flag before the wake: the task may run at once on another thread, and must see it.
        self.is_woken.store(true, Ordering::Release);
        self.task.wake();
    }
}

/// Has futures polled only when they were woken themselves. One for each task.
#[derive(Debug)]
pub struct WakeGate {
    flag: Arc<WakeFlag>,
    waker: Waker,
}

impl WakeGate {
    /// Returns one that is for no task yet.
    pub fn new() -> Self {
        let flag = Arc::new(WakeFlag::default());
        Self {
            waker: Waker::from(Arc::clone(&flag)),
            flag,
        }
    }

    /// Has the next poll reach the future: for one that was not polled before.
    pub fn open(&self) {
        self.flag.is_woken.store(true, Ordering::Release);
    }

    /// Polls `future` if it was woken since it was polled last.
    pub fn poll<F: Future>(&self, cx: &mut Context<'_>, future: Pin<&mut F>) -> Poll<F::Output> {
        // First, so that whoever rings after the look below wakes this task.
        self.flag.task.register(cx.waker());
        if !self.flag.is_woken.load(Ordering::Acquire) {
            return Poll::Pending;
        }

        // Cleared before the poll, so that a wake during the poll is kept for the next one.
        self.flag.is_woken.swap(false, Ordering::AcqRel);
        future.poll(&mut Context::from_waker(&self.waker))
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::pin::pin;
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    use tokio::sync::Notify;
    use tokio::task::yield_now;

    use super::*;

    #[tokio::test]
    async fn a_future_apart_is_polled_when_it_is_woken_and_not_when_its_task_is() {
        let (notify, polls) = (Arc::new(Notify::new()), Arc::new(AtomicUsize::new(0)));
        let (other, counter) = (Arc::clone(&notify), Arc::clone(&polls));
        let beside = async move {
            let mut notified = pin!(other.notified());
            poll_fn(|cx| {
                counter.fetch_add(1, Ordering::Relaxed);
                notified.as_mut().poll(cx)
            })
            .await;
        };
        let gate = WakeGate::new();
        gate.open();
        let mut beside = pin!(beside);
        let mut is_over = false;

        for turn in 0..200 {
            if turn == 100 {
                notify.notify_one();
            }
            let polled = poll_fn(|cx| Poll::Ready(gate.poll(cx, beside.as_mut()))).await;
            if polled.is_ready() {
                is_over = true;
                break;
            }
            yield_now().await;
        }
        assert!(is_over, "it was not polled when it was woken");
        assert_eq!(
            polls.load(Ordering::Relaxed),
            2,
            "once at first, once when it was woken"
        );
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_wake_is_lost_between_two_threads() {
        for _ in 0..2000 {
            let notify = Arc::new(Notify::new());
            let gate = WakeGate::new();
            gate.open();
            let other = Arc::clone(&notify);
            tokio::spawn(async move { other.notify_one() });
            let mut notified = pin!(notify.notified());
            let woken = poll_fn(|cx| gate.poll(cx, notified.as_mut()));
            tokio::time::timeout(Duration::from_secs(60), woken)
                .await
                .expect("a wake was lost");
        }
    }
}
