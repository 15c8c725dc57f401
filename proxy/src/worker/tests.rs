//! A worker against an agent's end of the control socket.

use std::task::Poll;

use futures::poll;

use super::*;
use crate::events::EVENT_QUEUE;
use crate::handoff::{Family, MAX_APP_SOCKETS};
use crate::sockets::Sockets as _;

/// An agent's end, and the worker's.
fn ends() -> (ControlSocket, ControlSocket) {
    let (agent, other_end) = ControlSocket::pair().expect("socketpair");
    (agent, ControlSocket::new(other_end).expect("control socket"))
}

/// What connections of the proxy "web" ask for sockets.
fn sockets_of_web(worker: &Worker) -> pool::HandedSockets {
    let (link, pool) = (Arc::clone(&worker.link), Arc::new(pool::Pool::default()));
    link.pools.lock().insert("web".to_owned(), Arc::clone(&pool));
    pool::HandedSockets { proxy: "web".to_owned(), link, pool }
}

async fn hear(agent: &ControlSocket) -> ToAgent {
    agent.recv::<ToAgent>().await.expect("understood").expect("the worker is there").0
}

/// The worker attends to the agent for as long as the test plays it, and gives back what the test found.
async fn while_attended<T>(worker: &mut Worker, control: &ControlSocket, plays: impl Future<Output = T>) -> T {
    tokio::select! {
        end = worker.attend(control, vec![(hello(), None)]) => panic!("{end:?}"),
        found = plays => found,
    }
}

/// `message` without the descriptors that it speaks of.
async fn send_without_descriptors(agent: &ControlSocket, message: &ToWorker) {
    agent.send_raw(&serde_json::to_vec(message).expect("serialise")).await;
}

fn app_sockets(family: Family) -> ToWorker {
    ToWorker::AppSockets { proxy: "web".to_owned(), family, count: 1, error: None }
}

#[test]
fn a_worker_without_an_agent_lives_as_long_as_its_last_certificate() {
    let now = 1_800_000_000;
    assert_eq!(orphan_life(Some(now + 72 * 3600), now), Duration::from_secs(72 * 3600));
    for nobody_could_connect in [None, Some(now), Some(now - 5), Some(now + 5)] {
        assert_eq!(orphan_life(nobody_could_connect, now), ORPHAN_LIFE);
    }
    assert_eq!(orphan_life(Some(u64::MAX), now), MAX_ORPHAN_LIFE);
}

#[tokio::test]
async fn an_agent_hears_nothing_that_was_meant_for_the_one_before() {
    let threads = DataThreads::new(1).expect("thread");
    let mut worker = Worker::new(threads.placement());
    let stale = ToAgent::MoreAppSockets { proxy: "web".to_owned(), family: Family::V4, count: 1 };
    worker.link.tell(stale).await;
    let (agent, control) = ends();
    let hears = async {
        agent.send(&ToWorker::Ping, &[]).await.expect("the worker listens");
        assert!(matches!(hear(&agent).await, ToAgent::Hello { .. }));
        let next = hear(&agent).await;
        assert!(matches!(next, ToAgent::Pong), "{next:?}");
    };
    while_attended(&mut worker, &control, hears).await;
}

#[tokio::test]
async fn sockets_that_got_lost_are_asked_for_again() {
    let threads = DataThreads::new(1).expect("thread");
    let mut worker = Worker::new(threads.placement());
    let sockets = sockets_of_web(&worker);
    let (agent, control) = ends();
    let takes = async {
        assert!(matches!(hear(&agent).await, ToAgent::Hello { .. }));
        for cut in [serde_json::to_vec(&app_sockets(Family::V4)).expect("serialise"), vec![b' '; MAX_MESSAGE + 1]] {
            let answered = async {
                let asked = hear(&agent).await;
                assert!(matches!(asked, ToAgent::MoreAppSockets { count: MAX_APP_SOCKETS, .. }), "{asked:?}");
                agent.send_raw(&cut).await;
            };
            let taken = timeout(Duration::from_secs(5), sockets.app_socket(Family::V4));
            let (taken, ()) = futures::join!(taken, answered);
            taken.expect("who waits is told").expect_err("nothing came");
            agent.send(&ToWorker::Ping, &[]).await.expect("the worker listens");
            let next = hear(&agent).await;
            assert!(matches!(next, ToAgent::Pong), "nobody wants one now: {next:?}");
        }
    };
    while_attended(&mut worker, &control, takes).await;
}

#[tokio::test]
async fn a_lost_descriptor_is_missed_by_who_asked_for_it_and_nonsense_by_nobody() {
    let threads = DataThreads::new(1).expect("thread");
    let mut worker = Worker::new(threads.placement());
    let sockets = sockets_of_web(&worker);
    let (agent, control) = ends();
    let takes = async {
        assert!(matches!(hear(&agent).await, ToAgent::Hello { .. }));
        let v6 = async { sockets.app_socket(Family::V6).await.expect("nothing of its family was lost") };
        let refused = async {
            let (v4, listener) =
                futures::join!(sockets.app_socket(Family::V4), sockets.listen("[::1]:80".parse().expect("address")));
            for refusal in [v4.map(drop), listener.map(drop)] {
                let refusal = refusal.expect_err("lost").to_string();
                assert!(refusal.contains("1 descriptors, 0 came"), "{refusal}");
            }
            let socket = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None).expect("socket");
            agent.send(&app_sockets(Family::V6), &[socket.as_fd()]).await.expect("the worker listens");
        };
        let answered = async {
            let mut number = None;
            for _ in 0..3 {
                match hear(&agent).await {
                    ToAgent::OpenListener { request, .. } => number = Some(request),
                    other => assert!(matches!(other, ToAgent::MoreAppSockets { .. }), "{other:?}"),
                }
            }
            agent.send_raw(b"{]").await;
            send_without_descriptors(&agent, &app_sockets(Family::V4)).await;
            let request = number.expect("asked for a listener");
            send_without_descriptors(&agent, &ToWorker::Listener { request, result: Ok(()) }).await;
        };
        futures::join!(v6, refused, answered);
    };
    while_attended(&mut worker, &control, takes).await;
}

