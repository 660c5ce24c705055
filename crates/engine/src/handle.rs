//! [`Engine`]: the handle through which everyone else speaks to the engine thread.

use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::time::Instant;

use dormouse_grammar::{Compiler, Grammar, GrammarError, GrammarRequest};
use dormouse_kernels::Cpu;
use dormouse_kv::{PagePool, Realm};
use dormouse_models::{Model, TokenId};
use dormouse_store::{Durability, Store};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::sync::oneshot;

use crate::persist::Persister;
use crate::worker::{Command, State, Worker};
use crate::{DraftSource, EngineError, EngineStats, Event, Receipt, TurnSpec};

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

struct Inner {
    model: Arc<Model>,
    page_file: i64,
    commands: mpsc::Sender<Command>,
    trouble: Arc<Mutex<Option<String>>>,
    /// Made when the first answer is to be constrained.
    compiler: OnceLock<Result<Compiler, GrammarError>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // An engine that is gone already has stopped.
        let _ = self.commands.send(Command::Shutdown(oneshot::channel().0));
    }
}

impl Engine {
    /// Starts the engine thread. `page_file` is the catalog's number of the file that `pool` opened.
    pub fn start(
        model: Arc<Model>,
        cpu: Cpu,
        pool: PagePool,
        page_file: i64,
        store: Store,
        durability: Durability,
        drafts: impl Into<DraftSource>,
    ) -> std::io::Result<Engine> {
        let drafts = drafts.into();
        let (commands, inbox) = mpsc::channel();
        let trouble = Arc::new(Mutex::new(None));
        let persister = Persister::start(store, durability, commands.clone())?;
        let inner = Inner { model, page_file, commands, trouble, compiler: OnceLock::new() };
        let (model, trouble) = (Arc::clone(&inner.model), Arc::clone(&inner.trouble));
        std::thread::Builder::new().name(format!("dormouse-engine-{}", inner.model.name)).spawn(
            move || {
                let notice = Notice(Arc::clone(&trouble));
                let state = State::default();
                Worker { model, cpu, pool, page_file, persister, drafts, commands: inbox, trouble, state }
                    .run();
                drop(notice);
            },
        )?;
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

    /// Runs a turn whose input is already in the durable token log. Its events end with `Finished` or `Failed`.
    pub fn submit(&self, spec: TurnSpec) -> Result<UnboundedReceiver<Event>, EngineError> {
        let (events, receiver) = unbounded_channel();
        self.send(Command::Submit(Box::new(spec), events, Instant::now()))?;
        Ok(receiver)
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
        self.ask(|answer| Command::Resume { realm, log, dry_run, answer }).await
    }

    pub async fn stats(&self) -> Result<EngineStats, EngineError> {
        self.ask(Command::Stats).await
    }

    /// Why the engine cannot serve, if it cannot.
    pub fn unhealthy(&self) -> Option<String> {
        match self.inner.trouble.lock() {
            Ok(trouble) => trouble.clone(),
            Err(_) => Some("the engine thread panicked; restart".into()),
        }
    }

    /// Stops at the next step and commits what was generated. Running turns end with `Failed(Stopped)`.
    pub async fn shutdown(&self) {
        // An engine that is gone already has stopped.
        let _ = self.ask(Command::Shutdown).await;
    }

    fn send(&self, command: Command) -> Result<(), EngineError> {
        self.inner.commands.send(command).map_err(|_| EngineError::Stopped)
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, EngineError> {
        let (answer, receiver) = oneshot::channel();
        self.send(command(answer))?;
        receiver.await.map_err(|_| EngineError::Stopped)
    }
}

/// Notes the end of the engine thread, however it comes.
struct Notice(Arc<Mutex<Option<String>>>);

impl Drop for Notice {
    fn drop(&mut self) {
        if let Ok(mut trouble) = self.0.lock() {
            let how = if std::thread::panicking() { "panicked" } else { "stopped" };
            trouble.get_or_insert_with(|| format!("the engine thread has {how}; restart"));
        }
    }
}
