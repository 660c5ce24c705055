//! Files that were cut, damaged, replaced or are too large for the disk.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use super::*;
use dormouse_store::Durability;

use crate::set_aside;

const HEADER_BYTES: u64 = 4096;

fn tokens(seed: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|position| position * 7 + seed * 1000).collect()
}

/// A closed page file with one session of `len` tokens.
fn written(len: usize) -> (Rig, Vec<u32>, Vec<u32>) {
    let mut rig = Rig::new(64);
    let log = tokens(1, len);
    let mut pool = rig.open();
    let slots = rig.fill(&mut pool, &log, 0).rows.iter().map(|row| row.slot).collect();
    (rig, log, slots)
}

fn change(rig: &Rig, offset: u64, change: impl Fn(u8) -> u8) {
    let file = OpenOptions::new().read(true).write(true).open(rig.path()).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[change(byte[0])], offset).unwrap();
}

#[test]
fn one_flipped_bit_costs_its_page_and_those_after_it_and_nothing_else() {
    let (mut rig, log, slots) = written(300);
    let offset = HEADER_BYTES + u64::from(slots[2]) * 8192 + 5000;
    change(&rig, offset, |byte| byte ^ 4);
    let mut pool = rig.open();
    assert_eq!(pool.verify_all().damaged, [slots[2]]);
    let mut attached = attach(&mut pool, &log);
    assert_eq!((attached.restored, attached.damaged), (128, vec![slots[2]]));
    check_pool(&pool, &[&attached.table]);

    let leaf = rig.catalog.leaves[&0].0;
    pool.set_claim(&mut attached.table, &name(0), leaf);
    assert_eq!(pool.table_claims[&attached.table.id].leaf, Some(slots[1]));
    compute(&mut pool, &mut attached.table, &log).unwrap();
    assert!(attached.table.nodes[2..].iter().all(|slot| !slots.contains(slot)), "slots are not reused yet");
    let commit = rig.commit(&mut pool, &mut attached.table, Some(0));
    assert_eq!(commit.removed.len(), 3);
    assert!(commit.removed.iter().all(|page| page.parent_slot == Some(slots[1])));
    drop((pool, commit));
    let mut pool = rig.open();
    assert_eq!(attach(&mut pool, &log).restored, 300);
    assert!(pool.verify_all().damaged.is_empty());
}

#[test]
fn a_flipped_bit_in_the_unused_rows_of_an_open_page_harms_nothing() {
    let (rig, log, slots) = written(70);
    let unused = super::row(6, 0).chain(super::row(6, 1));
    for at in unused {
        change(&rig, HEADER_BYTES + u64::from(slots[1]) * 8192 + at as u64, |byte| byte ^ 1);
    }
    assert_eq!(attach(&mut rig.open(), &log).restored, 70);
}

#[test]
fn a_cut_file_keeps_the_pages_that_are_left_and_drops_the_others() {
    let (mut rig, log, slots) = written(300);
    let file = OpenOptions::new().write(true).open(rig.path()).unwrap();
    // In the middle of the third page.
    file.set_len(HEADER_BYTES + u64::from(slots[2]) * 8192 + 1000).unwrap();
    let (mut pool, report) = rig.try_open().unwrap();
    assert_eq!((report.pages, report.dropped_beyond_end, report.dropped_orphans), (2, 1, 2));
    let mut attached = attach(&mut pool, &log);
    assert_eq!(attached.restored, 128);
    compute(&mut pool, &mut attached.table, &log).unwrap();
    check_pool(&pool, &[&attached.table]);
    rig.commit(&mut pool, &mut attached.table, Some(0));
    pool.release(attached.table);
    drop(pool);
    assert_eq!(attach(&mut rig.open(), &log).restored, 300);
}