#[tokio::test]
async fn events_that_come_together_are_sent_together_and_none_is_lost() {
    const EVENTS: u64 = 1000;
    let threads = DataThreads::new(1).expect("thread");
    let mut worker = Worker::new(threads.placement());
    let events = worker.proxies.events().clone();
    let (agent, other_end) = ControlSocket::pair().expect("socketpair");
    let control = ControlSocket::new(other_end).expect("control socket");
    let hears = async {
        let (mut messages, mut next) = (0, 0);
        while next < EVENTS {
            let heard = agent.recv::<ToAgent>().await;
            let Ok(Some((ToAgent::Events(records), _))) = heard else { continue };
            messages += 1;
            for record in records {
                assert_eq!(record.bytes_to_source, next, "in order");
                next += 1;
            }
        }
        messages
    };
    for number in 0..EVENTS {
        events.emit(crate::testing::event(number));
    }
    let messages = while_attended(&mut worker, &control, hears).await;
    assert!((2..EVENTS / 5).contains(&messages), "more than a message holds, in {messages} messages");
}

#[tokio::test(start_paused = true)]
async fn one_event_is_told_at_once_and_those_within_the_rest_together() {
    let threads = DataThreads::new(1).expect("thread");
    let mut worker = Worker::new(threads.placement());
    let events = worker.proxies.events().clone();
    let (agent, control) = ends();
    let numbers = async || match hear(&agent).await {
        ToAgent::Events(records) => records.iter().map(|record| record.bytes_to_source).collect::<Vec<_>>(),
        other => panic!("{other:?}"),
    };
    let hears = async {
        assert!(matches!(hear(&agent).await, ToAgent::Hello { .. }));
        events.emit(crate::testing::event(0));
        assert_eq!(numbers().await, [0]);
        let rest = numbers();
        let mut rest = std::pin::pin!(rest);
        for number in 1..=2 {
            events.emit(crate::testing::event(number));
            for _ in 0..100 {
                assert!(matches!(poll!(&mut rest), Poll::Pending), "told within the rest");
                tokio::task::yield_now().await;
            }
        }
        tokio::time::advance(EVENT_REST).await;
        assert_eq!(rest.await, [1, 2]);
    };
    // Time stands still as long as somebody has something to do.
    let busy = async {
        loop {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        end = worker.attend(&control, vec![(hello(), None)]) => panic!("{end:?}"),
        () = busy => {}
        () = hears => {}
    }
}

#[tokio::test]
async fn events_that_an_agent_did_not_get_are_told_to_the_next() {
    const LOST: u64 = 5;
    let waiting = u64::try_from(EVENT_QUEUE).expect("a number");
    let threads = DataThreads::new(1).expect("thread");
    let mut worker = Worker::new(threads.placement());
    let events = worker.proxies.events().clone();
    for number in 0..waiting + LOST {
        events.emit(crate::testing::event(number));
    }
    let (mut next, mut lost) = (0, 0);
    let mut count = |message| match message {
        ToAgent::Events(records) => {
            for record in records {
                assert_eq!(record.bytes_to_source, next, "in order, each once");
                next += 1;
            }
            next
        }
        ToAgent::EventsLost { count } => {
            lost += count;
            next
        }
        other => panic!("{other:?}"),
    };
    // One is gone before it is told how many were lost.
    let (agent, control) = ends();
    drop(agent);
    worker.outbox.send_all(&control, vec![], CancellationToken::new()).await.expect_err("gone");
    // One ends with a message on its way: there are more than the socket holds.
    let (agent, control) = ends();
    let hears = async { while count(hear(&agent).await) == 0 {} };
    tokio::select! {
        end = worker.attend(&control, vec![]) => panic!("{end:?}"),
        () = hears => {}
    }
    drop(control);
    while let Some((message, _)) = agent.recv::<ToAgent>().await.expect("understood") {
        assert!(count(message) < waiting, "the socket holds all of them");
    }
    let (agent, control) = ends();
    let hears = async { while count(hear(&agent).await) < waiting {} };
    tokio::select! {
        end = worker.attend(&control, vec![]) => panic!("{end:?}"),
        () = hears => {}
    }
    assert_eq!(lost, LOST);
}

#[tokio::test(start_paused = true)]
async fn it_calls_for_just_as_long() {
    let (start, life) = (Instant::now(), Duration::from_secs(3600));
    let owner = rustix::process::geteuid().as_raw();
    assert!(find_agent("culvert/test/nobody", owner, life).await.is_none());
    assert!((life..life + LATE_CALL_PAUSE).contains(&start.elapsed()));
}
