//! Pages that come from disk: who waits for them, and who does not.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::*;
use dormouse_engine::{EngineOptions, Faults, FinishReason, Tier};
use dormouse_kv::Realm;

/// An engine whose disk takes so long for a page.
fn rig(page_in_delay: Duration) -> Rig {
    let faults = Faults { page_in_delay, ..Faults::default() };
    let options = EngineOptions { faults, ..PLAIN.into() };
    Rig::within(tempfile::tempdir().unwrap(), options, CONTEXT, 1 << 30)
}

/// A session whose pages are on disk and nowhere else, and its tokens. None where temporary files are kept in RAM.
async fn parked(rig: &Rig, session: &str, seed: usize, length: usize) -> Option<Vec<u32>> {
    rig.answer(session, &prose(seed, length), &greedy(1)).await;
    let log = rig.store.token_log(session).await.unwrap();
    let released = rig.engine.park(Realm::default(), log.clone()).await.unwrap();
    (released > length as u64 / 64 * page_bytes() / 2).then_some(log)
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_else_waits_for_pages_that_come_from_disk() {
    let rig = rig(Duration::from_millis(100));
    let Some(log) = parked(&rig, "cold", 1, 1200).await else { return };
    rig.create("talk").await;
    let mut talk = rig.begin("talk", 0, &prose(2, 20), &greedy(1500)).await;
    while talk.said() < 20 {
        talk.next().await;
    }
    let said = talk.said();
    let mut cold = rig.begin("cold", log.len(), &prose(3, 5), &greedy(2)).await;
    while cold.said() == 0 {
        tokio::select! {
            biased;
            _ = cold.next() => {}
            _ = talk.next() => {}
        }
    }
    // If the engine's thread read the pages, it would be one word.
    assert!(talk.said() - said > 5, "{} words", talk.said() - said);
    rig.engine.cancel(&talk.id);
    rig.finish(talk).await;
    let (_, receipt) = rig.finish(cold).await;
    assert_eq!((receipt.restored_tokens, receipt.recomputed_tokens), (1200, 0));
    assert_eq!(receipt.tier, Tier::Disk);
    assert!(receipt.bytes_read > 9 * page_bytes() && receipt.restore_ms > 100.0, "{receipt:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_turn_that_waits_for_the_disk_can_be_cancelled() {
    let rig = rig(Duration::from_millis(300));
    let Some(log) = parked(&rig, "cold", 1, 1200).await else { return };
    let cold = rig.begin("cold", log.len(), &prose(3, 5), &greedy(2)).await;
    rig.engine.cancel(&cold.id);
    let (answer, _) = rig.finish(cold).await;
    assert_eq!((answer.reason, answer.tokens.len()), (Some(FinishReason::Cancelled), 0));
    let again = rig.begin("cold", log.len(), &[], &greedy(2)).await;
    assert_eq!(rig.finish(again).await.0.tokens.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_two_turns_lack_is_read_and_computed_once() {
    let rig = rig(Duration::from_millis(20));
    let Some(log) = parked(&rig, "first", 1, 1200).await else { return };
    let more = [log, prose(2, 300)].concat();
    let before = rig.engine.stats().await.unwrap().prompt_tokens_computed;
    let mut running = Vec::new();
    for name in ["left", "right"] {
        rig.create(name).await;
        running.push(rig.begin(name, 0, &more, &greedy(2)).await);
    }
    for turn in running {
        assert!(rig.finish(turn).await.1.restored_tokens >= 1200);
    }
    let computed = rig.engine.stats().await.unwrap().prompt_tokens_computed - before;
    assert!(computed < 400, "{computed} prompt tokens were computed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_turn_whose_page_became_another_sessions_while_it_waited_claims_what_is_left_of_its_own() {
    let faults = Faults { page_in_delay: Duration::from_secs(3), ..Faults::default() };
    let options = EngineOptions { faults, ..PLAIN.into() };
    let rig = Rig::within(tempfile::tempdir().unwrap(), options, CONTEXT, 7 * page_bytes());
    let Some(log) = parked(&rig, "cold", 1, 180).await else { return };
    let cold = rig.begin("cold", log.len(), &prose(3, 5), &greedy(2)).await;
    // Six pages: all four that are free, and the last two of those that are being read.
    rig.answer("other", &prose(2, 350), &greedy(2)).await;
    let stats = rig.engine.stats().await.unwrap();
    assert_eq!((stats.paging_in, stats.kv.evictions), (1, 2), "{stats:?}");
    let (_, receipt) = rig.finish(cold).await;
    assert_eq!(receipt.restored_tokens, 64);
    // No claim of either is left behind, or was another's.
    for session in ["cold", "other"] {
        let leaf = rig.store.session(session).await.unwrap().leaf_slot;
        rig.engine.unclaim(leaf, true).await;
    }
    let kv = rig.engine.stats().await.unwrap().kv;
    assert_eq!((kv.slots_claimed, kv.slots_used), (0, 0), "{kv:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_stops_while_pages_are_read() {
    let rig = rig(Duration::from_millis(300));
    let Some(log) = parked(&rig, "cold", 1, 1200).await else { return };
    let cold = rig.begin("cold", log.len(), &prose(3, 5), &greedy(2)).await;
    rig.engine.shutdown().await;
    let error = rig.failure(cold).await;
    assert!(matches!(error, dormouse_engine::EngineError::Stopped), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_a_slow_disk_a_turn_computes_its_beginning_while_its_end_is_read() {
    let rig = rig(Duration::from_millis(400));
    let (Some(first), Some(second)) =
        (parked(&rig, "first", 1, 200).await, parked(&rig, "second", 2, 1200).await)
    else {
        return;
    };
    // What the disk is like is not known before it was read from.
    let turn = rig.begin("first", first.len(), &prose(4, 5), &greedy(4)).await;
    let (_, receipt) = rig.finish(turn).await;
    assert_eq!((receipt.restored_tokens, receipt.recomputed_tokens), (200, 0));

    let turn = rig.begin("second", second.len(), &prose(5, 5), &greedy(4)).await;
    let (answer, receipt) = rig.finish(turn).await;
    assert!(receipt.recomputed_tokens >= 64, "nothing was computed: {receipt:?}");
    assert!(receipt.restored_tokens >= 64, "nothing was read: {receipt:?}");
    assert_eq!(receipt.restored_tokens + receipt.recomputed_tokens, 1200);
    assert_eq!((receipt.tier, &receipt.miss), (Tier::Disk, &None));
    let (stats, pages) = (rig.engine.stats().await.unwrap(), receipt.restored_tokens as u64 / 64);
    assert_eq!(stats.recomputed_tokens, receipt.recomputed_tokens as u64);
    // What was computed was not read, but for pages that were on their way when the two met.
    assert!(receipt.bytes_read <= (pages + 4) * page_bytes(), "{receipt:?}");
    assert!(receipt.bytes_read >= pages / 2 * page_bytes(), "{receipt:?}");

    let other = Rig::new(PLAIN);
    other.answer("second", &prose(2, 1200), &greedy(1)).await;
    let turn = other.begin("second", second.len(), &prose(5, 5), &greedy(4)).await;
    let (expected, _) = other.finish(turn).await;
    assert_eq!(answer, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_else_waits_for_the_pages_of_a_turn_that_was_paused() {
    let page_in_delay = Duration::from_millis(600);
    let faults = Faults { page_in_delay, ..Faults::default() };
    let options = EngineOptions { faults, ..PLAIN.into() };
    // Room for all but the end of the first one's answer.
    let rig = Rig::within(tempfile::tempdir().unwrap(), options, CONTEXT, 26 * page_bytes());
    // Prompts that are read already: however slow the machine is, all begin to speak at once.
    for (name, seed, length) in [("first", 1, 600), ("talk", 2, 20), ("paused", 3, 500)] {
        rig.answer(name, &prose(seed, length), &greedy(1)).await;
    }
    let mut running = Vec::new();
    for name in ["first", "talk", "paused"] {
        let log = rig.store.token_log(name).await.unwrap();
        running.push(rig.begin(name, log.len(), &[], &greedy(900)).await);
    }
    let [first, mut talk, paused] = <[Running; 3]>::try_from(running).ok().unwrap();
    while rig.engine.stats().await.unwrap().paused == 0 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let log = rig.store.token_log("paused").await.unwrap();
    if rig.engine.park(Realm::default(), log).await.unwrap() < 4 * page_bytes() {
        // Temporary files are kept in RAM.
        return;
    }
    // What was said before is heard first; then what is said while the first one ends, a few words, and while pages are read.
    while tokio::time::timeout(Duration::ZERO, talk.next()).await.is_ok() {}
    let said = talk.said();
    rig.engine.cancel(&first.id);
    while rig.engine.stats().await.unwrap().paused > 0 {
        // Whether it says something or not.
        tokio::time::timeout(Duration::from_millis(5), talk.next()).await.ok();
    }
    assert!(talk.said() - said > 12, "{} words", talk.said() - said);
    rig.finish(first).await;
    for id in [&talk.id, &paused.id] {
        rig.engine.cancel(id);
    }
    rig.finish(talk).await;
    let (_, receipt) = rig.finish(paused).await;
    assert!(receipt.paused_ms > page_in_delay.as_secs_f64() * 1e3, "{receipt:?}");
    let stats = rig.engine.stats().await.unwrap();
    assert!(stats.restored_bytes_read >= 4 * page_bytes(), "{stats:?}\n{receipt:?}");
}
