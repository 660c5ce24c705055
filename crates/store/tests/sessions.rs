//! Sessions, leases and the page catalog, as their users see them.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use common::{content, event, fill, item, new_session, one_turn, open, page};
use dormouse_store::{
    BeginTurn, ClaimRow, Cut, Durability, FinishTurn, Leaf, PageRow, RemovedPage, SessionRow, StatusFilter,
    StepCommit, Store, StoreError, UpdateSession, WeightsFile, lock,
};

fn begin(session: &str, keep: usize, tokens: &[u32]) -> BeginTurn {
    BeginTurn {
        session: session.into(),
        turn: format!("turn_at_{keep}"),
        keep_tokens: keep,
        tokens: tokens.to_vec(),
        record: "{}".into(),
        now_ms: 2,
        ..BeginTurn::default()
    }
}

#[tokio::test]
async fn everything_is_there_again_after_a_clean_close() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    fill(&store).await;
    let before = content(&store).await;
    store.close().await.unwrap();
    assert!(matches!(store.token_log("sess_a").await, Err(StoreError::Closed)));
    drop(store);
    let store = open(directory.path());
    assert_eq!(content(&store).await, before);
    assert!(store.health().await.unwrap().is_empty());
    assert!(store.verify().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_second_opener_is_told_who_holds_the_directory() {
    let directory = tempfile::tempdir().unwrap();
    assert_eq!(lock::holder(directory.path()).unwrap(), None);
    let store = open(directory.path());
    store.set_address("http://127.0.0.1:8642".into()).await.unwrap();
    match Store::open(directory.path(), Durability::Power).map(|_| ()) {
        Err(StoreError::Locked { pid, address, .. }) => {
            assert_eq!(pid, std::process::id());
            assert_eq!(address.as_deref(), Some("http://127.0.0.1:8642"));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(lock::holder(directory.path()).unwrap().unwrap().pid, std::process::id());
    drop(store);
    assert_eq!(lock::holder(directory.path()).unwrap(), None);
    open(directory.path());
}

#[tokio::test]
async fn a_session_has_one_writer_and_an_old_writer_is_shut_out() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    store.create_session(new_session("s")).await.unwrap();
    let row = store.begin_turn(begin("s", 0, &[1, 2, 3])).await.unwrap();
    assert_eq!((row.fence, row.log_len), (1, 3));
    assert!(matches!(
        store.begin_turn(begin("s", 3, &[4])).await,
        Err(StoreError::Busy { turn, .. }) if turn == "turn_at_0"
    ));
    assert!(matches!(store.delete_session("s").await, Err(StoreError::Busy { .. })));
    assert!(matches!(
        store.rewind_session("s", 1, Cut::default(), Leaf::default(), vec![], 1).await,
        Err(StoreError::Busy { .. })
    ));
    assert_eq!(store.interrupted_turns().await.unwrap()[0].id, "s");

    let successor = store.take_over("s").await.unwrap();
    let step = StepCommit {
        session: "s".into(),
        fence: row.fence,
        turn: "turn_at_0".into(),
        log_start: 3,
        tokens: vec![4],
        ..Default::default()
    };
    let commit = |steps: Vec<StepCommit>| store.commit_steps(steps).unwrap();
    let [Err(StoreError::LeaseLost { fence: 1, found: 2, .. })] = commit(vec![step.clone()])[..] else {
        panic!()
    };
    let step = StepCommit { fence: successor.fence, log_start: 2, ..step };
    // Who is refused does not stop the others of the same transaction.
    let right = StepCommit { log_start: 3, ..step.clone() };
    // Another turn can have had the same fence, if its lease did not become durable.
    let other = StepCommit { turn: "another".into(), ..right.clone() };
    let [
        Err(StoreError::WrongPosition { at: 2, found: 3, .. }),
        Err(StoreError::LeaseLost { fence: 2, found: 2, .. }),
        Ok(()),
    ] = commit(vec![step, other, right])[..]
    else {
        panic!()
    };
    assert_eq!(store.token_log("s").await.unwrap(), [1, 2, 3, 4]);
    let finish = FinishTurn {
        session: "s".into(),
        turn: "turn_at_0".into(),
        record: "{}".into(),
        ..Default::default()
    };
    assert!(matches!(
        store.finish_turn(FinishTurn { fence: 1, ..finish.clone() }).await,
        Err(StoreError::LeaseLost { .. })
    ));
    let row = store.finish_turn(FinishTurn { fence: 2, ..finish }).await.unwrap();
    assert_eq!((row.active_turn, row.log_len), (None, 4));
    assert_eq!(store.history("s").await.unwrap().turns[0].output_end, Some(4));
    assert_eq!(store.token_log("s").await.unwrap(), [1, 2, 3, 4]);
}

#[tokio::test]
async fn a_turn_hears_of_its_lease_once_and_not_if_it_gets_none() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    store.create_session(new_session("s")).await.unwrap();
    let (sender, leases) = std::sync::mpsc::channel();
    let tell = || {
        let sender = sender.clone();
        move |row: &SessionRow| sender.send((row.fence, row.log_len, row.active_turn.clone())).unwrap()
    };
    let row = store.begin_turn_early(begin("s", 0, &[1, 2, 3]), tell()).await.unwrap();
    assert_eq!((row.fence, row.log_len), (1, 3));
    assert!(store.begin_turn_early(begin("s", 3, &[4]), tell()).await.is_err());
    // The database's mirror has followed when the next is answered.
    assert!(store.health().await.unwrap().is_empty());
    drop(sender);
    assert_eq!(leases.iter().collect::<Vec<_>>(), [(1, 0, Some("turn_at_0".to_owned()))]);
}

#[tokio::test]
async fn a_session_may_go_with_its_turn() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let file = store.page_file(Path::new("p"), [1; 32], "default", "{}").unwrap();
    for id in ["s", "other"] {
        store.create_session(new_session(id)).await.unwrap();
        one_turn(&store, file, id, 0, 100).await;
    }
    let fence = store.session("s").await.unwrap().fence;
    let row = store.begin_turn(BeginTurn { fence, ..begin("s", 106, &[4]) }).await.unwrap();
    let leaf = row.leaf_slot;
    let finish = FinishTurn {
        session: "s".into(),
        turn: "turn_at_106".into(),
        deletes: true,
        ..FinishTurn::default()
    };
    let stale = FinishTurn { fence, ..finish.clone() };
    assert!(matches!(store.finish_turn(stale).await, Err(StoreError::LeaseLost { .. })));
    let row = store.finish_turn(FinishTurn { fence: fence + 1, ..finish }).await.unwrap();
    assert_eq!((row.id.as_str(), row.active_turn, row.leaf_slot), ("s", None, leaf));
    assert!(matches!(store.session("s").await, Err(StoreError::SessionNotFound(_))));
    assert!(store.token_log("s").await.is_err());
    assert_eq!(store.token_log("other").await.unwrap().len(), 106);
    // Nothing is left that belongs to nobody, here and in the mirror.
    assert!(store.verify().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_turn_may_replace_the_tail_of_the_log_and_of_the_items() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let file = store.page_file(Path::new("p"), [1; 32], "default", "{}").unwrap();
    store.create_session(new_session("s")).await.unwrap();
    one_turn(&store, file, "s", 0, 2000).await;
    assert!(matches!(
        store.begin_turn(begin("s", 700, &[5])).await,
        Err(StoreError::LeaseLost { found: 1, .. })
    ));
    let turn = BeginTurn {
        fence: 1,
        keep_items: 1,
        items: vec![item("x", 700, 1300)],
        ..begin("s", 700, &[5; 600])
    };
    let row = store.begin_turn(turn).await.unwrap();
    assert_eq!((row.log_len, row.items, row.turns), (1300, 2, 2));
    let log = store.token_log("s").await.unwrap();
    assert_eq!((log[699], log[700], log[1299]), (699 * 3, 5, 5));
    // The boundary at the end of the replaced answer is gone, and so is the place of its turn's output.
    let replaced = &store.history("s").await.unwrap().turns[0];
    assert_eq!((replaced.output_start, replaced.output_end), (None, None));
    let late = store.fork_session("s", 1, Cut::default(), new_session("f"), Leaf::default()).await;
    assert!(matches!(late, Err(StoreError::LeaseLost { found: 2, .. })), "{late:?}");
    assert!(store.find_boundaries("default", vec![[0; 32]]).await.unwrap().is_empty());
}

#[tokio::test]
async fn names_are_unique_and_find_their_session() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    store.create_session(new_session("s")).await.unwrap();
    let mut other = new_session("t");
    other.name = Some("name of s".into());
    assert!(matches!(store.create_session(other.clone()).await, Err(StoreError::NameTaken(_))));
    other.tenant = "another".into();
    store.create_session(other).await.unwrap();
    assert_eq!(store.find_session("default", "name of s").await.unwrap().id, "s");
    assert!(matches!(store.find_session("default", "t").await, Err(StoreError::SessionNotFound(_))));
    let change = UpdateSession { name: Some(None), ..UpdateSession::default() };
    store.update_session("s", change).await.unwrap();
    assert!(store.find_session("default", "name of s").await.is_err());
}

