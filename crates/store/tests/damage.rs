//! Nothing that was acknowledged is lost when the process is killed or a database file is damaged.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;

use common::{content, event, fill, new_session, open};
use dormouse_store::{NewEvent, StoreError, UpdateSession};

/// The files as a kill -9 at this moment would leave them.
fn snapshot(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

async fn filled() -> (tempfile::TempDir, String) {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    fill(&store).await;
    let text = content(&store).await;
    store.close().await.unwrap();
    (directory, text)
}

fn names(directory: &Path) -> Vec<String> {
    fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[tokio::test]
async fn a_killed_process_loses_nothing_acknowledged() {
    let (live, killed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let store = open(live.path());
    fill(&store).await;
    let before = content(&store).await;
    snapshot(live.path(), killed.path());
    let survivor = open(killed.path());
    assert_eq!(content(&survivor).await, before);
    assert!(survivor.health().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_mirror_that_is_behind_is_caught_up_and_one_that_is_ahead_is_believed() {
    let (live, older) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let store = open(live.path());
    store.create_session(new_session("s")).await.unwrap();
    store.close().await.unwrap();
    drop(store);
    snapshot(live.path(), older.path());
    let store = open(live.path());
    let change = UpdateSession { events: vec![event("later")], ..UpdateSession::default() };
    store.update_session("s", change).await.unwrap();
    let before = content(&store).await;
    store.close().await.unwrap();
    drop(store);
    for (stale, reported) in [("dormouse-mirror.db", 0), ("dormouse.db", 1)] {
        let mixed = tempfile::tempdir().unwrap();
        snapshot(live.path(), mixed.path());
        fs::copy(older.path().join(stale), mixed.path().join(stale)).unwrap();
        let store = open(mixed.path());
        assert_eq!(content(&store).await, before, "{stale}");
        assert_eq!(store.health().await.unwrap().len(), reported, "{stale}");
        store.close().await.unwrap();
        drop(store);
        let again = open(mixed.path());
        assert!(again.health().await.unwrap().is_empty());
        assert_eq!(content(&again).await, before);
    }
}

/// splitmix64: the seeds of a failing case are in its message.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[tokio::test]
async fn flipped_bits_anywhere_in_either_file_change_no_content() {
    let (intact, before) = filled().await;
    let mut mended = 0;
    // Most bytes of the first pages, roots of tables without many rows, hold nothing.
    for seed in 0..240u64 {
        let damaged = tempfile::tempdir().unwrap();
        snapshot(intact.path(), damaged.path());
        let name = if seed % 4 == 3 { "dormouse-mirror.db" } else { "dormouse.db" };
        let path = damaged.path().join(name);
        let mut bytes = fs::read(&path).unwrap();
        let mut state = seed;
        // Half of the flips go to the first pages, where header, schema and tree roots are.
        let range = if seed % 2 == 0 { bytes.len() } else { 20 * 4096 };
        let at = random(&mut state) as usize % range;
        let bit = random(&mut state) % 8;
        bytes[at] ^= 1 << bit;
        fs::write(&path, bytes).unwrap();
        let store = open(damaged.path());
        assert_eq!(content(&store).await, before, "seed {seed}: bit {bit} of byte {at} of {name}");
        let health = store.health().await.unwrap();
        if !health.is_empty() {
            mended += 1;
            assert!(names(damaged.path()).iter().any(|name| name.contains(".damaged-1")), "{health:?}");
        }
        // It goes on working, in both files.
        store.create_session(new_session("after")).await.unwrap();
        assert_eq!(store.verify().await.unwrap().len(), health.len(), "seed {seed}");
    }
    assert!(mended > 20, "only {mended} flips were seen at all");
}

#[tokio::test]
async fn damage_done_while_the_store_is_open_is_mended_when_it_is_read() {
    let (directory, before) = filled().await;
    let store = open(directory.path());
    let path = directory.path().join("dormouse.db");
    let mut bytes = fs::read(&path).unwrap();
    let header = 100;
    for byte in &mut bytes[header..] {
        *byte = 0x5a;
    }
    fs::write(&path, bytes).unwrap();
    // Read through a fresh page cache: what the open connection has read before may still be served from it.
    store.create_session(new_session("new")).await.ok();
    store.verify().await.unwrap();
    store.delete_session("new").await.ok();
    assert_eq!(content(&store).await, before);
    assert!(!store.health().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_truncated_or_replaced_or_missing_database_comes_back_from_its_mirror() {
    let (intact, before) = filled().await;
    for damage in 0..6 {
        for name in ["dormouse.db", "dormouse-mirror.db"] {
            let damaged = tempfile::tempdir().unwrap();
            snapshot(intact.path(), damaged.path());
            let path = damaged.path().join(name);
            let bytes = fs::read(&path).unwrap();
            match damage {
                0 => fs::remove_file(&path).unwrap(),
                1 => fs::write(&path, []).unwrap(),
                2 => fs::write(&path, &bytes[..50]).unwrap(),
                3 => fs::write(&path, &bytes[..bytes.len() / 2]).unwrap(),
                4 => fs::write(&path, &bytes[..bytes.len() - 4096]).unwrap(),
                _ => fs::write(&path, vec![b'x'; bytes.len()]).unwrap(),
            }
            let store = open(damaged.path());
            assert_eq!(content(&store).await, before, "damage {damage} of {name}");
            assert_eq!(store.health().await.unwrap().len(), 1, "damage {damage} of {name}");
        }
    }
}

#[tokio::test]
async fn two_damaged_files_are_an_error_that_changes_neither() {
    let (directory, _) = filled().await;
    for name in ["dormouse.db", "dormouse-mirror.db"] {
        fs::write(directory.path().join(name), vec![b'x'; 9000]).unwrap();
    }
    let result = dormouse_store::Store::open(directory.path(), dormouse_store::Durability::Power).map(|_| ());
    assert!(matches!(result, Err(StoreError::Damaged(_))), "{result:?}");
    assert_eq!(fs::read(directory.path().join("dormouse.db")).unwrap(), vec![b'x'; 9000]);
}

#[tokio::test]
async fn damage_in_a_database_too_large_to_be_checked_at_open_is_found_and_mended_beside_the_work() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    store.create_session(new_session("s")).await.unwrap();
    let data = "x".repeat(2000);
    let events = (0..1000).map(|_| NewEvent { data: format!("\"{data}\""), ..event("large") }).collect();
    store.update_session("s", UpdateSession { events, ..UpdateSession::default() }).await.unwrap();
    let before = content(&store).await;
    store.close().await.unwrap();
    drop(store);
    let path = directory.path().join("dormouse.db");
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.windows(100).rposition(|bytes| bytes.iter().all(|byte| *byte == b'x')).unwrap();
    bytes[at] ^= 1;
    fs::write(&path, bytes).unwrap();

    let store = open(directory.path());
    let mut tries = 0;
    while store.health().await.unwrap().is_empty() {
        tries += 1;
        assert!(tries < 1000, "nobody found the damage");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert!(names(directory.path()).iter().any(|name| name.contains(".damaged-1")));
    assert_eq!(content(&store).await, before);
}
