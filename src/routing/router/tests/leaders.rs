//! Requests that wait for a leader of their shard.

use super::*;

/// Has so many ask for a key of a shard without a leader, and elects one after three seconds, of
/// which they hear by themselves or not. How often the shard was asked until then, and how long the
/// last waited after it.
async fn wait_for_leader(requests: usize, is_heard_of: bool) -> (usize, Duration) {
    const LEADERLESS: Duration = Duration::from_secs(3);
    let router = filled(1, 1).await;
    router.access().state().is_leaderless = true;
    let start = Instant::now();
    let gets = futures::future::join_all((0..requests).map(|_| router.get(key(0), options())));
    let elect = async {
        sleep(LEADERLESS).await;
        router.access().state().is_leaderless = false;
        if is_heard_of {
            router.access().elected.notify_waiters();
        }
        calls(&router)
    };
    let (answers, asked) = futures::future::join(gets, elect).await;
    assert!(
        answers.iter().all(Result::is_ok),
        "they were answered by the leader in the end"
    );
    (asked, start.elapsed() - LEADERLESS)
}

#[tokio::test(start_paused = true)]
async fn one_of_those_who_wait_for_a_leader_asks_for_all() {
    const REQUESTS: usize = 1000;
    // The pauses of one request grow to 50 to 100 ms.
    let (alone, _) = wait_for_leader(1, false).await;
    assert!(
        (30..=70).contains(&alone),
        "one request asked {alone} times in three seconds"
    );
    let (asked, waited) = wait_for_leader(REQUESTS, false).await;
    assert!(
        asked <= REQUESTS + 70,
        "{REQUESTS} requests asked {asked} times"
    );
    assert!(
        waited <= PAUSE_MAX + Duration::from_millis(20),
        "the last waited for {waited:?} more"
    );
}

#[tokio::test(start_paused = true)]
async fn who_waits_is_not_woken_by_a_client_that_need_not_go_elsewhere() {
    const REQUESTS: usize = 1000;
    let router = filled(1, 1).await;
    router.access().state().is_leaderless = true;
    let writes = (0..REQUESTS).map(|_| router.write(vec![put(key(0), "v")], None, options()));
    let others = async {
        for _ in 0..100 {
            sleep(Duration::from_millis(20)).await;
            router
                .locate(key(0), redirect())
                .await
                .expect("nobody is sent elsewhere");
        }
        router.access().state().is_leaderless = false;
        calls(&router)
    };
    let (answers, asked) = futures::future::join(futures::future::join_all(writes), others).await;
    assert!(
        answers.iter().flatten().all(Result::is_ok),
        "they were answered in the end"
    );
    assert!(
        asked <= REQUESTS + 70,
        "{REQUESTS} requests asked {asked} times"
    );
}

#[tokio::test(start_paused = true)]
async fn those_whose_writes_are_refused_are_not_woken_by_reads() {
    const WRITES: usize = 1000;
    const READS: usize = 100;
    let router = filled(1, 1).await;
    router.access().state().is_full = true;
    let writes = (0..WRITES).map(|_| router.write(vec![put(key(0), "v")], None, options()));
    let reads = async {
        for _ in 0..READS {
            sleep(Duration::from_millis(20)).await;
            router.get(key(0), options()).await.expect("it reads");
        }
        router.access().state().is_full = false;
        calls(&router) - READS
    };
    let (answers, asked) = futures::future::join(futures::future::join_all(writes), reads).await;
    assert!(
        answers.iter().flatten().all(Result::is_ok),
        "they were taken in the end"
    );
    assert!(asked <= WRITES + 70, "{WRITES} writes asked {asked} times");
}

#[tokio::test(start_paused = true)]
async fn who_waits_is_woken_by_a_leader_that_is_heard_of() {
    let (_, waited) = wait_for_leader(1, true).await;
    assert!(
        waited <= Duration::from_millis(1),
        "one waited for {waited:?} more"
    );
    let (_, waited) = wait_for_leader(1000, true).await;
    assert!(
        waited <= Duration::from_millis(20),
        "the last of many waited for {waited:?} more"
    );
}

/// The nodes may differ about who owns it, and would send a client to one another.
#[tokio::test(start_paused = true)]
async fn nobody_is_sent_elsewhere_with_a_key_that_is_on_its_way() {
    let router = filled(1, 2).await;
    {
        let mut state = router.access().state();
        let map = map_of(&state, 9).with_moving([slot_of(&key(0))].into());
        state.map = Some(Arc::new(map));
    }
    router.locate(key(0), redirect()).await.expect("it stays");
    router.get(key(0), redirect()).await.expect("read");
    router.write(vec![put(key(0), "v")], None, redirect()).await;
    router.get(key(1), redirect()).await.expect("read");
    let calls = &router.access().state().calls;
    let routings: Vec<Routing> = calls.iter().map(|(_, options)| options.routing).collect();
    assert_eq!(
        routings,
        [Routing::Proxy, Routing::Proxy, Routing::Redirect]
    );
}
