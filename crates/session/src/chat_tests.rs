use super::*;
use crate::records::message;

#[path = "../tests/common/mod.rs"]
mod common;

use common::{chat, collect, generation, open, say, tenant};

#[test]
fn a_history_with_unknown_answers_is_a_miss_with_a_reason() {
    let (user, answer) = (message("user", "hi"), message("assistant", "Hello!"));
    let reason = |messages: &[Message], known| miss(messages, known).map(|miss| miss.reason);
    assert_eq!(reason(std::slice::from_ref(&user), 0).as_deref(), Some("new_session"));
    let whole = [user.clone(), answer.clone(), user.clone()];
    assert_eq!(reason(&whole, 0).as_deref(), Some("prefix_differs"));
    assert_eq!(reason(&whole, 2), None);
    let longer = [user.clone(), answer.clone(), user.clone(), answer, user];
    assert_eq!(reason(&longer, 2).as_deref(), Some("prefix_differs"));
}

/// The texts of a session's items.
async fn texts(runtime: &Runtime, session: &str) -> Vec<String> {
    let items = runtime.items(&tenant(), session).await.unwrap();
    items.iter().map(|item| item.message["content"].as_str().unwrap().to_owned()).collect()
}

/// A conversation of one question and its answer, a request that goes on with it, and what was found for that.
async fn known(runtime: &Runtime) -> (String, Whole) {
    let mut messages = vec![message("user", "What is the sea?")];
    let stream = runtime.chat(&tenant(), chat(messages.clone(), 6)).await.unwrap().remove(0);
    let session = stream.session.clone();
    messages.push(message("assistant", &collect(stream).await.1.output_text));
    messages.push(message("user", "And a lake?"));
    let settings = runtime.new_settings(None, &CreateSession::default()).unwrap();
    let base = runtime.longest_known(&tenant(), &settings, &messages).await.unwrap();
    assert!(base.as_ref().is_some_and(|base| base.continuable && base.session == session), "{base:?}");
    (session, Whole { settings, messages, base, store: true })
}

/// Goes on; answers the session that it is in, and checks that this holds what was sent and its answer only.
async fn go_on(runtime: &Runtime, whole: &Whole) -> String {
    let start = Start::new(Vec::new(), generation(4));
    let stream = runtime.begin_choice(&tenant(), whole, 0, start).await.unwrap().1;
    let session = stream.session.clone();
    let answer = collect(stream).await.1.output_text;
    let mut said: Vec<&str> = whole.messages.iter().map(crate::records::content).collect();
    said.push(&answer);
    assert_eq!(texts(runtime, &session).await, said);
    session
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_that_another_request_continued_first_is_not_mixed_with_it() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = open(directory.path());
    let (session, whole) = known(&runtime).await;
    say(&runtime, &session, "What did somebody else ask?", 3).await;
    assert_ne!(go_on(&runtime, &whole).await, session);
    // Rewound and continued otherwise, it does not hold what was found in it, however long it is.
    runtime.rewind(&tenant(), &session, Place::Token(0)).await.unwrap();
    say(&runtime, &session, "Something else, and longer than before: why is the sky so blue today?", 40)
        .await;
    assert_ne!(go_on(&runtime, &whole).await, session);
    runtime.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_whose_session_is_deleted_meanwhile_begins_anew() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = open(directory.path());
    let (session, whole) = known(&runtime).await;
    runtime.delete(&tenant(), &session).await.unwrap();
    assert_ne!(go_on(&runtime, &whole).await, session);
    runtime.shutdown().await;
}