#[test]
fn unusable_files_are_named_and_set_aside_and_a_fresh_one_takes_their_place() {
    type Expected = fn(&KvError) -> bool;
    let faults: [(&str, u64, u8, Expected); 3] = [
        ("another magic", 0, 0, |error| matches!(error, KvError::NotAPageFile { .. })),
        ("an older version", 8, 0, |error| matches!(error, KvError::Version { found: 0, supported: 2, .. })),
        ("a flipped header bit", 200, 1, |error| matches!(error, KvError::HeaderChecksum { .. })),
    ];
    for (name, offset, value, expected) in faults {
        let (mut rig, log, _) = written(100);
        change(&rig, offset, |_| value);
        let error = rig.try_open().unwrap_err();
        assert!(expected(&error) && error.is_recoverable(), "{name}: {error}");
        assert!(set_aside(&rig.path()).unwrap().to_string_lossy().ends_with("pages.kv.damaged-1"));
        let (mut pool, report) = rig.try_open().unwrap();
        assert!(report.created && report.pages == 0);
        rig.fill(&mut pool, &log, 0);
        drop(pool);
        assert_eq!(attach(&mut rig.open(), &log).restored, 100);
    }
}

#[test]
fn a_file_without_a_whole_header_is_truncated_and_a_second_one_set_aside_gets_its_own_name() {
    let (rig, ..) = written(10);
    for number in [1, 2] {
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(rig.path())
            .unwrap()
            .set_len(100)
            .unwrap();
        let error = rig.try_open().unwrap_err();
        assert!(matches!(error, KvError::Truncated { bytes: 100, .. }) && error.is_recoverable());
        let aside = set_aside(&rig.path()).unwrap();
        assert!(aside.to_string_lossy().ends_with(&format!(".damaged-{number}")));
    }
}

#[test]
fn another_models_pages_are_refused() {
    let (rig, ..) = written(10);
    let other = Identity { fingerprint: [9; 32], ..IDENTITY };
    let limits = Limits { quota_bytes: 1 << 20, ram_bytes: None };
    let error = PagePool::open(&rig.path(), other, LAYOUT, limits, Vec::new(), Vec::new()).unwrap_err();
    assert!(matches!(error, KvError::OtherIdentity { .. }) && error.to_string().contains("model"));
}

#[test]
fn a_second_opener_is_refused_while_the_first_lives() {
    let rig = Rig::new(8);
    let pool = rig.open();
    let error = rig.try_open().unwrap_err();
    assert!(matches!(error, KvError::Locked { .. }) && !error.is_recoverable());
    drop(pool);
    rig.open();
}

#[test]
fn entries_that_contradict_themselves_or_lost_their_parent_are_dropped_and_removed() {
    let (mut rig, log, slots) = written(300);
    rig.catalog.rows.get_mut(&slots[1]).unwrap().tokens[5] += 1;
    rig.catalog.rows.get_mut(&slots[4]).unwrap().parent = [7; 32];
    let (mut pool, report) = rig.try_open().unwrap();
    assert_eq!(
        report,
        OpenReport { pages: 1, dropped_orphans: 3, dropped_mismatched: 1, ..OpenReport::default() }
    );
    assert_eq!(attach(&mut pool, &log).restored, 64);
    rig.commit_removals(&mut pool);
    assert_eq!(rig.catalog.rows.len(), 1);
}

#[test]
fn unsynced_bytes_lost_with_power_never_reach_a_reader() {
    let mut rig = Rig::new(64);
    let log = tokens(1, 150);
    let mut pool = rig.open();
    rig.fill(&mut pool, &log[..100], 0);
    let mut table = attach(&mut pool, &log).table;
    compute(&mut pool, &mut table, &log).unwrap();
    let lost = pool.commit(&mut table, Tail::Synced).unwrap();
    lost.sync.sync(Durability::None).unwrap();
    let tail = lost.rows.last().unwrap().slot;
    drop((lost, pool));
    change(&rig, HEADER_BYTES + u64::from(tail) * 8192, |byte| !byte);
    assert_eq!(attach(&mut rig.open(), &log).restored, 100);
}

