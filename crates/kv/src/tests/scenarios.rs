//! What sequences, sessions and the quota do to pages, one behaviour at a time.

use super::*;
use dormouse_store::Durability;

use crate::VerifyReport;

fn tokens(seed: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|position| position * 7 + seed * 1000).collect()
}

#[test]
fn committed_pages_are_restored_after_reopening() {
    let mut rig = Rig::new(64);
    let log = tokens(1, 200);
    let mut pool = rig.open();
    let commit = rig.fill(&mut pool, &log, 0);
    assert_eq!(commit.rows.iter().map(|row| row.tokens.len()).collect::<Vec<_>>(), [64, 64, 64, 8]);
    assert_eq!((commit.leaf_slot, commit.kv_len), (Some(commit.rows[3].slot), 200));
    drop((pool, commit));

    let (mut pool, report) = rig.try_open().unwrap();
    assert_eq!(report, OpenReport { pages: 4, ..OpenReport::default() });
    let attached = attach(&mut pool, &log);
    assert_eq!((attached.restored, attached.damaged.len()), (200, 0));
    pool.release(attached.table);
    assert_eq!(attach(&mut pool, &log[..130]).restored, 130);
    assert_eq!(pool.verify_all(), VerifyReport { pages: 4, bytes: 200 * 128, damaged: Vec::new() });
}

#[test]
fn an_open_tail_grows_in_place_and_its_entry_is_replaced() {
    let mut rig = Rig::new(64);
    let log = tokens(1, 80);
    let mut pool = rig.open();
    let first = rig.fill(&mut pool, &log[..70], 0);
    let second = rig.fill(&mut pool, &log, 0);
    assert_eq!(second.rows.len(), 1);
    assert_eq!(second.rows[0].slot, first.rows[1].slot);
    assert_eq!(pool.stats().copies_on_write, 0);
    drop((pool, first, second));
    assert_eq!(attach(&mut rig.open(), &log).restored, 80);
}

#[test]
fn two_sequences_with_a_common_prefix_share_full_pages_and_copy_the_tail() {
    let mut rig = Rig::new(64);
    let mut pool = rig.open();
    let log = tokens(1, 100);
    rig.fill(&mut pool, &log, 0);
    let mut left = log.clone();
    left.extend(tokens(2, 50));
    let mut right = log.clone();
    right.extend(tokens(3, 50));

    let mut left_table = attach(&mut pool, &left).table;
    let mut right_table = attach(&mut pool, &right).table;
    compute(&mut pool, &mut left_table, &left).unwrap();
    compute(&mut pool, &mut right_table, &right).unwrap();
    check(&pool, &left_table, &left);
    check(&pool, &right_table, &right);
    assert_eq!(left_table.nodes[0], right_table.nodes[0]);
    assert_ne!(left_table.nodes[1], right_table.nodes[1]);
    assert_eq!(pool.stats().copies_on_write, 1);
    check_pool(&pool, &[&left_table, &right_table]);
}

#[test]
fn sequences_that_compute_the_same_page_at_once_end_with_one() {
    let mut rig = Rig::new(64);
    let mut pool = rig.open();
    let log = tokens(1, 128);
    let mut first = attach(&mut pool, &log).table;
    let mut second = attach(&mut pool, &log).table;
    compute(&mut pool, &mut first, &log[..40]).unwrap();
    compute(&mut pool, &mut second, &log[..50]).unwrap();
    compute(&mut pool, &mut first, &log).unwrap();
    compute(&mut pool, &mut second, &log).unwrap();
    assert_eq!(first.nodes, second.nodes);
    assert_eq!(pool.stats().deduplicated, 2);
    check(&pool, &second, &log);
    check_pool(&pool, &[&first, &second]);
    assert_eq!(rig.commit(&mut pool, &mut second, None).rows.len(), 2);
    assert_eq!(rig.commit(&mut pool, &mut first, None).rows.len(), 0);
}

