//! [`Engine`]: the handle through which everyone else speaks to the engine thread.

use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use dormouse_grammar::{Compiler, Grammar, GrammarError, GrammarRequest};
use dormouse_kernels::Cpu;
use dormouse_kv::{Limits, PagePool, Realm};
use dormouse_models::{Backend, Model, TokenId};
use dormouse_store::{Durability, Store};
use tokio::sync::oneshot;

use crate::condition::Condition;
use crate::faults::Faults;
use crate::outbox::Outbox;
use crate::supervisor::{Line, Reopen, Supervisor};
use crate::watchdog;
use crate::worker::{Command, Parts, Worker};
use crate::{DraftSource, EngineError, EngineStats, Listener, Receipt, Speculation, TurnSpec};

/// A durable session's hold on a path of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The path's last page; None when no page matches.
    pub leaf_slot: Option<u32>,
    /// Positions of the session's log that the path covers.
    pub kv_len: usize,
}

/// One model being served. Cheap to clone; the engine stops with its last handle.
#[derive(Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

/// How long a step, a commit, or reading a page may take unless the options say otherwise.
pub const DEFAULT_STUCK_AFTER: Duration = Duration::from_secs(30);

/// How an engine behaves.
pub struct EngineOptions {
    /// Who guesses tokens ahead.
    pub drafts: DraftSource,
    /// Opens the page file and its catalog again after the engine thread panicked; without it the engine then stays down.
    pub reopen: Option<Reopen>,
    /// A step, a commit, or reading a page, that lasts longer turns health red.
    pub stuck_after: Duration,
    pub faults: Faults,
}

impl From<DraftSource> for EngineOptions {
    fn from(drafts: DraftSource) -> EngineOptions {
        EngineOptions { drafts, reopen: None, stuck_after: DEFAULT_STUCK_AFTER, faults: Faults::default() }
    }
}

impl From<Speculation> for EngineOptions {
    fn from(speculation: Speculation) -> EngineOptions {
        DraftSource::from(speculation).into()
    }
}

/// How long statistics may take; an engine whose step is stuck answers none.
const STATS_PATIENCE: Duration = Duration::from_secs(2);

struct Inner {
    model: Arc<Model>,
    page_file: i64,
    line: Arc<Line>,
    condition: Arc<Condition>,
    /// Made when the first answer is to be constrained.
    compiler: OnceLock<Result<Compiler, GrammarError>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // An engine that is gone already has stopped.
        let _ = self.line.send(Command::Shutdown(oneshot::channel().0));
    }
}

impl Engine {
    /// Starts the engine thread, and a task of the runtime it is called in that tells turns' listeners. `page_file` is the
    /// catalog's number of the file that `pool` opened.
    pub fn start(
        model: Arc<Model>,
        cpu: Cpu,
        pool: PagePool,
        page_file: i64,
        store: Store,
        durability: Durability,
        options: impl Into<EngineOptions>,
    ) -> std::io::Result<Engine> {
        let EngineOptions { drafts, reopen, stuck_after, faults } = options.into();
        let backend = Backend::new(Arc::clone(model.weights()), *model.layout(), cpu);
        let backend = backend.map_err(std::io::Error::other)?;
        let condition = Arc::new(Condition::new(stuck_after));
        let (line, inbox) = Line::new();
        let line = Arc::new(line);
        let supervisor = Supervisor {
            store,
            durability,
            reopen,
            faults: faults.clone(),
            line: Arc::clone(&line),
            condition: Arc::clone(&condition),
        };
        let disk = supervisor.disk_threads().map_err(std::io::Error::other)?;
        let name = model.name.clone();
        watchdog::watch(name.clone(), &condition)?;
        let inner = Inner {
            model: Arc::clone(&model),
            page_file,
            line,
            condition: Arc::clone(&condition),
            compiler: OnceLock::new(),
        };
        let stats = EngineStats::default();
        let (outbox, post) = Outbox::new();
        tokio::spawn(post.deliver());
        let parts = Parts { model, backend, page_file, drafts, stats, limits: None, outbox, stopping: None };
        let worker = Worker::new(parts, pool, disk, inbox, condition, faults);
        std::thread::Builder::new()
            .name(format!("dormouse-engine-{name}"))
            .spawn(move || supervisor.run(worker))?;
        Ok(Engine { inner: Arc::new(inner) })
    }

    pub fn model(&self) -> &Arc<Model> {
        &self.inner.model
    }

    pub fn page_file(&self) -> i64 {
        self.inner.page_file
    }