#[test]
fn a_tail_that_was_named_before_it_was_synced_costs_itself_when_power_goes() {
    let mut rig = Rig::new(64);
    let log = tokens(1, 150);
    let mut pool = rig.open();
    let mut table = attach(&mut pool, &log).table;
    compute(&mut pool, &mut table, &log[..100]).unwrap();
    let commit = pool.commit(&mut table, Tail::Named).unwrap();
    commit.sync.sync(Durability::Power).unwrap();
    rig.catalog.apply(&commit, Some(0));
    let tail = commit.rows.last().unwrap().slot;
    drop((commit, pool));
    // The process died and the bytes did not: all of it is there.
    assert_eq!(attach(&mut rig.open(), &log).restored, 100);
    change(&rig, HEADER_BYTES + u64::from(tail) * 8192, |byte| !byte);
    let mut pool = rig.open();
    let attached = attach(&mut pool, &log);
    assert_eq!((attached.restored, attached.damaged), (64, vec![tail]));
}

#[test]
fn every_byte_of_a_table_is_synced_once_it_is_sealed_or_its_turn_ends() {
    let rig = Rig::new(64);
    let mut pool = rig.open();
    let log = tokens(1, 150);
    let mut table = attach(&mut pool, &log).table;
    let mut synced = |pool: &mut PagePool, positions: usize, tail: Tail| -> usize {
        compute(pool, &mut table, &log[..positions]).unwrap();
        let commit = pool.commit(&mut table, tail).unwrap();
        let bytes = commit.sync.ranges.iter().map(|range| range.len).sum::<usize>();
        pool.acknowledge(commit.ticket);
        bytes / 8192
    };
    assert_eq!(synced(&mut pool, 50, Tail::Named), 0);
    assert_eq!(synced(&mut pool, 100, Tail::Named), 1, "the page that was sealed");
    assert_eq!(synced(&mut pool, 110, Tail::Named), 0);
    assert_eq!(synced(&mut pool, 110, Tail::Synced), 1, "the tail, though nothing was added to it");
    assert_eq!(synced(&mut pool, 110, Tail::Synced), 0);
    assert_eq!(synced(&mut pool, 120, Tail::Synced), 1);
    assert_eq!(synced(&mut pool, 150, Tail::Synced), 2, "the rest of one page, and the next");
}

#[test]
fn a_poisoned_pool_commits_nothing_more() {
    let mut rig = Rig::new(64);
    let mut pool = rig.open();
    rig.fill(&mut pool, &tokens(1, 10), 0);
    let mut table = attach(&mut pool, &tokens(1, 10)).table;
    let earlier = pool.commit(&mut table, Tail::Synced).unwrap();
    pool.poison();
    assert!(pool.is_poisoned());
    assert!(matches!(earlier.sync.sync(Durability::Power), Err(KvError::Poisoned { .. })));
    assert!(matches!(pool.commit(&mut table, Tail::Synced), Err(KvError::Poisoned { .. })));
    assert!(matches!(pool.commit_removals(), Err(KvError::Poisoned { .. })));
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_an_error_that_names_the_file_and_leaves_it_as_it_was() {
    // A tmpfs refuses at once what can never fit, so no disk is filled here: one page of this layout is a tebibyte.
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("pages.kv");
    let layout = PageLayout { layers: 1 << 17, kv_heads: 1 << 9, head_dim: 64, dtype: KvDtype::F16 };
    assert_eq!(layout.page_bytes(), 1 << 40);
    let limits = Limits { quota_bytes: u64::MAX, ram_bytes: None };
    let (mut pool, _) = PagePool::open(&path, IDENTITY, layout, limits, Vec::new(), Vec::new()).unwrap();
    let mut table = pool.attach(Realm::default(), &[]).table;
    match pool.reserve(&mut table, 1) {
        Err(KvError::NoSpace { bytes, .. }) => assert_eq!(bytes, 1 << 40),
        other => panic!("unexpected {other:?}"),
    }
    assert!(table.is_empty() && table.blanks.is_empty());
    assert_eq!(std::fs::metadata(&path).unwrap().len(), HEADER_BYTES);
}