#[test]
fn a_named_page_outlives_its_twin_that_the_catalog_does_not_know_yet() {
    let mut rig = Rig::new(64);
    let mut pool = rig.open();
    let log = tokens(1, 64);
    rig.fill(&mut pool, &log[..30], 0);
    let mut first = attach(&mut pool, &log).table;
    let mut second = attach(&mut pool, &log).table;
    compute(&mut pool, &mut first, &log[..31]).unwrap();
    compute(&mut pool, &mut second, &log).unwrap();
    compute(&mut pool, &mut first, &log).unwrap();
    assert_eq!(first.nodes, second.nodes);
    rig.commit_removals(&mut pool);
    drop(pool);
    assert_eq!(attach(&mut rig.open(), &log).restored, 30);
}

#[test]
fn a_rewound_table_writes_other_tokens_without_touching_what_the_catalog_names() {
    let mut rig = Rig::new(64);
    let mut pool = rig.open();
    let log = tokens(1, 100);
    let mut table = attach(&mut pool, &log).table;
    compute(&mut pool, &mut table, &log).unwrap();
    rig.commit(&mut pool, &mut table, None);
    pool.truncate(&mut table, 90);
    let mut other = log[..90].to_vec();
    other.extend(tokens(9, 30));
    compute(&mut pool, &mut table, &other).unwrap();
    check(&pool, &table, &other);
    check_pool(&pool, &[&table]);
    pool.release(table);
    drop(pool);
    assert_eq!(attach(&mut rig.open(), &log).restored, 100);
}

#[test]
fn refused_drafts_leave_no_pages_behind() {
    let rig = Rig::new(64);
    let mut pool = rig.open();
    let log = tokens(1, 200);
    let mut table = attach(&mut pool, &log).table;
    compute(&mut pool, &mut table, &log[..100]).unwrap();
    pool.truncate(&mut table, 70);
    compute(&mut pool, &mut table, &log).unwrap();
    pool.truncate(&mut table, 128);
    assert_eq!((pool.stats().slots_used, pool.stats().copies_on_write), (2, 0));
    check(&pool, &table, &log);
    check_pool(&pool, &[&table]);
}

#[test]
fn eviction_takes_what_no_session_claims_before_what_one_does_and_never_what_is_in_use() {
    let mut rig = Rig::new(8);
    let mut pool = rig.open();
    for session in [0, 1, 2] {
        rig.fill(&mut pool, &tokens(session, 128), session as usize);
    }
    let leaf = rig.catalog.leaves[&1].0.unwrap();
    pool.unclaim(leaf, false);
    rig.catalog.leaves.remove(&1);
    let pinned = attach(&mut pool, &tokens(0, 128)).table;

    let new = tokens(5, 256);
    let mut table = attach(&mut pool, &new).table;
    assert!(matches!(
        pool.reserve(&mut table, 256),
        Err(KvError::AwaitingRemovals { needed: 4, evicted: 2 })
    ));
    rig.commit_removals(&mut pool);
    compute(&mut pool, &mut table, &new).unwrap();
    let restored = |pool: &PagePool, seed| pool.find(Realm::default(), &tokens(seed, 128)).tokens();
    assert_eq!([restored(&pool, 0), restored(&pool, 1), restored(&pool, 2)], [128, 0, 128]);
    check_pool(&pool, &[&pinned, &table]);

    let mut third = attach(&mut pool, &[]).table;
    match pool.reserve(&mut third, 3 * 64) {
        Err(KvError::Full { needed: 3, slots: 8, quota_slots: 8, pinned: 6 }) => {}
        other => panic!("unexpected {other:?}"),
    }
    assert_eq!(restored(&pool, 2), 128, "a request that cannot be met evicts nothing");
}

/// Restorable tokens of three sequences of two pages each, after a fourth one took two pages of the six there are.
fn left_of_three(prepare: impl FnOnce(&mut Rig, &mut PagePool)) -> [usize; 3] {
    let mut rig = Rig::new(6);
    let mut pool = rig.open();
    for session in [0, 1, 2] {
        rig.fill(&mut pool, &tokens(session, 128), session as usize);
    }
    prepare(&mut rig, &mut pool);
    let new = tokens(5, 128);
    let mut table = attach(&mut pool, &new).table;
    assert!(matches!(pool.reserve(&mut table, 128), Err(KvError::AwaitingRemovals { evicted: 2, .. })));
    rig.commit_removals(&mut pool);
    compute(&mut pool, &mut table, &new).unwrap();
    check_pool(&pool, &[&table]);
    [0, 1, 2].map(|seed| pool.find(Realm::default(), &tokens(seed, 128)).tokens())
}