#[tokio::test]
async fn lists_are_paged_newest_first_and_filtered() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    for number in 0..5u64 {
        let mut new = new_session(&format!("s{number}"));
        (new.now_ms, new.implicit) = (number / 2, number == 4);
        new.expires_ms = (number == 0).then_some(50);
        store.create_session(new).await.unwrap();
    }
    let ids = |rows: Vec<(dormouse_store::SessionRow, String)>| {
        rows.into_iter().map(|row| row.0.id).collect::<Vec<_>>()
    };
    let all = store.list_sessions("default", None, 10, None, true).await.unwrap();
    assert_eq!(ids(all), ["s4", "s3", "s2", "s1", "s0"]);
    let page = store.list_sessions("default", Some("s3".into()), 2, None, false).await.unwrap();
    assert_eq!(ids(page), ["s2", "s1"]);
    store.begin_turn(begin("s2", 0, &[1])).await.unwrap();
    let busy = store.list_sessions("default", None, 10, Some(StatusFilter::InProgress), false).await.unwrap();
    assert_eq!(ids(busy), ["s2"]);
    assert_eq!(store.expired_sessions(49, 10).await.unwrap().len(), 0);
    assert_eq!(store.expired_sessions(50, 10).await.unwrap()[0].id, "s0");
    let counts = store.session_counts().await.unwrap();
    assert_eq!((counts.in_progress, counts.failed, counts.idle), (1, 0, 4));
}

