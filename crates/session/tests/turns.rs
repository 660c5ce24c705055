//! Turns over a real model: numbering, resumption, interruption.

#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use dormouse_engine::FinishReason;
use dormouse_session::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_turn_streams_numbered_events_and_the_next_one_restores_its_tokens() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = open(directory.path());
    let session = create(&runtime).await;
    let stream = runtime.start_turn(&tenant(), &session.id, request("Say hello.", 12)).await.unwrap();
    let busy = runtime.start_turn(&tenant(), &session.id, request("Again.", 5)).await.map(|_| ());
    assert!(matches!(busy, Err(SessionError::Busy { .. })), "{busy:?}");
    let (events, turn) = collect(stream).await;
    let numbers: Vec<u64> = events.iter().map(|event| event.sequence_number).collect();
    assert_eq!(numbers[..2], [0, 1]);
    assert!(numbers.windows(2).all(|pair| pair[0] < pair[1]), "{numbers:?}");
    assert_eq!(numbers.last(), Some(&(2 + turn.usage.completion_tokens as u64)));
    let said: String = events
        .iter()
        .filter_map(|event| match &event.body {
            TurnEventBody::Delta { delta, .. } => Some(delta.as_str()),
            _ => None,
        })
        .collect();
    assert!(turn.output_text.starts_with(&said) && !said.is_empty());
    assert_eq!(turn.status, TurnStatus::Completed);

    let attached = runtime.attach(&tenant(), &session.id, &turn.id, None).await.unwrap();
    assert_eq!(shown(&collect(attached).await.0), shown(&events));
    let attached = runtime.attach(&tenant(), &session.id, &turn.id, Some(numbers[3])).await.unwrap();
    assert_eq!(shown(&collect(attached).await.0), shown(&events)[4..]);

    let known = runtime.get(&tenant(), &session.id).await.unwrap();
    assert_eq!((known.status, known.tokens), (SessionStatus::Idle, turn.usage.total_tokens));
    let second = say(&runtime, &session.id, "And goodbye.", 6).await;
    let receipt = second.dormouse.unwrap();
    // The last sampled token was never an input, so its KV is computed with the new ones.
    assert!(receipt.restored_tokens + 1 >= known.tokens, "{receipt:?} of {}", known.tokens);
    assert_eq!((receipt.recomputed_tokens, receipt.miss), (0, None));
    let items = runtime.items(&tenant(), &session.id).await.unwrap();
    assert_eq!(items.len(), 4);
    assert!(items.windows(2).all(|pair| pair[0].token_end <= pair[1].token_start + 1), "{items:?}");
    let kinds: Vec<String> = runtime
        .events(&tenant(), &session.id, Some(0), 100)
        .await
        .unwrap()
        .into_iter()
        .map(|it| it.kind)
        .collect();
    let turn_kinds = ["session.turn.created", "session.turn.completed"];
    assert_eq!(kinds, [turn_kinds, turn_kinds].concat());
    runtime.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_turn_goes_on_and_says_the_same_as_an_uninterrupted_one() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = open(directory.path());
    let session = create(&runtime).await;
    let mut turn_request = request("Tell me about the sea.", 48);
    turn_request.generation.sampling.temperature = 0.9;
    let mut stream = runtime.start_turn(&tenant(), &session.id, turn_request).await.unwrap();
    let turn = stream.turn.clone();
    let mut whole = Vec::new();
    let mut copies = Vec::new();
    while let Some(event) = stream.events.recv().await {
        if [0, 9, 25, 40].contains(&event.sequence_number) {
            copies.push(snapshot(directory.path()));
        }
        whole.push(event);
    }
    assert!(copies.len() >= 3);
    for killed in copies {
        let runtime = open(killed.path());
        assert_eq!(runtime.recover().await.unwrap(), 1);
        let attached = runtime.attach(&tenant(), &session.id, &turn, None).await.unwrap();
        let (events, finished) = collect(attached).await;
        assert_eq!(shown(&events), shown(&whole));
        assert_eq!(finished.status, TurnStatus::Completed);
        assert!(say(&runtime, &session.id, "Go on.", 3).await.usage.completion_tokens > 0);
        runtime.shutdown().await;
    }
    runtime.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_leaves_the_turn_to_the_next_start() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = open(directory.path());
    let session = create(&runtime).await;
    let mut stream =
        runtime.start_turn(&tenant(), &session.id, request("Count to fifty.", 60)).await.unwrap();
    while stream.events.recv().await.unwrap().sequence_number < 5 {}
    runtime.shutdown().await;
    let mut last = None;
    while let Some(event) = stream.events.recv().await {
        last = Some(event);
    }
    assert!(last.is_none_or(|event| !event.body.is_last()));
    let refused = runtime.start_turn(&tenant(), &session.id, request("x", 1)).await.map(|_| ());
    assert!(matches!(refused, Err(SessionError::Stopping)), "{refused:?}");
    drop(runtime);
    let runtime = open(directory.path());
    let found = runtime.turn(&tenant(), &session.id, &stream.turn).await.unwrap();
    assert_eq!(found.status, TurnStatus::InProgress);
    assert_eq!(runtime.recover().await.unwrap(), 1);
    let attached = runtime.attach(&tenant(), &session.id, &stream.turn, None).await.unwrap();
    let (_, turn) = collect(attached).await;
    assert_eq!((turn.status, turn.usage.completion_tokens > 4), (TurnStatus::Completed, true));
    runtime.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_turn_keeps_what_was_generated() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = open(directory.path());
    let session = create(&runtime).await;
    let mut long = request("Write a long story.", 400);
    long.generation.ignore_eos = true;
    let mut stream = runtime.start_turn(&tenant(), &session.id, long).await.unwrap();
    while stream.events.recv().await.unwrap().sequence_number < 6 {}
    let turn = runtime.cancel(&tenant(), &session.id, &stream.turn).await.unwrap();
    assert_eq!((turn.status, turn.finish_reason), (TurnStatus::Cancelled, Some(FinishReason::Cancelled)));
    assert!(!turn.output_text.is_empty());
    let items = runtime.items(&tenant(), &session.id).await.unwrap();
    assert_eq!(items[1].message["content"], turn.output_text.as_str());
    assert_eq!(say(&runtime, &session.id, "Stop.", 4).await.status, TurnStatus::Completed);
    runtime.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_beyond_the_context_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = open_as(directory.path(), [1; 32], Some(64));
    let session = create(&runtime).await;
    let refused =
        runtime.start_turn(&tenant(), &session.id, request(&"word ".repeat(100), 5)).await.map(|_| ());
    assert!(
        matches!(refused, Err(SessionError::ContextLengthExceeded { context: 64, tokens }) if tokens > 100),
        "{refused:?}"
    );
    let known = runtime.get(&tenant(), &session.id).await.unwrap();
    assert_eq!((known.tokens, known.turns, known.status), (0, 0, SessionStatus::Idle));
    // Up to the context's end there is room.
    let turn = say(&runtime, &session.id, "Hi.", 1000).await;
    assert!(turn.usage.total_tokens <= 64);
    runtime.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replaced_weights_cost_a_computation_and_no_content() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = open(directory.path());
    let session = create(&runtime).await;
    say(&runtime, &session.id, "Say hello.", 8).await;
    let before = runtime.get(&tenant(), &session.id).await.unwrap();
    runtime.shutdown().await;
    drop(runtime);
    let runtime = open_as(directory.path(), [2; 32], None);
    let turn = say(&runtime, &session.id, "And goodbye.", 4).await;
    let receipt = turn.dormouse.unwrap();
    assert_eq!(receipt.restored_tokens, 0);
    assert_eq!(receipt.miss.unwrap().reason, "model_changed");
    assert!(turn.usage.prompt_tokens > before.tokens);
    runtime.shutdown().await;
}