#[test]
fn the_least_recently_used_session_loses_its_pages_and_a_kept_one_only_when_there_are_no_others() {
    assert_eq!(left_of_three(|_, _| {}), [0, 128, 128]);
    let keep = |rig: &Rig, pool: &mut PagePool, session: usize| {
        pool.keep(&name(session), rig.catalog.leaves[&session].0);
    };
    assert_eq!(left_of_three(|rig, pool| keep(rig, pool, 0)), [128, 0, 128]);
    let let_go = |rig: &mut Rig, pool: &mut PagePool| {
        keep(rig, pool, 0);
        pool.let_go(&name(0));
    };
    assert_eq!(left_of_three(let_go), [0, 128, 128]);
    let all = |rig: &mut Rig, pool: &mut PagePool| (0..3).for_each(|session| keep(rig, pool, session));
    assert_eq!(left_of_three(all), [0, 128, 128]);
    // As a restart finds it, in the order in which sessions were used.
    let restart = |rig: &mut Rig, pool: &mut PagePool| {
        rig.catalog.pinned.insert(0);
        *pool = Rig::new(1).open();
        *pool = rig.open();
    };
    assert_eq!(left_of_three(restart), [128, 0, 128]);
}

#[test]
fn what_is_kept_of_a_session_is_what_its_next_table_claims() {
    let mut rig = Rig::new(8);
    let mut pool = rig.open();
    let log = tokens(0, 70);
    rig.fill(&mut pool, &log, 0);
    // Whoever pins it looked at its row before that commit.
    pool.keep(&name(0), None);
    let mut table = attach(&mut pool, &log).table;
    pool.set_claim(&mut table, &name(0), rig.catalog.leaves[&0].0);
    check_pool(&pool, &[&table]);
    pool.release(table);
}

#[test]
fn what_was_just_used_outlives_what_a_session_claims_and_has_not_used_for_long() {
    let unclaim_last = |rig: &mut Rig, pool: &mut PagePool| {
        pool.unclaim(rig.catalog.leaves.remove(&2).unwrap().0.unwrap(), false);
    };
    assert_eq!(left_of_three(unclaim_last), [128, 128, 0]);
    let used_since = |rig: &mut Rig, pool: &mut PagePool| {
        unclaim_last(rig, pool);
        for _ in 0..40 {
            let table = attach(pool, &tokens(2, 128)).table;
            pool.release(table);
        }
    };
    assert_eq!(left_of_three(used_since), [0, 128, 128]);
}

#[test]
fn of_pages_unused_for_as_long_the_ones_that_are_cheapest_to_compute_go() {
    let mut rig = Rig::new(8);
    let mut pool = rig.open();
    // Five pages on one path, the last one not full, and two on another.
    rig.fill(&mut pool, &tokens(1, 300), 0);
    rig.fill(&mut pool, &tokens(2, 128), 1);
    let (long, short) = (attach(&mut pool, &tokens(1, 300)).table, attach(&mut pool, &tokens(2, 128)).table);
    for table in [long, short] {
        pool.release(table);
    }
    // So long ago that it does not matter which of them came first.
    for _ in 0..1000 {
        let other = attach(&mut pool, &[]).table;
        pool.release(other);
    }
    pool.set_cost_doubles_at(640.0);
    let mut restored = Vec::new();
    for wanted in [2, 3] {
        assert_eq!(pool.evict_until(wanted), 1);
        rig.commit_removals(&mut pool);
        restored.push([1, 2].map(|seed| pool.find(Realm::default(), &tokens(seed, 300)).tokens()));
    }
    // First the page that is not full, though it lies deepest; then a shallow one before a deep one.
    assert_eq!(restored, [[256, 128], [256, 64]]);
}