#[tokio::test]
async fn removing_pages_moves_the_claims_of_their_sessions_to_what_stays() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let file = store.page_file(Path::new("p"), [1; 32], "default", "{}").unwrap();
    assert_eq!(store.page_file(Path::new("p"), [1; 32], "default", "{}").unwrap(), file);
    let fence = {
        store.create_session(new_session("s")).await.unwrap();
        store.begin_turn(begin("s", 0, &vec![9; 150])).await.unwrap().fence
    };
    let step = StepCommit {
        session: "s".into(),
        fence,
        turn: "turn_at_0".into(),
        log_start: 150,
        tokens: vec![1],
        page_file: file,
        pages: vec![page(1, &[9; 64]), page(2, &[9; 64]), page(3, &[9; 22])],
        removed: vec![],
        leaf_slot: Some(3),
        kv_len: 150,
        bytes_written: 4096,
        day: 20_000,
    };
    store.commit_steps(vec![step.clone()]).unwrap().remove(0).unwrap();
    assert_eq!(store.session("s").await.unwrap().bytes_written, 4096);
    assert_eq!(store.written_bytes(20_000).await.unwrap(), [(20_000, 4096)]);
    let claim = |leaf_slot| [ClaimRow { session: "s".into(), leaf_slot, pinned: false }];
    assert_eq!(store.claims(file).unwrap(), claim(3));
    assert_eq!(store.load_pages(file).unwrap(), step.pages);
    // An open tail that grew replaces its row.
    let grown = PageRow { tokens: vec![9; 23], ..page(3, &[]) };
    store.commit_pages(file, std::slice::from_ref(&grown), &[]).unwrap();
    assert_eq!(store.load_pages(file).unwrap()[2], grown);
    let removed =
        [RemovedPage { slot: 2, parent_slot: Some(1) }, RemovedPage { slot: 3, parent_slot: Some(2) }];
    store.commit_pages(file, &[], &removed).unwrap();
    assert_eq!(store.claims(file).unwrap(), claim(1));
    for (settings, pinned) in
        [(r#"{"pinned":true}"#, true), (r#"{"pinned":false}"#, false), ("damaged", false)]
    {
        let change = UpdateSession { settings: Some(settings.into()), ..UpdateSession::default() };
        store.update_session("s", change).await.unwrap();
        assert_eq!(store.claims(file).unwrap()[0].pinned, pinned, "{settings}");
    }
    let row = store.find_session("default", "s").await.unwrap();
    assert_eq!((row.leaf_slot, row.kv_len), (Some(1), 64));
    // Another model's file under the same path forgets all.
    assert_eq!(store.page_file(Path::new("p"), [2; 32], "default", "{}").unwrap(), file);
    assert!(store.load_pages(file).unwrap().is_empty());
    assert!(store.claims(file).unwrap().is_empty());
}

#[tokio::test]
async fn a_deleted_session_leaves_nothing_and_its_fork_keeps_all() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    fill(&store).await;
    let fork = store.history("sess_d").await.unwrap();
    let row = store.delete_session("sess_c").await.unwrap();
    assert!(row.leaf_slot.is_some());
    assert!(matches!(store.history("sess_c").await, Err(StoreError::SessionNotFound(_))));
    assert_eq!(store.history("sess_d").await.unwrap(), fork);
    assert_eq!(store.token_log("sess_d").await.unwrap().len(), fork.session.log_len);
    let known = store.find_boundaries("default", vec![[1; 32], [99; 32]]).await.unwrap();
    assert_eq!(known.len(), 1);
    assert_eq!((known[0].index, known[0].session.as_str()), (0, "sess_d"));
}

