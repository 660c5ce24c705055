//! Responses, and items that are edited by hand, as their users see them.

#![allow(clippy::unwrap_used)]

mod common;

use common::{event, item, new_session, open};
use dormouse_store::{BeginTurn, Cut, EditItems, FinishTurn, Leaf, ResponseRow, Store, StoreError};

fn response(id: &str, session: &str, turn: &str) -> ResponseRow {
    ResponseRow {
        id: id.into(),
        tenant: "default".into(),
        session: session.into(),
        turn: turn.into(),
        created_ms: 7,
        record: "{}".into(),
    }
}

/// A turn that is a response, with one item of input (two tokens) and one of answer (none).
async fn turn(store: &Store, session: &str, turn: &str) {
    let row = store.session(session).await.unwrap();
    let begun = store
        .begin_turn(BeginTurn {
            session: session.into(),
            turn: turn.into(),
            fence: row.fence,
            keep_tokens: row.log_len,
            tokens: vec![1, 2],
            keep_items: row.items,
            items: vec![item(&format!("item_{turn}"), row.log_len, row.log_len + 2)],
            response: Some(response(&format!("resp_{turn}"), session, turn)),
            record: "{}".into(),
            ..BeginTurn::default()
        })
        .await
        .unwrap();
    let finish = FinishTurn {
        session: session.into(),
        turn: turn.into(),
        fence: begun.fence,
        record: "{}".into(),
        ..FinishTurn::default()
    };
    store.finish_turn(finish).await.unwrap();
}

#[tokio::test]
async fn a_response_is_found_by_its_tenant_also_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    store.create_session(new_session("s")).await.unwrap();
    assert!(!store.has_responses("s").await.unwrap());
    turn(&store, "s", "t1").await;
    assert!(store.has_responses("s").await.unwrap());
    store.close().await.unwrap();
    drop(store);
    let store = open(directory.path());
    assert_eq!(store.response("default", "resp_t1").await.unwrap(), Some(response("resp_t1", "s", "t1")));
    assert_eq!(store.response("other", "resp_t1").await.unwrap(), None);
    assert!(!store.delete_response("other", "resp_t1").await.unwrap());
    assert!(store.delete_response("default", "resp_t1").await.unwrap());
    assert_eq!(store.response("default", "resp_t1").await.unwrap(), None);
    assert!(store.verify().await.unwrap().is_empty());
}

#[tokio::test]
async fn responses_go_with_their_session_and_with_their_turn() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    store.create_session(new_session("s")).await.unwrap();
    turn(&store, "s", "t1").await;
    turn(&store, "s", "t2").await;
    let fence = store.session("s").await.unwrap().fence;
    let cut = Cut { tokens: 2, items: 1, partial_item: None, turns: 1 };
    store.rewind_session("s", fence, cut, Leaf::default(), vec![], 1).await.unwrap();
    assert!(store.response("default", "resp_t1").await.unwrap().is_some());
    assert!(store.response("default", "resp_t2").await.unwrap().is_none());
    store.delete_session("s").await.unwrap();
    assert!(store.response("default", "resp_t1").await.unwrap().is_none());
}

#[tokio::test]
async fn items_are_found_by_id_within_one_tenant() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    store.create_session(new_session("s")).await.unwrap();
    turn(&store, "s", "t1").await;
    assert_eq!(store.find_item("default", "item_t1").await.unwrap().unwrap().id, "item_t1");
    assert_eq!(store.find_item("other", "item_t1").await.unwrap(), None);
    assert_eq!(store.find_item("default", "item_t2").await.unwrap(), None);
}

#[tokio::test]
async fn an_edit_cuts_the_log_and_shuts_out_whoever_planned_on_the_longer_one() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    store.create_session(new_session("s")).await.unwrap();
    turn(&store, "s", "t1").await;
    turn(&store, "s", "t2").await;
    let fence = store.session("s").await.unwrap().fence;
    let edit = EditItems {
        session: "s".into(),
        fence,
        keep_tokens: 2,
        keep_items: 1,
        items: vec![item("item_new", 2, 2)],
        events: vec![event("edited")],
        now_ms: 9,
    };
    let row = store.edit_items(edit.clone()).await.unwrap();
    assert_eq!((row.log_len, row.items, row.turns, row.fence), (2, 2, 2, fence + 1));
    assert_eq!(store.token_log("s").await.unwrap(), [1, 2]);
    let history = store.history("s").await.unwrap();
    assert_eq!(history.items[1].id, "item_new");
    let ranges: Vec<Option<usize>> = history.turns.iter().map(|turn| turn.output_end).collect();
    assert_eq!(ranges, [Some(2), None]);
    assert!(matches!(store.edit_items(edit.clone()).await, Err(StoreError::LeaseLost { .. })));
    let beyond = EditItems { fence: fence + 1, keep_tokens: 3, ..edit };
    assert!(matches!(store.edit_items(beyond).await, Err(StoreError::WrongPosition { .. })));
    assert!(store.verify().await.unwrap().is_empty());
}
