//! A small life of sessions that tests build and compare.

#![allow(clippy::unwrap_used, dead_code)]

use std::path::Path;

use dormouse_store::{
    BeginTurn, Cut, Durability, FinishTurn, ItemRow, KeyRow, Leaf, NewEvent, NewSession, PageRow,
    ResponseRow, SessionRow, StepCommit, Store,
};

pub fn open(directory: &Path) -> Store {
    Store::open(directory, Durability::Process).unwrap()
}

pub fn event(kind: &str) -> NewEvent {
    NewEvent { kind: kind.into(), turn: None, data: format!("{{\"kind\":\"{kind}\"}}") }
}

pub fn new_session(id: &str) -> NewSession {
    NewSession {
        id: id.into(),
        tenant: "default".into(),
        name: Some(format!("name of {id}")),
        settings: format!("{{\"model\":\"m\",\"note\":\"{}\"}}", "text ".repeat(20)),
        events: vec![event("created")],
        now_ms: 1_000,
        ..NewSession::default()
    }
}

pub fn item(id: &str, start: usize, end: usize) -> ItemRow {
    ItemRow {
        id: id.into(),
        turn: Some("turn".into()),
        token_start: start,
        token_end: end,
        created_ms: 5,
        message: format!("{{\"role\":\"user\",\"content\":\"{}\"}}", id.repeat(30)),
    }
}

pub fn page(slot: u32, tokens: &[u32]) -> PageRow {
    PageRow { slot, id: [slot as u8; 32], parent: [0; 32], tokens: tokens.to_vec(), checksum: slot * 7 }
}

/// The response that a turn of [`one_turn`] is.
pub fn response(session: &str, turn: &str) -> ResponseRow {
    ResponseRow {
        id: format!("resp_{turn}"),
        tenant: "default".into(),
        session: session.into(),
        turn: turn.into(),
        created_ms: 2_000,
        record: format!("{{\"note\":\"{}\"}}", "said ".repeat(80)),
    }
}

/// One whole turn: input, two steps of output, an answer.
pub async fn one_turn(store: &Store, file: i64, session: &str, number: usize, input: usize) -> SessionRow {
    let before = store.history(session).await.unwrap().session;
    let turn = format!("turn_{session}_{number}");
    let start = before.log_len;
    let tokens: Vec<u32> = (0..input as u32).map(|token| token * 3 + number as u32).collect();
    let row = store
        .begin_turn(BeginTurn {
            session: session.into(),
            turn: turn.clone(),
            fence: before.fence,
            keep_tokens: start,
            tokens: tokens.clone(),
            keep_items: before.items,
            items: vec![item(&format!("in{number}"), start, start + input)],
            record: format!("{{\"status\":\"in_progress\",\"n\":{number}}}"),
            response: Some(response(session, &turn)),
            events: vec![event("begun")],
            now_ms: 2_000,
            ..BeginTurn::default()
        })
        .await
        .unwrap();
    let slot = row.turns as u32 * 10;
    for step in 0..2 {
        let output = [900 + step, 901 + step, 902 + step];
        let (store, session, turn) = (store.clone(), session.to_owned(), turn.clone());
        let log_start = start + input + 3 * step as usize;
        tokio::task::spawn_blocking(move || {
            store
                .commit_steps(vec![StepCommit {
                    session,
                    fence: row.fence,
                    turn,
                    log_start,
                    tokens: output.to_vec(),
                    page_file: file,
                    pages: vec![page(slot, &output)],
                    removed: vec![],
                    leaf_slot: Some(slot),
                    kv_len: log_start + 3,
                    ..StepCommit::default()
                }])
                .unwrap()
                .remove(0)
                .unwrap();
        })
        .await
        .unwrap();
    }
    let end = start + input + 6;
    store
        .finish_turn(FinishTurn {
            session: session.into(),
            turn: turn.clone(),
            fence: row.fence,
            record: format!("{{\"status\":\"completed\",\"n\":{number}}}"),
            item: Some(item(&format!("out{number}"), start + input, end)),
            boundaries: vec![([number as u8; 32], end)],
            events: vec![event("finished")],
            now_ms: 3_000,
            ..FinishTurn::default()
        })
        .await
        .unwrap()
}

/// Three sessions, a fork and a rewind.
pub async fn fill(store: &Store) {
    let file = store.page_file(Path::new("kv/pages-1"), [7; 32], "default", "{}").unwrap();
    for (number, id) in ["sess_a", "sess_b", "sess_c"].into_iter().enumerate() {
        store.create_session(new_session(id)).await.unwrap();
        for turn in 0..=number {
            one_turn(store, file, id, turn, 400 + 300 * number).await;
        }
    }
    let source = store.history("sess_c").await.unwrap();
    let cut = Cut { tokens: source.items[3].token_end, items: 4, partial_item: None, turns: 2 };
    let leaf = Leaf { page_file: Some(file), slot: Some(10), kv_len: 64 };
    store.fork_session("sess_c", source.session.fence, cut, new_session("sess_d"), leaf).await.unwrap();
    let cut = Cut { tokens: 100, items: 0, partial_item: Some(item("cut", 0, 100)), turns: 0 };
    let fence = store.session("sess_b").await.unwrap().fence;
    let key = KeyRow { id: "key_1".into(), name: "ci".into(), hash: [3; 32], ..KeyRow::default() };
    store.create_key(key).await.unwrap();
    store.rewind_session("sess_b", fence, cut, Leaf::default(), vec![event("rewound")], 4_000).await.unwrap();
}

/// Everything that must never be lost, as one text.
pub async fn content(store: &Store) -> String {
    let mut text = String::new();
    for (row, settings) in store.list_sessions("default", None, 100, None, true).await.unwrap() {
        // KV places are derived data.
        let row = SessionRow { page_file: None, leaf_slot: None, kv_len: 0, ..row };
        let history = store.history(&row.id).await.unwrap();
        let log = store.token_log(&row.id).await.unwrap();
        let events = store.events(&row.id, 0, 1000).await.unwrap();
        for turn in &history.turns {
            let id = format!("resp_{}", turn.id);
            text += &format!("{:?}\n", store.response("default", &id).await.unwrap());
        }
        text +=
            &format!("{row:?}\n{settings}\n{:?}\n{:?}\n{log:?}\n{events:?}\n", history.items, history.turns);
    }
    text += &format!("{:?}\n", store.keys().await.unwrap());
    for number in 0..3u8 {
        text += &format!("{:?}\n", store.find_boundaries("default", vec![[number; 32]]).await.unwrap());
    }
    text
}