#[tokio::test]
async fn events_are_numbered_without_gaps_and_survive_a_rewind() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    store.create_session(new_session("s")).await.unwrap();
    let change = UpdateSession { events: vec![event("a"), event("b")], ..UpdateSession::default() };
    store.update_session("s", change).await.unwrap();
    store.rewind_session("s", 0, Cut::default(), Leaf::default(), vec![event("rewound")], 9).await.unwrap();
    let events = store.events("s", 1, 10).await.unwrap();
    let seen: Vec<_> = events.iter().map(|event| (event.sequence, event.kind.as_str())).collect();
    assert_eq!(seen, [(1, "a"), (2, "b"), (3, "rewound")]);
    assert!(store.events("s", 4, 10).await.unwrap().is_empty());
    assert!(store.events("s", u64::MAX, 10).await.unwrap().is_empty());
}

#[test]
fn a_weights_hash_is_known_only_for_the_very_same_file_state() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let file =
        WeightsFile { path: "w.gguf".into(), bytes: 5, modified_ns: 1, changed_ns: 2, inode: u64::MAX };
    store.remember_weights(&file, [3; 32]).unwrap();
    assert_eq!(store.weights_hash(&file).unwrap(), Some([3; 32]));
    assert_eq!(store.weights_hash(&WeightsFile { modified_ns: 9, ..file }).unwrap(), None);
}
