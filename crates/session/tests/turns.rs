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
    assert_eq!(numbers.last(), Some(&(3 + turn.usage.completion_tokens as u64)));
    let said: String = events
        .iter()
        .filter_map(|event| match &event.body {
            TurnEventBody::Delta { delta, .. } => Some(delta.as_str()),
            _ => None,
        })
        .collect();
    assert!(turn.output_text == said && !said.is_empty());
    assert_eq!(turn.status, TurnStatus::Completed);

    let attached = runtime.attach(&tenant(), &session.id, &turn.id, None).await.unwrap();
    assert_eq!(shown(&collect(attached).await.0), shown(&events));
    let attached = runtime.attach(&tenant(), &session.id, &turn.id, Some(numbers[3])).await.unwrap();
    assert_eq!(shown(&collect(attached).await.0), shown(&events)[4..]);
    let last = numbers.last().copied();
    let mut attached = runtime.attach(&tenant(), &session.id, &turn.id, last).await.unwrap();
    assert!(attached.events.recv().await.is_none(), "nothing is missing after the last event");

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
    let mut turn_request = request("Tell me about the sea.", 160);
    turn_request.generation.sampling.temperature = 0.9;
    turn_request.generation.ignore_eos = true;
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
    // The engine does not wait for who takes copies: the last ones may hold the finished turn.
    let mut unfinished = 0;
    for killed in copies {
        let runtime = open(killed.path());
        unfinished += runtime.recover().await.unwrap();
        let attached = runtime.attach(&tenant(), &session.id, &turn, None).await.unwrap();
        let (events, finished) = collect(attached).await;
        assert_eq!(shown(&events), shown(&whole));
        assert_eq!(finished.status, TurnStatus::Completed);
        assert!(say(&runtime, &session.id, "Go on.", 3).await.usage.completion_tokens > 0);
        runtime.shutdown().await;
    }
    assert!(unfinished >= 1, "no copy was taken in the middle of the turn");
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
        matches!(refused, Err(SessionError::ContextLengthExceeded { context: 64, tokens, or_more: false }) if tokens > 100),
        "{refused:?}"
    );
    // Far too much is refused before it is tokenised.
    let huge = runtime.start_turn(&tenant(), &session.id, request(&"a".repeat(1 << 20), 5)).await.map(|_| ());
    assert!(matches!(huge, Err(SessionError::ContextLengthExceeded { or_more: true, .. })), "{huge:?}");
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