    /// The grammar of answers of this form, for [`TurnSpec::grammar`]; None when they may be anything. Compiled at the first
    /// request of the form, which takes milliseconds; the very first takes a tenth of a second.
    pub fn grammar(&self, request: &GrammarRequest) -> Result<Option<Arc<Grammar>>, GrammarError> {
        if request.is_free() {
            return Ok(None);
        }
        let compiler = self.inner.compiler.get_or_init(|| Compiler::new(self.inner.model.tokenizer()));
        compiler.as_ref().map_err(GrammarError::clone)?.compile(request)
    }

    /// Runs a turn whose input is in the token log before the turn's first commit comes there. The last that its listener hears is `Finished` or
    /// `Failed`; it is dropped without where the engine is gone.
    pub fn submit(&self, spec: TurnSpec, listener: impl Listener + 'static) -> Result<(), EngineError> {
        self.send(Command::Submit(Box::new(spec), Arc::new(listener), Instant::now()))
    }

    /// Ends a turn at the next step; what it generated stays. Unknown turns are ignored.
    pub fn cancel(&self, turn: &str) {
        // A stopped engine has no turns left to cancel.
        let _ = self.send(Command::Cancel(turn.to_owned()));
    }

    /// Lets a durable session point at the realm's pages of `log`, so that they count as its own.
    pub async fn claim(&self, realm: Realm, log: Vec<TokenId>) -> Result<Claim, EngineError> {
        self.ask(|answer| Command::Claim(realm, log, answer)).await?
    }

    /// Takes a claim back. `purge`: delete the pages that nobody else uses.
    pub async fn unclaim(&self, leaf_slot: Option<u32>, purge: bool) {
        if let Some(leaf_slot) = leaf_slot {
            // A stopped engine's claims are counted anew from the catalog at the next start.
            let _ = self.send(Command::Unclaim { leaf_slot, purge });
        }
    }

    /// The pages of a durable session, whose path ends at `leaf_slot`, are the last to be evicted from now on, or no longer.
    pub fn keep(&self, session: &str, leaf_slot: Option<u32>, kept: bool) {
        let session = session.to_owned();
        // A stopped engine evicts nothing, and learns it from the catalog at the next start.
        let _ = self.send(if kept { Command::Keep(session, leaf_slot) } else { Command::LetGo(session) });
    }

    /// Gives back the RAM of the realm's pages of `log`; answers how many bytes that were.
    pub async fn park(&self, realm: Realm, log: Vec<TokenId>) -> Result<u64, EngineError> {
        self.ask(|answer| Command::Park(realm, log, answer)).await
    }

    /// Brings the realm's pages of `log` into RAM and checks them; with `dry_run` only says what that would take.
    pub async fn resume(
        &self,
        realm: Realm,
        log: Vec<TokenId>,
        dry_run: bool,
    ) -> Result<Receipt, EngineError> {
        self.ask(|answer| Command::Resume { realm, log, dry_run, answer }).await?
    }

    /// Errors: `Stopped`, also where the engine thread is at something that does not end.
    pub async fn stats(&self) -> Result<EngineStats, EngineError> {
        let asked = tokio::time::timeout(STATS_PATIENCE, self.ask(Command::Stats)).await;
        asked.unwrap_or(Err(EngineError::Stopped))
    }

    /// What pages may take from now on.
    pub fn set_limits(&self, limits: Limits) {
        // A stopped engine takes no more.
        let _ = self.send(Command::Limit(limits));
    }

    /// A step, a commit, or reading a page, that lasts longer turns health red, from now on.
    pub fn set_stuck_after(&self, limit: Duration) {
        self.inner.condition.set_stuck_after(limit);
    }

    /// Why the engine cannot serve, if it cannot.
    pub fn unhealthy(&self) -> Option<String> {
        self.inner.condition.unhealthy()
    }

    /// How often the engine thread panicked and was started again.
    pub fn restarts(&self) -> u64 {
        self.inner.condition.restarts.load(Ordering::Relaxed)
    }

    /// How often one of these lasted too long.
    pub fn stuck(&self) -> u64 {
        self.inner.condition.stuck.load(Ordering::Relaxed)
    }

    /// Stops at the next step and commits what was generated. Running turns end with `Failed(Stopped)`.
    pub async fn shutdown(&self) {
        // An engine that is gone already has stopped.
        let _ = self.ask(Command::Shutdown).await;
    }

    fn send(&self, command: Command) -> Result<(), EngineError> {
        self.inner.line.send(command)
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, EngineError> {
        let (answer, receiver) = oneshot::channel();
        self.send(command(answer))?;
        let gone = |_| if self.inner.line.is_open() { EngineError::Restarted } else { EngineError::Stopped };
        receiver.await.map_err(gone)
    }
}