#[test]
fn a_removed_pages_slot_is_not_written_before_the_removal_is_acknowledged() {
    let mut rig = Rig::new(2);
    let mut pool = rig.open();
    rig.fill(&mut pool, &tokens(1, 128), 0);
    let mut table = attach(&mut pool, &[]).table;
    assert!(matches!(pool.reserve(&mut table, 1), Err(KvError::AwaitingRemovals { .. })));
    assert!(matches!(pool.reserve(&mut table, 1), Err(KvError::AwaitingRemovals { .. })));
    let commit = pool.commit_removals().unwrap().unwrap();
    assert!(matches!(pool.reserve(&mut table, 1), Err(KvError::AwaitingRemovals { .. })));
    pool.withdraw(commit.ticket);
    rig.commit_removals(&mut pool);
    pool.reserve(&mut table, 1).unwrap();
    check_pool(&pool, &[&table]);
}

#[test]
fn deleting_a_session_removes_the_pages_that_nobody_else_uses() {
    let mut rig = Rig::new(64);
    let mut pool = rig.open();
    let shared = tokens(1, 64);
    let own = |seed| [shared.clone(), tokens(seed, 100)].concat();
    rig.fill(&mut pool, &own(2), 0);
    rig.fill(&mut pool, &own(3), 1);
    pool.unclaim(rig.catalog.leaves.remove(&0).unwrap().0.unwrap(), true);
    rig.commit_removals(&mut pool);
    assert_eq!(pool.find(Realm::default(), &own(2)).tokens(), 64);
    assert_eq!(pool.find(Realm::default(), &own(3)).tokens(), 164);
    pool.unclaim(rig.catalog.leaves.remove(&1).unwrap().0.unwrap(), true);
    rig.commit_removals(&mut pool);
    assert_eq!((pool.stats().slots_used, rig.catalog.rows.len()), (0, 0));
    check_pool(&pool, &[]);
}

#[test]
fn a_session_that_goes_on_moves_its_claim() {
    let mut rig = Rig::new(64);
    let mut pool = rig.open();
    let log = tokens(1, 200);
    rig.fill(&mut pool, &log[..64], 0);
    rig.fill(&mut pool, &log, 0);
    assert_eq!(pool.stats().slots_claimed, 1);
    assert_eq!(pool.leaf_of(Realm::default(), &log), rig.catalog.leaves[&0]);
    let (leaf, kv_len) = pool.leaf_of(Realm::default(), &log[..150]);
    assert_eq!(kv_len, 150);
    pool.claim(leaf.unwrap()).unwrap();
    assert_eq!(pool.stats().slots_claimed, 2);
    assert!(matches!(pool.claim(63), Err(KvError::UnknownPage { slot: 63, .. })));
}

#[test]
fn a_withdrawn_commit_is_repeated_whole_by_the_next() {
    let mut rig = Rig::new(64);
    let mut pool = rig.open();
    let log = tokens(1, 100);
    let mut table = attach(&mut pool, &log).table;
    pool.set_claim(&mut table, &name(0), None);
    compute(&mut pool, &mut table, &log).unwrap();
    let failed = pool.commit(&mut table, Tail::Synced).unwrap();
    pool.withdraw(failed.ticket);
    assert_eq!(pool.stats().slots_claimed, 0);
    assert_eq!(pool.leaf_of(Realm::default(), &log), (None, 0));
    let again = rig.commit(&mut pool, &mut table, Some(0));
    assert_eq!(again.rows, failed.rows);
    assert_eq!(pool.stats().slots_claimed, 1);
}

#[test]
fn pages_never_move_when_the_file_grows() {
    // Two extents and a little: slots of 8 KiB, 8192 of them in an extent.
    let rig = Rig::new(20_000);
    let mut pool = rig.open();
    let mut table = attach(&mut pool, &[]).table;
    pool.reserve(&mut table, 64).unwrap();
    let (mut before, mut after) = (Vec::new(), Vec::new());
    pool.page_ptrs(&table, &mut before);
    pool.reserve(&mut table, 17_000 * 64).unwrap();
    pool.page_ptrs(&table, &mut after);
    assert_eq!((before[0].as_ptr(), after.len()), (after[0].as_ptr(), 17_000));
    assert_eq!(pool.stats().slots_total, 20_000);
    // SAFETY: the last reserved page is mapped and this table's alone.
    unsafe { after[16_999].as_ptr().write_bytes(1, LAYOUT.page_bytes()) };
    pool.release(table);
    check_pool(&pool, &[]);
}

