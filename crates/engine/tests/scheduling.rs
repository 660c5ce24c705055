//! Many turns on one machine: who waits, who shares, who pauses. None of it changes a word of what they say.

#![allow(clippy::unwrap_used)]

mod common;

use common::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_turn_whose_pages_others_need_pauses_and_says_the_same() {
    let roomy = Rig::new(PLAIN);
    // Each of the two needs eight pages, most of them for its answer: they speak at once, however slowly prompts are read.
    let rig = Rig::within(tempfile::tempdir().unwrap(), PLAIN, CONTEXT, 11 * page_bytes());
    let (one, two) = (prose(1, 40), prose(2, 40));
    let ask = greedy(450);
    let (a, _) = roomy.answer("a", &one, &ask).await;
    let (b, _) = roomy.answer("b", &two, &ask).await;
    rig.create("a").await;
    rig.create("b").await;
    let first = rig.begin("a", 0, &one, &ask).await;
    let second = rig.begin("b", 0, &two, &ask).await;
    let ((first, older), (second, younger)) = tokio::join!(rig.finish(first), rig.finish(second));
    assert_eq!((first.tokens, second.tokens), (a.tokens, b.tokens));
    let stats = rig.engine.stats().await.unwrap();
    assert!(stats.pauses > 0 && stats.paused == 0, "{stats:?}");
    assert_eq!(older.paused_ms, 0.0, "the older one has the right of way");
    assert!(younger.paused_ms > 0.0 && younger.recomputed_tokens > 0, "{younger:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_turn_can_be_cancelled_and_keeps_what_it_said() {
    let rig = Rig::within(tempfile::tempdir().unwrap(), PLAIN, CONTEXT, 11 * page_bytes());
    rig.create("a").await;
    rig.create("b").await;
    let first = rig.begin("a", 0, &prose(1, 250), &greedy(400)).await;
    let second = rig.begin("b", 0, &prose(2, 250), &greedy(400)).await;
    while rig.engine.stats().await.unwrap().paused == 0 {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    rig.engine.cancel(&second.id);
    let (second, _) = rig.finish(second).await;
    assert_eq!(second.reason, Some(dormouse_engine::FinishReason::Cancelled));
    assert_eq!(rig.store.token_log("b").await.unwrap()[250..], second.tokens);
    let (first, _) = rig.finish(first).await;
    assert_eq!(first.tokens.len(), 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_can_never_have_room_fails_and_says_why() {
    let rig = Rig::within(tempfile::tempdir().unwrap(), PLAIN, CONTEXT, 4 * page_bytes());
    rig.create("a").await;
    let running = rig.begin("a", 0, &prose(1, 200), &greedy(100)).await;
    let error = rig.failure(running).await;
    assert!(matches!(error, dormouse_engine::EngineError::OutOfSpace(_)), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn prompts_that_come_together_and_begin_alike_are_read_once() {
    let rig = Rig::new(PLAIN);
    let system = prose(1, 640);
    let mut running = Vec::new();
    for name in ["a", "b", "c", "d"] {
        rig.create(name).await;
        let prompt = [system.clone(), prose(name.len() + running.len(), 20)].concat();
        running.push(rig.begin(name, 0, &prompt, &greedy(4)).await);
    }
    let mut restored = Vec::new();
    for turn in running {
        restored.push(rig.finish(turn).await.1.restored_tokens);
    }
    assert_eq!(restored[0], 0);
    assert!(restored[1..].iter().all(|tokens| *tokens >= 640), "{restored:?}");
    let computed = rig.engine.stats().await.unwrap().prompt_tokens_computed;
    assert!(computed < 640 + 4 * 24, "{computed} prompt tokens were computed");
}

#[tokio::test(flavor = "multi_thread")]
async fn turns_go_on_speaking_while_a_long_prompt_is_read() {
    let rig = Rig::new(PLAIN);
    rig.create("talk").await;
    rig.create("long").await;
    let mut talk = rig.begin("talk", 0, &prose(1, 20), &greedy(1500)).await;
    while talk.said() < 40 {
        talk.next().await;
    }
    let said = talk.said();
    // A prompt that takes several steps, and not as many as the other one has words left, however slow the machine is.
    let mut long = rig.begin("long", 0, &prose(2, 600), &greedy(2)).await;
    while long.said() == 0 {
        tokio::select! {
            biased;
            _ = long.next() => {}
            _ = talk.next() => {}
        }
    }
    // In steps of a fifth of a second it would be three or four.
    assert!(talk.said() - said > 25, "{} words", talk.said() - said);
    rig.engine.cancel(&talk.id);
    rig.finish(long).await;
    rig.finish(talk).await;
}

/// Begins a turn of a session "talk" that speaks until it is cancelled, and waits until it does.
async fn talker(rig: &Rig) -> Running {
    rig.create("talk").await;
    let mut talk = rig.begin("talk", 0, &prose(1, 20), &greedy(1500)).await;
    while talk.said() < 40 {
        talk.next().await;
    }
    talk
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_that_is_read_a_few_layers_at_a_time_has_the_same_pages_and_the_same_answer() {
    let alone = Rig::new(PLAIN);
    let prompt = prose(2, 700);
    let (expected, _) = alone.answer("long", &prompt, &greedy(12)).await;
    let rig = Rig::new(PLAIN);
    let talk = talker(&rig).await;
    let before = rig.engine.stats().await.unwrap().prompt_tokens_computed;
    let (answer, _) = rig.answer("long", &prompt, &greedy(12)).await;
    let after = rig.engine.stats().await.unwrap().prompt_tokens_computed;
    assert_eq!(answer, expected);
    // Its last row is counted as one that says something.
    assert_eq!(after - before, 699, "each row once");
    rig.engine.cancel(&talk.id);
    rig.finish(talk).await;
    let pages = rig.pages();
    let (full, open): (Vec<_>, Vec<_>) =
        alone.pages().into_iter().partition(|page| page.1.len() == dormouse_kernels::PAGE_TOKENS);
    assert!(full.len() > 10 && full.iter().all(|page| pages.contains(page)), "the same bytes");
    assert!(!open.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_cancels_a_prompt_between_two_layers_leaves_nothing_behind() {
    let rig = Rig::new(PLAIN);
    let talk = talker(&rig).await;
    rig.create("long").await;
    let prompt = prose(2, 600);
    let mut begun = 0;
    for turn in 0..4 {
        let long = rig.begin("long", begun, &prompt[begun..], &greedy(4)).await;
        tokio::time::sleep(std::time::Duration::from_millis(40 + 23 * turn)).await;
        rig.engine.cancel(&long.id);
        rig.finish(long).await;
        begun = 64 * turn as usize;
    }
    let long = rig.begin("long", 0, &prompt, &greedy(4)).await;
    let (answer, _) = rig.finish(long).await;
    rig.engine.cancel(&talk.id);
    rig.finish(talk).await;
    let (expected, _) = Rig::new(PLAIN).answer("long", &prompt, &greedy(4)).await;
    assert_eq!(answer.tokens, expected.tokens);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_short_prompt_does_not_wait_for_a_long_one() {
    let rig = Rig::new(PLAIN);
    let talk = talker(&rig).await;
    rig.create("long").await;
    rig.create("short").await;
    let mut long = rig.begin("long", 0, &prose(2, 1500), &greedy(4)).await;
    // It has started.
    long.next().await;
    let mut short = rig.begin("short", 0, &prose(3, 30), &greedy(4)).await;
    while short.said() == 0 {
        short.next().await;
    }
    assert_eq!(long.said(), 0, "the long one is still being read");
    rig.engine.cancel(&talk.id);
    for turn in [talk, long, short] {
        rig.finish(turn).await;
    }
}
