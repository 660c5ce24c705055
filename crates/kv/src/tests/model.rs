//! Random lives of sessions against a simple model: whatever happens, no reader ever sees KV of other tokens, and what
//! was committed is there again after a crash unless it was evicted or damaged.

use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;

use super::*;

const SESSIONS: usize = 4;

/// Two sessions share pages with each other, and none with the other two.
fn realm(session: usize) -> Realm {
    if session < 2 { Realm::default() } else { Realm::named(&["others"]) }
}

#[derive(Clone, Debug)]
enum Operation {
    Append {
        session: usize,
        count: usize,
        flavour: u32,
    },
    /// Restores what is known and computes up to `count` more positions of the log.
    Step {
        session: usize,
        count: usize,
    },
    Commit {
        session: usize,
    },
    /// The oldest commit on its way becomes durable.
    Acknowledge,
    /// The newest commit on its way fails.
    Withdraw,
    End {
        session: usize,
    },
    Fork {
        from: usize,
        to: usize,
    },
    Rewind {
        session: usize,
        keep_percent: usize,
    },
    Park {
        session: usize,
    },
    Pin {
        session: usize,
        pinned: bool,
    },
    Delete {
        session: usize,
    },
    Crash {
        durable: usize,
        scramble: bool,
    },
    /// A crash, and one bit of a committed page is flipped.
    Damage {
        page: usize,
        byte: usize,
    },
    /// A crash, and the file loses its end.
    Cut {
        slots: u64,
    },
}

fn operation() -> impl Strategy<Value = Operation> {
    use Operation::*;
    let session = 0..SESSIONS;
    prop_oneof![
        6 => (session.clone(), 1..150usize, 0..2u32)
            .prop_map(|(session, count, flavour)| Append { session, count, flavour }),
        8 => (session.clone(), 1..200usize).prop_map(|(session, count)| Step { session, count }),
        6 => session.clone().prop_map(|session| Commit { session }),
        5 => Just(Acknowledge),
        1 => Just(Withdraw),
        3 => session.clone().prop_map(|session| End { session }),
        2 => (session.clone(), session.clone()).prop_map(|(from, to)| Fork { from, to }),
        2 => (session.clone(), 0..100usize)
            .prop_map(|(session, keep_percent)| Rewind { session, keep_percent }),
        1 => session.clone().prop_map(|session| Park { session }),
        1 => (session.clone(), any::<bool>()).prop_map(|(session, pinned)| Pin { session, pinned }),
        1 => session.prop_map(|session| Delete { session }),
        2 => (0..4usize, any::<bool>()).prop_map(|(durable, scramble)| Crash { durable, scramble }),
    ]
}

fn fault() -> impl Strategy<Value = Operation> {
    prop_oneof![
        10 => operation(),
        1 => (any::<usize>(), any::<usize>()).prop_map(|(page, byte)| Operation::Damage { page, byte }),
        1 => (1..6u64).prop_map(|slots| Operation::Cut { slots }),
    ]
}

#[derive(Default)]
struct Session {
    log: Vec<u32>,
    table: Option<BlockTable>,
    /// The tokens whose KV the catalog's leaf stands for.
    durable: Vec<u32>,
}

struct OnItsWay {
    commit: PendingCommit,
    session: Option<usize>,
    tokens: Vec<u32>,
}

struct World {
    rig: Rig,
    pool: PagePool,
    sessions: [Session; SESSIONS],
    on_their_way: VecDeque<OnItsWay>,
    /// Nothing was evicted or damaged so far: all that was committed must be found.
    lossless: bool,
}

impl World {
    fn new(quota_slots: u64) -> World {
        let rig = Rig::new(quota_slots);
        let pool = rig.open();
        World { rig, pool, sessions: Default::default(), on_their_way: VecDeque::new(), lossless: true }
    }