#[test]
fn pages_beyond_the_ram_budget_leave_it_in_the_order_of_their_last_use() {
    let mut rig = Rig::new(64);
    rig.ram_bytes = Some(10 * LAYOUT.page_bytes() as u64);
    let mut pool = rig.open();
    let logs: Vec<Vec<u32>> = (0..4).map(|session| tokens(session, 64 * 4)).collect();
    for (session, log) in logs.iter().enumerate() {
        rig.fill(&mut pool, log, session);
        let fits = pool.stats().slots_in_ram <= 10;
        assert_eq!(pool.over_budget().is_none(), fits, "after session {session}");
        assert!(pool.stats().slots_in_ram <= 10);
    }
    assert!(pool.over_budget().is_none());
    let in_ram = |pool: &PagePool, log: &[u32]| {
        let path = pool.tree.walk(Realm::default(), log).slots;
        path.iter().filter(|slot| pool.tree.node(**slot).mapped).count()
    };
    let left: Vec<usize> = logs.iter().map(|log| in_ram(&pool, log)).collect();
    assert_eq!((left[0], left[2], left[3]), (0, 4, 4));
    // All of it is still there, and what is used stays.
    let held = attach(&mut pool, &logs[0]);
    assert_eq!(held.restored, 256);
    let out = pool.over_budget().unwrap();
    out.carry_out();
    assert_eq!(in_ram(&pool, &logs[0]), 4);
    check(&pool, &held.table, &logs[0]);
    pool.release(held.table);
    for log in &logs {
        let attached = attach(&mut pool, log);
        assert_eq!((attached.restored, attached.damaged.len()), (256, 0));
        pool.release(attached.table);
    }
}

#[test]
fn parking_gives_ram_back_and_attaching_counts_what_was_read() {
    let mut rig = Rig::new(1000);
    let log = tokens(1, 64 * 500);
    let mut pool = rig.open();
    let commit = rig.fill(&mut pool, &log, 0);
    commit.sync.sync(Durability::Power).unwrap();
    let resident = pool.find(Realm::default(), &log).resident_bytes();
    assert_eq!(resident, 500 * 8192);

    let pinned = attach(&mut pool, &log[..64]).table;
    let released = pool.park(Realm::default(), &log);
    let found = pool.find(Realm::default(), &log);
    assert_eq!((found.tokens(), found.resident_bytes() + released), (log.len(), resident));
    if !rig.is_in_ram() {
        assert!(found.resident_bytes() < 64 << 10, "{found:?}");
    }
    pool.release(pinned);

    let attached = attach(&mut pool, &log);
    assert_eq!(attached.restored, log.len());
    assert_eq!(attached.bytes_read, found.missing_bytes());
    pool.release(attached.table);
    assert_eq!(attach(&mut pool, &log).bytes_read, 0);
}

#[test]
fn pages_come_in_from_the_last_to_the_first_that_was_not_computed_meanwhile() {
    let mut rig = Rig::new(1000);
    if rig.is_in_ram() {
        return;
    }
    let log = tokens(1, 64 * 500);
    let mut pool = rig.open();
    rig.fill(&mut pool, &log, 0);
    let find = |pool: &PagePool, log: &[u32]| pool.find(Realm::default(), log);
    assert!(pool.page_in(&find(&pool, &log)).is_none(), "all of it is in RAM");

    let first = attach(&mut pool, &log[..64]).table;
    pool.park(Realm::default(), &log);
    let found = find(&pool, &log);
    let page_in = pool.page_in(&found).unwrap();
    assert_eq!(page_in.missing_bytes(), found.missing_bytes());
    assert_eq!(page_in.first() + page_in.unread(), 500);
    assert!(page_in.first() > 0, "the page in use stayed");
    assert!(!page_in.computed(300));
    let read_all = || (0..).take_while(|_| page_in.read_last()).count();
    let reads = std::thread::scope(|scope| scope.spawn(read_all).join().unwrap() + read_all());
    assert_eq!(reads, 200, "the first 300 pages are not asked for");
    assert!(page_in.computed(300), "the two have met");
    let missing = find(&pool, &log[..64 * 300]).missing_bytes();
    assert_eq!(find(&pool, &log).missing_bytes(), missing, "the last 200 are there");
    assert!((1..=200 * 8192).contains(&page_in.bytes_read()), "{}", page_in.bytes_read());

    pool.park(Realm::default(), &log);
    let page_in = pool.page_in(&find(&pool, &log)).unwrap();
    assert!(page_in.read_first() && page_in.read_last());
    page_in.give_up();
    assert!(!page_in.read_first() && !page_in.read_last());
    pool.release(first);
}