fn deltas(events: &[TurnEvent]) -> String {
    let delta = |event: &TurnEvent| match &event.body {
        TurnEventBody::Delta { delta, .. } => Some(delta.clone()),
        _ => None,
    };
    events.iter().filter_map(delta).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn text_that_was_held_back_is_an_event_of_its_own() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = open(directory.path());
    let free = create(&runtime).await;
    let text = say(&runtime, &free.id, "Tell me about the sea.", 9).await.output_text;
    let session = create(&runtime).await;
    let mut held = request("Tell me about the sea.", 9);
    // All of it may be the beginning of this, to the last token.
    held.generation.stop = vec![format!("{text} and no more")];
    let stream = runtime.start_turn(&tenant(), &session.id, held).await.unwrap();
    let (events, turn) = collect(stream).await;
    assert_eq!((turn.output_text.as_str(), deltas(&events)), (text.as_str(), text.clone()));
    let numbers: Vec<u64> = events.iter().map(|event| event.sequence_number).collect();
    let tokens = turn.usage.completion_tokens as u64;
    assert_eq!(numbers, [0, 1, 2 + tokens, 3 + tokens]);
    let again = runtime.attach(&tenant(), &session.id, &turn.id, None).await.unwrap();
    assert_eq!(shown(&collect(again).await.0), shown(&events));
    runtime.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_stop_string_the_model_sees_what_the_client_saw() {
    let (first, second) = ("Tell me about the sea.", "Say more about it.");
    let directory = tempfile::tempdir().unwrap();
    let runtime = open(directory.path());
    let free = create(&runtime).await;
    let text = say(&runtime, &free.id, first, 12).await.output_text;
    let middle = text.char_indices().nth(text.chars().count() / 2).unwrap().0;
    let stop: String = text[middle..].chars().take(3).collect();
    let session = create(&runtime).await;
    let mut stopped = request(first, 12);
    stopped.generation.stop = vec![stop];
    let stream = runtime.start_turn(&tenant(), &session.id, stopped).await.unwrap();
    let (events, turn) = collect(stream).await;
    assert!(turn.output_text.len() < text.len() && deltas(&events) == turn.output_text);
    let next = say(&runtime, &session.id, second, 8).await;
    // Its events stay what they were, though the log has other tokens now.
    let again = runtime.attach(&tenant(), &session.id, &turn.id, None).await.unwrap();
    assert_eq!(shown(&collect(again).await.0), shown(&events));
    let (fork, _) = runtime.fork(&tenant(), &session.id, None, None).await.unwrap();
    assert_eq!((fork.turns, runtime.items(&tenant(), &fork.id).await.unwrap().len()), (2, 4));

    // A client that sends the whole history to a server that has never seen it gets the same.
    let elsewhere = tempfile::tempdir().unwrap();
    let other = open(elsewhere.path());
    let answer = message("assistant", &turn.output_text);
    let history = vec![message("user", first), answer, message("user", second)];
    let sent = other.chat(&tenant(), chat(history, 8)).await.unwrap().remove(0);
    let sent = collect(sent).await.1;
    assert_eq!((sent.output_text, sent.usage.prompt_tokens), (next.output_text, next.usage.prompt_tokens));
    other.shutdown().await;
    runtime.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_turn_of_a_model_that_is_gone_can_be_cancelled() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = open(directory.path());
    let session = create(&runtime).await;
    let mut stream =
        runtime.start_turn(&tenant(), &session.id, request("Count to fifty.", 60)).await.unwrap();
    while stream.events.recv().await.unwrap().sequence_number < 5 {}
    runtime.shutdown().await;
    drop(runtime);
    let runtime = open_named(directory.path(), "another", [1; 32], None);
    assert_eq!(runtime.recover().await.unwrap(), 0);
    let busy = runtime.rewind(&tenant(), &session.id, Place::Token(0)).await.map(|_| ());
    assert!(matches!(busy, Err(SessionError::Busy { .. })), "{busy:?}");
    let turn = runtime.cancel(&tenant(), &session.id, &stream.turn).await.unwrap();
    assert_eq!((turn.status, turn.finish_reason), (TurnStatus::Cancelled, Some(FinishReason::Cancelled)));
    let attached = runtime.attach(&tenant(), &session.id, &turn.id, None).await.unwrap();
    assert_eq!(collect(attached).await.1.status, TurnStatus::Cancelled);
    runtime.delete(&tenant(), &session.id).await.unwrap();
    runtime.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_turn_that_nobody_took_up_is_cancelled_with_what_it_said() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = open(directory.path());
    let session = create(&runtime).await;
    let mut long = request("Count to a thousand.", 400);
    long.generation.ignore_eos = true;
    let mut stream = runtime.start_turn(&tenant(), &session.id, long).await.unwrap();
    while stream.events.recv().await.unwrap().sequence_number < 5 {}
    runtime.shutdown().await;
    drop(runtime);
    let runtime = open(directory.path());
    let turn = runtime.cancel(&tenant(), &session.id, &stream.turn).await.unwrap();
    assert_eq!(turn.status, TurnStatus::Cancelled);
    assert!(!turn.output_text.is_empty());
    assert_eq!(say(&runtime, &session.id, "Stop.", 3).await.status, TurnStatus::Completed);
    runtime.shutdown().await;
}