    fn run(&mut self, operation: &Operation) {
        match *operation {
            Operation::Append { session, count, flavour } => {
                let log = &mut self.sessions[session].log;
                let start = log.len();
                log.extend((start..start + count).map(|position| position as u32 % 7 + flavour * 100));
            }
            Operation::Step { session, count } => self.step(session, count),
            Operation::Commit { session } => self.commit(session),
            Operation::Acknowledge => self.acknowledge_oldest(),
            Operation::Withdraw => {
                if let Some(failed) = self.on_their_way.pop_back() {
                    self.pool.withdraw(failed.commit.ticket);
                }
            }
            Operation::End { session } => self.end(session),
            Operation::Fork { from, to } => {
                if from != to {
                    self.delete(to);
                    self.sessions[to].log = self.sessions[from].log.clone();
                    self.step(to, 0);
                    self.commit(to);
                    self.end(to);
                }
            }
            Operation::Rewind { session, keep_percent } => {
                let Session { log, table, .. } = &mut self.sessions[session];
                log.truncate(log.len() * keep_percent / 100);
                if let Some(table) = table {
                    self.pool.truncate(table, table.len().min(log.len()));
                }
            }
            Operation::Park { session } => {
                let log = &self.sessions[session].log;
                let before = self.pool.find(realm(session), log);
                let released = self.pool.park(realm(session), log);
                let after = self.pool.find(realm(session), log);
                assert_eq!(before.tokens(), after.tokens());
                assert!(after.resident_bytes() + released <= before.resident_bytes());
            }
            Operation::Pin { session, pinned: true } => {
                let leaf = self.rig.catalog.leaves.get(&session).and_then(|(leaf, _)| *leaf);
                self.pool.keep(&name(session), leaf);
                self.rig.catalog.pinned.insert(session);
            }
            Operation::Pin { session, pinned: false } => {
                self.pool.let_go(&name(session));
                self.rig.catalog.pinned.remove(&session);
            }
            Operation::Delete { session } => self.delete(session),
            Operation::Crash { durable, scramble } => self.crash(durable, |world| {
                if scramble {
                    world.scramble_what_nobody_names();
                }
            }),
            Operation::Damage { page, byte } => self.crash(0, |world| world.damage(page, byte)),
            Operation::Cut { slots } => self.crash(0, |world| {
                let file = OpenOptions::new().write(true).open(world.rig.path()).unwrap();
                let length = file.metadata().unwrap().len();
                file.set_len(length.saturating_sub(slots * 8192 - 100).max(4096)).unwrap();
                world.lossless = false;
            }),
        }
        self.check();
    }

    fn step(&mut self, index: usize, count: usize) {
        let session = &mut self.sessions[index];
        let mut table = session.table.take().unwrap_or_else(|| {
            let mut attached = attach_in(realm(index), &mut self.pool, &session.log);
            let same = session.durable.iter().zip(&session.log).take_while(|(a, b)| a == b).count();
            if self.lossless {
                assert!(attached.restored >= same, "{} of {same} restored", attached.restored);
                assert!(attached.damaged.is_empty());
            }
            let leaf = self.rig.catalog.leaves.get(&index).and_then(|(leaf, _)| *leaf);
            self.pool.set_claim(&mut attached.table, &name(index), leaf);
            attached.table
        });
        let target = (table.len() + count).min(session.log.len());
        let log = session.log[..target].to_vec();
        for _ in 0..3 {
            match compute(&mut self.pool, &mut table, &log) {
                Err(KvError::AwaitingRemovals { .. }) => {
                    while !self.on_their_way.is_empty() {
                        self.acknowledge_oldest();
                    }
                    self.rig.commit_removals(&mut self.pool);
                }
                Ok(()) | Err(KvError::Full { .. }) => break,
                Err(other) => panic!("{other}"),
            }
        }
        check(&self.pool, &table, &log);
        self.sessions[index].table = Some(table);
    }

    fn commit(&mut self, index: usize) {
        let session = &mut self.sessions[index];
        if let Some(table) = &mut session.table {
            // Whether a tail is synced makes no difference to what a dead process leaves.
            let tail = if index.is_multiple_of(2) { Tail::Named } else { Tail::Synced };
            let commit = self.pool.commit(table, tail).unwrap();
            let tokens = session.log[..table.len()].to_vec();
            assert_eq!(commit.kv_len, tokens.len());
            self.on_their_way.push_back(OnItsWay { commit, session: Some(index), tokens });
        }
    }

    fn acknowledge_oldest(&mut self) {
        if let Some(done) = self.on_their_way.pop_front() {
            self.make_durable(&done);
            self.pool.acknowledge(done.commit.ticket);
        }
    }