#[test]
fn a_page_that_was_computed_again_is_not_read_from_disk() {
    let mut rig = Rig::new(64);
    let log = tokens(1, 128);
    let mut pool = rig.open();
    let second = rig.fill(&mut pool, &log, 0).rows[1].slot;
    drop(pool);
    if rig.is_in_ram() {
        return;
    }
    // What would be found on disk is wrong, so that a read would show.
    let damaged = vec![0xAA; 8192];
    let file = std::fs::OpenOptions::new().write(true).open(rig.path()).unwrap();
    let offset = crate::header::HEADER_BYTES as u64 + u64::from(second) * 8192;
    std::os::unix::fs::FileExt::write_all_at(&file, &damaged, offset).unwrap();
    file.sync_all().unwrap();

    let mut pool = rig.open();
    let mut table = attach(&mut pool, &log[..64]).table;
    pool.park(Realm::default(), &log);
    compute(&mut pool, &mut table, &log).unwrap();
    check(&pool, &table, &log);
    assert_eq!(table.nodes[1], second, "the page that the catalog names is used again");
    let stats = pool.stats();
    assert_eq!((stats.deduplicated, stats.damaged), (1, 0));
    pool.release(table);
    assert_eq!(attach(&mut pool, &log).restored, 128);
    drop(pool);
    assert_eq!(rig.open().verify_all().damaged, [0u32; 0]);
}

#[test]
fn a_pool_can_move_to_the_engine_thread_and_its_syncs_to_another() {
    fn is_send<T: Send>() {}
    is_send::<PagePool>();
    is_send::<BlockTable>();
    is_send::<PendingCommit>();
}

#[test]
fn realms_share_nothing_and_know_their_own_pages_after_opening() {
    let mut rig = Rig::new(64);
    let (ann, bob) = (Realm::named(&["ann"]), Realm::named(&["bob"]));
    let log = tokens(5, 150);
    let mut pool = rig.open();
    for (session, realm) in [Realm::default(), ann, bob].into_iter().enumerate() {
        let Attached { mut table, restored, .. } = attach_in(realm, &mut pool, &log);
        assert_eq!(restored, 0);
        pool.set_claim(&mut table, &name(0), None);
        compute(&mut pool, &mut table, &log[..150 - session]).unwrap();
        rig.commit(&mut pool, &mut table, Some(session));
        pool.release(table);
    }
    drop(pool);
    let (mut pool, report) = rig.try_open().unwrap();
    assert_eq!((report.pages, report.dropped_orphans), (9, 0));
    for (realm, known) in [(Realm::default(), 150), (ann, 149), (bob, 148), (Realm::named(&["eve"]), 0)] {
        assert_eq!(attach_in(realm, &mut pool, &log).restored, known);
    }
    // A page of nobody's is still told from a realm's first page.
    rig.catalog.rows.retain(|_, row| row.tokens[..] != log[..64] || row.parent != rig_root(&pool, bob));
    drop(pool);
    let (pool, report) = rig.try_open().unwrap();
    assert_eq!((report.pages, report.dropped_orphans), (6, 2));
    assert_eq!(pool.find(bob, &log).tokens(), 0);
}

fn rig_root(pool: &PagePool, realm: Realm) -> [u8; 32] {
    pool.tree.chain.root(realm).0
}
