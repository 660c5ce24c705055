//! Forks, rewinds, and chat clients that send their whole history.

#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use dormouse_session::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_says_what_its_source_would_have_said_and_computes_nothing_for_it() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = open(directory.path());
    let session = create(&runtime).await;
    let first = say(&runtime, &session.id, "Name three fruits, and say why you like each of them.", 60).await;
    let (fork, receipt) = runtime.fork(&tenant(), &session.id, None, Some("branch".into())).await.unwrap();
    assert_eq!((receipt.recomputed_tokens, fork.tokens), (0, first.usage.total_tokens));
    assert!(receipt.restored_tokens > 0);
    let taken = runtime.fork(&tenant(), &session.id, None, Some("branch".into())).await.map(|_| ());
    assert!(matches!(taken, Err(SessionError::NameTaken(_))), "{taken:?}");
    let one = say(&runtime, &session.id, "And three more.", 10).await;
    let other = say(&runtime, "branch", "And three more.", 10).await;
    assert_eq!(one.output_text, other.output_text);
    assert_eq!(other.dormouse.unwrap().recomputed_tokens, 0);

    // Rewound to its first turn, the session says the same once more.
    let rewound = runtime.rewind(&tenant(), &session.id, Place::Turn(first.id.clone())).await.unwrap();
    assert_eq!((rewound.tokens, rewound.turns), (first.usage.total_tokens, 1));
    let again = say(&runtime, &session.id, "And three more.", 10).await;
    assert_eq!(again.output_text, one.output_text);
    let events = runtime.events(&tenant(), &session.id, None, 100).await.unwrap();
    assert_eq!(events.iter().filter(|event| event.kind == "session.rewound").count(), 1);

    // In the middle of an answer: what was said before the place stays.
    let items = runtime.items(&tenant(), &session.id).await.unwrap();
    let place = Place::Token(items[1].token_start + 5);
    let (cut, _) = runtime.fork(&tenant(), &session.id, Some(place), None).await.unwrap();
    let kept = runtime.items(&tenant(), &cut.id).await.unwrap();
    let (kept, whole) = (kept[1].message["content"].as_str().unwrap(), &first.output_text);
    assert!(whole.starts_with(kept) && !kept.is_empty() && kept.len() < whole.len(), "{kept:?} of {whole:?}");
    assert!(say(&runtime, &cut.id, "Go on.", 3).await.usage.completion_tokens > 0);
    // In the middle of a question.
    let (cut, _) =
        runtime.fork(&tenant(), &session.id, Some(Place::Token(items[0].token_end - 4)), None).await.unwrap();
    let kept = runtime.items(&tenant(), &cut.id).await.unwrap();
    let kept = kept[0].message["content"].as_str().unwrap();
    assert!("Name three fruits, and say why you like each of them.".starts_with(kept), "{kept}");
    let beyond = runtime.fork(&tenant(), &session.id, Some(Place::Token(1 << 20)), None).await.map(|_| ());
    assert!(matches!(beyond, Err(SessionError::Invalid { .. })), "{beyond:?}");

    runtime.delete(&tenant(), &session.id).await.unwrap();
    assert!(matches!(runtime.get(&tenant(), &session.id).await, Err(SessionError::SessionNotFound(_))));
    assert!(say(&runtime, "branch", "Thanks.", 3).await.usage.completion_tokens > 0);
    runtime.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_session_is_forked_where_its_running_turn_begins() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = open(directory.path());
    let session = create(&runtime).await;
    let first = say(&runtime, &session.id, "Say hello.", 6).await;
    let mut long = request("Write a long story.", 400);
    long.generation.ignore_eos = true;
    let stream = runtime.start_turn(&tenant(), &session.id, long).await.unwrap();
    let (fork, _) = runtime.fork(&tenant(), &session.id, None, None).await.unwrap();
    assert_eq!((fork.tokens, fork.turns), (first.usage.total_tokens, 1));
    let refused = runtime.rewind(&tenant(), &session.id, Place::Token(0)).await.map(|_| ());
    assert!(matches!(refused, Err(SessionError::Busy { .. })), "{refused:?}");
    assert!(matches!(runtime.delete(&tenant(), &session.id).await, Err(SessionError::Busy { .. })));
    runtime.cancel(&tenant(), &session.id, &stream.turn).await.unwrap();
    runtime.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_sends_its_whole_history_is_restored_from_what_was_sampled() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = open(directory.path());
    let ask = async |messages: &[Message]| {
        let mut streams = runtime.chat(&tenant(), chat(messages.to_vec(), 24)).await.unwrap();
        let stream = streams.remove(0);
        let session = stream.session.clone();
        (session, collect(stream).await.1)
    };
    let mut messages = vec![message("system", "Be brief."), message("user", "What is the sea?")];
    let (first_session, first) = ask(&messages).await;
    assert_eq!(first.dormouse.clone().unwrap().miss.unwrap().reason, "new_session");
    // Clients trim, and know nothing of how the text was sampled.
    messages.push(message("assistant", first.output_text.trim()));
    messages.push(message("user", "And a lake?"));
    let (second_session, second) = ask(&messages).await;
    assert_eq!(second_session, first_session, "{second:?} after {first:?}");
    let receipt = second.dormouse.unwrap();
    assert!(receipt.restored_tokens + 1 >= first.usage.total_tokens, "{receipt:?}");
    assert_eq!(receipt.miss, None);

    // The same question again has moved on: it parts from the first, and says the same.
    let (third_session, third) = ask(&messages).await;
    assert_ne!(third_session, first_session);
    assert_eq!(third.output_text, second.output_text);
    assert!(third.usage.cached_tokens + 1 >= first.usage.total_tokens);

    // An answer that was never given: what is known before it is used, and the receipt says where they part.
    let mut altered = messages.clone();
    altered.push(message("assistant", "Something that was never said."));
    altered.push(message("user", "Really?"));
    let (_, fourth) = ask(&altered).await;
    let receipt = fourth.dormouse.unwrap();
    let miss = receipt.miss.unwrap();
    assert_eq!((miss.reason.as_str(), miss.at_message), ("prefix_differs", Some(4)));
    assert!(receipt.restored_tokens + 1 >= first.usage.total_tokens);

    let query = ListSessions { limit: 100, ..ListSessions::default() };
    assert!(runtime.list(&tenant(), query.clone()).await.unwrap().data.is_empty());
    let query = ListSessions { implicit: true, ..query };
    assert_eq!(runtime.list(&tenant(), query).await.unwrap().data.len(), 3);
    runtime.shutdown().await;
    drop(runtime);

    // Across a restart too.
    let runtime = open(directory.path());
    runtime.recover().await.unwrap();
    messages.push(message("assistant", &second.output_text));
    messages.push(message("user", "Thanks."));
    let mut streams = runtime.chat(&tenant(), chat(messages, 4)).await.unwrap();
    let (_, last) = collect(streams.remove(0)).await;
    let receipt = last.dormouse.unwrap();
    assert!(receipt.restored_tokens + 1 >= second.usage.total_tokens, "{receipt:?}");
    runtime.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn choices_share_the_prompt_and_differ_in_their_seeds() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = open(directory.path());
    let question = "Tell me a story about a mouse that sleeps through the winter. ".repeat(6);
    let mut request = chat(vec![message("user", &question)], 16);
    request.n = 3;
    request.store = false;
    request.generation.sampling.temperature = 1.0;
    let streams = runtime.chat(&tenant(), request.clone()).await.unwrap();
    let mut texts = Vec::new();
    for (index, stream) in streams.into_iter().enumerate() {
        let (_, turn) = collect(stream).await;
        assert!(index == 0 || turn.usage.cached_tokens >= 64, "{:?}", turn.usage);
        texts.push(turn.output_text);
    }
    assert!(texts[0] != texts[1] && texts[1] != texts[2], "{texts:?}");
    // `store: false` leaves nothing behind.
    let query = ListSessions { limit: 100, implicit: true, ..ListSessions::default() };
    assert!(runtime.list(&tenant(), query).await.unwrap().data.is_empty());
    request.n = 1;
    let (_, again) = collect(runtime.chat(&tenant(), request).await.unwrap().remove(0)).await;
    assert_eq!(again.output_text, texts[0]);
    runtime.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_whose_client_leaves_is_cancelled_and_a_sessions_turn_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = open(directory.path());
    let mut request = chat(vec![message("user", "Write a long story.")], 2000);
    request.generation.ignore_eos = true;
    let stream = runtime.chat(&tenant(), request.clone()).await.unwrap().remove(0);
    let (session, turn) = (stream.session.clone(), stream.turn.clone());
    drop(stream);
    let left = runtime.attach(&tenant(), &session, &turn, None).await.unwrap();
    drop(left);
    let mut status = TurnStatus::InProgress;
    while status == TurnStatus::InProgress {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        status = runtime.turn(&tenant(), &session, &turn).await.unwrap().status;
    }
    assert_eq!(status, TurnStatus::Cancelled);

    request.session = Some("story".into());
    request.generation.max_tokens = Some(12);
    let stream = runtime.chat(&tenant(), request).await.unwrap().remove(0);
    let turn = stream.turn.clone();
    drop(stream);
    let attached = runtime.attach(&tenant(), "story", &turn, None).await.unwrap();
    assert_eq!(collect(attached).await.1.usage.completion_tokens, 12);
    runtime.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_are_listed_changed_and_swept_when_their_time_is_up() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = open(directory.path());
    let new = CreateSession { name: Some("notes".into()), ttl_seconds: Some(0), ..CreateSession::default() };
    let session = runtime.create(&tenant(), new).await.unwrap();
    let change =
        UpdateSession { pinned: Some(true), name: Some(Some("kept".into())), ..UpdateSession::default() };
    let session = runtime.update(&tenant(), &session.id, change).await.unwrap();
    assert_eq!((session.name.as_deref(), session.pinned), (Some("kept"), true));
    assert_eq!(runtime.sweep().await.unwrap(), 0);
    let change = UpdateSession { pinned: Some(false), ..UpdateSession::default() };
    runtime.update(&tenant(), "kept", change).await.unwrap();
    assert_eq!(runtime.sweep().await.unwrap(), 1);
    assert!(runtime.get(&tenant(), "kept").await.is_err());
    // However many they are.
    for _ in 0..70 {
        let new = CreateSession { ttl_seconds: Some(0), ..CreateSession::default() };
        runtime.create(&tenant(), new).await.unwrap();
    }
    assert_eq!(runtime.sweep().await.unwrap(), 70);
    let unknown = CreateSession { model: Some("gpt-9".into()), ..CreateSession::default() };
    assert!(matches!(runtime.create(&tenant(), unknown).await, Err(SessionError::ModelNotFound(..))));
    assert!(runtime.metrics().await.contains("dormouse_healthy 1\n"));
    runtime.shutdown().await;
}