    fn make_durable(&mut self, done: &OnItsWay) {
        self.rig.catalog.apply(&done.commit, done.session);
        if let Some(session) = done.session {
            self.sessions[session].durable = done.tokens.clone();
        }
    }

    fn end(&mut self, index: usize) {
        if let Some(table) = self.sessions[index].table.take() {
            self.pool.release(table);
        }
    }

    fn delete(&mut self, index: usize) {
        while !self.on_their_way.is_empty() {
            self.acknowledge_oldest();
        }
        self.end(index);
        self.pool.let_go(&name(index));
        self.rig.catalog.pinned.remove(&index);
        if let Some((Some(leaf), _)) = self.rig.catalog.leaves.remove(&index) {
            self.pool.unclaim(leaf, true);
        }
        self.sessions[index] = Session::default();
    }

    /// The process dies after the first `durable` commits on their way reached the catalog.
    fn crash(&mut self, durable: usize, meanwhile: impl FnOnce(&mut World)) {
        for done in std::mem::take(&mut self.on_their_way).into_iter().take(durable) {
            self.make_durable(&done);
        }
        for session in &mut self.sessions {
            session.table = None;
        }
        // The old pool must let go of the file before it can be opened again.
        let elsewhere = Rig::new(1);
        self.pool = elsewhere.open();
        meanwhile(self);
        self.pool = self.rig.open();
    }

    /// What a power cut may do to bytes that were never synced.
    fn scramble_what_nobody_names(&self) {
        let file = OpenOptions::new().read(true).write(true).open(self.rig.path()).unwrap();
        let slots = (file.metadata().unwrap().len() - 4096) / 8192;
        for slot in 0..slots {
            let start = 4096 + slot * 8192;
            let used = self.rig.catalog.rows.get(&(slot as u32)).map_or(0, |row| row.tokens.len());
            let mut page = vec![0; LAYOUT.page_bytes()];
            file.read_exact_at(&mut page, start).unwrap();
            let mut garbage = vec![0xa5; LAYOUT.page_bytes()];
            for held in LAYOUT.held(used) {
                garbage[held.clone()].copy_from_slice(&page[held]);
            }
            file.write_all_at(&garbage, start).unwrap();
        }
    }

    fn damage(&mut self, page: usize, byte: usize) {
        let rows: Vec<&PageRow> = self.rig.catalog.rows.values().collect();
        if rows.is_empty() {
            return;
        }
        let offset = 4096 + u64::from(rows[page % rows.len()].slot) * 8192 + byte as u64 % 8192;
        let file = OpenOptions::new().read(true).write(true).open(self.rig.path()).unwrap();
        let mut bytes = [0];
        // The page may have been cut off already.
        if file.read_at(&mut bytes, offset).unwrap() == 1 {
            file.write_all_at(&[bytes[0] ^ 1], offset).unwrap();
        }
        self.lossless = false;
    }

    fn check(&mut self) {
        self.lossless &= self.pool.stats().evictions == 0;
        let tables: Vec<&BlockTable> =
            self.sessions.iter().filter_map(|session| session.table.as_ref()).collect();
        check_pool(&self.pool, &tables);
        if self.lossless {
            assert!(self.pool.verify_all().damaged.is_empty());
        }
    }

    fn finish(mut self) {
        while !self.on_their_way.is_empty() {
            self.acknowledge_oldest();
        }
        self.crash(0, |_| {});
        for session in 0..SESSIONS {
            self.step(session, usize::MAX / 2);
            // One may push out what the next one had.
            self.check();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn committed_kv_survives_crashes_and_is_never_mixed_up(
        operations in prop::collection::vec(operation(), 1..60),
    ) {
        let mut world = World::new(4096);
        for operation in &operations {
            world.run(operation);
        }
        world.finish();
    }

    #[test]
    fn no_reader_sees_wrong_kv_when_pages_are_evicted_damaged_or_cut_off(
        operations in prop::collection::vec(fault(), 1..60),
        quota_slots in 6..24u64,
    ) {
        let mut world = World::new(quota_slots);
        for operation in &operations {
            world.run(operation);
        }
        world.finish();
    }
}
