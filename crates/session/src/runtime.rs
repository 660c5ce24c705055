//! [`Runtime`]: every operation on sessions, whichever door it came through. Its methods live in the files named
//! by what they are about; this one has what they share.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dormouse_engine::Engine;
use dormouse_store::{SessionRow, Store};
use tokio::sync::{mpsc, watch};
use tracing::{Instrument, Span};

use crate::api::*;
use crate::hub::Hub;
use crate::records::Settings;
use crate::tenants::TenantCounts;
use crate::{ids, records, request};

/// How a runtime behaves.
#[derive(Clone, Debug)]
pub struct RuntimeOptions {
    /// Sessions that chat requests made for themselves are deleted after this many seconds without use.
    pub implicit_ttl_seconds: u64,
    /// Time between two looks for sessions whose time is up.
    pub sweep_seconds: u64,
    /// The clock of this process goes wrong by as much: a fault that tests ask for.
    pub clock_offset_seconds: i64,
}

impl Default for RuntimeOptions {
    fn default() -> RuntimeOptions {
        RuntimeOptions { implicit_ttl_seconds: 24 * 3600, sweep_seconds: 60, clock_offset_seconds: 0 }
    }
}

/// All sessions of one data directory, and the models that advance them. Cheap to clone.
#[derive(Clone)]
pub struct Runtime {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub store: Store,
    pub engines: Vec<Engine>,
    pub options: RuntimeOptions,
    /// Seconds since the epoch.
    pub started_at: u64,
    pub stopping: AtomicBool,
    pub tenants: TenantCounts,
    /// Turns that run in this process, by id.
    running: Mutex<HashMap<String, Arc<Hub>>>,
    /// Shared by who begins a turn, from before it is in the database until it is in `running`; alone by who takes up
    /// a turn that is in the database and not in `running`.
    pub unregistered: tokio::sync::RwLock<()>,
    /// Wakes those who follow a session's events.
    changes: Mutex<HashMap<String, watch::Sender<()>>>,
    /// Every task that drives a turn holds a clone; shutdown drops this one and waits for the others.
    alive: Mutex<Option<mpsc::Sender<()>>>,
    ended: tokio::sync::Mutex<mpsc::Receiver<()>>,
}

/// Runs `work` to its end even if its caller goes away in the middle: a client that leaves must not leave a lease
/// taken, or a claim without its session, behind.
pub(crate) async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, SessionError>> + Send + 'static,
) -> Result<T, SessionError> {
    let work = request::go_on(request::current(), work).instrument(Span::current());
    let done = tokio::spawn(work).await;
    done.map_err(|why| SessionError::Internal(format!("the operation did not end: {why}")))?
}

/// None of these maps is left half changed by a panic.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Runtime {
    /// A runtime over an open database and its running engines. Errors: no engine at all.
    /// [`Runtime::recover`] then goes on with what was interrupted.
    pub fn open(
        store: Store,
        engines: Vec<Engine>,
        options: RuntimeOptions,
    ) -> Result<Runtime, SessionError> {
        if engines.is_empty() {
            return Err(SessionError::ModelNotFound("(any)".into(), "none".into()));
        }
        ids::shift_clock(options.clock_offset_seconds);
        let (alive, ended) = mpsc::channel(1);
        let inner = Inner {
            store,
            engines,
            options,
            started_at: ids::now_ms() / 1000,
            stopping: AtomicBool::new(false),
            tenants: TenantCounts::default(),
            running: Mutex::default(),
            unregistered: tokio::sync::RwLock::default(),
            changes: Mutex::default(),
            alive: Mutex::new(Some(alive)),
            ended: tokio::sync::Mutex::new(ended),
        };
        Ok(Runtime { inner: Arc::new(inner) })
    }

    pub fn models(&self) -> Vec<ModelCard> {
        let card = |engine: &Engine| ModelCard {
            id: engine.model().name.clone(),
            context: engine.model().context(),
            created: self.inner.started_at,
            loaded: true,
            kv_bytes_per_token: engine.model().kv_token_bytes(),
            numerics: engine.model().numerics().to_owned(),
        };
        self.inner.engines.iter().map(card).collect()
    }

    /// The raw bytes of a token of this model (of the first loaded one when None); empty for an unknown token.
    pub fn token_bytes(&self, model: Option<&str>, token: u32) -> Vec<u8> {
        let engine = self.inner.engine(model).ok();
        let bytes = engine.and_then(|engine| engine.model().tokenizer().token_bytes(token));
        bytes.unwrap_or_default().to_vec()
    }

    /// Why the runtime cannot serve now, if it cannot.
    pub fn unhealthy(&self) -> Option<String> {
        if self.inner.is_stopping() {
            return Some(SessionError::Stopping.to_string());
        }
        if !self.inner.store.is_alive() {
            return Some("the metadata database's thread has ended; restart the server".into());
        }
        self.inner.engines.iter().find_map(|engine| {
            engine.unhealthy().map(|why| format!("model '{}': {why}", engine.model().name))
        })
    }

    /// What was found damaged in the metadata database and mended, or could not be; empty is well.
    pub async fn database_health(&self) -> Result<Vec<String>, SessionError> {
        Ok(self.inner.store.health().await?)
    }

    /// Stops generating at the next step, commits what was generated, closes the database. Interrupted turns stay
    /// `in_progress` and are finished after the next start.
    pub async fn shutdown(&self) {
        self.inner.stopping.store(true, Ordering::SeqCst);
        for engine in &self.inner.engines {
            engine.shutdown().await;
        }
        drop(locked(&self.inner.alive).take());
        // None when the last driver's clone is gone.
        while self.inner.ended.lock().await.recv().await.is_some() {}
        locked(&self.inner.changes).clear();
        if let Err(why) = self.inner.store.close().await {
            tracing::warn!("closing the metadata database: {why}");
        }
    }
}

impl Inner {
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// A token that keeps shutdown waiting; `Stopping` once shutdown has begun.
    pub fn keep_alive(&self) -> Result<mpsc::Sender<()>, SessionError> {
        match self.is_stopping() {
            true => Err(SessionError::Stopping),
            false => locked(&self.alive).clone().ok_or(SessionError::Stopping),
        }
    }

    /// The engine of a model; of the first one when None.
    pub fn engine(&self, model: Option<&str>) -> Result<&Engine, SessionError> {
        let found = match model {
            None => self.engines.first(),
            Some(name) => self.engines.iter().find(|engine| engine.model().name == name),
        };
        found.ok_or_else(|| {
            let names: Vec<&str> = self.engines.iter().map(|engine| engine.model().name.as_str()).collect();
            SessionError::ModelNotFound(model.unwrap_or("(any)").to_owned(), names.join(", "))
        })
    }

    /// The engine that owns a page file, if it runs.
    pub fn engine_of_file(&self, page_file: Option<i64>) -> Option<&Engine> {
        self.engines.iter().find(|engine| Some(engine.page_file()) == page_file)
    }

    pub fn hub(&self, turn: &str) -> Option<Arc<Hub>> {
        locked(&self.running).get(turn).cloned()
    }

    pub fn add_hub(&self, hub: &Arc<Hub>) {
        locked(&self.running).insert(hub.turn.clone(), Arc::clone(hub));
    }

    pub fn remove_hub(&self, turn: &str) {
        locked(&self.running).remove(turn);
    }

    /// Says that the session's event log has grown.
    pub fn changed(&self, session: &str) {
        if let Some(change) = locked(&self.changes).get(session) {
            // Nobody following is well.
            change.send(()).ok();
        }
    }

    /// Resolves at every later [`Inner::changed`].
    pub fn watch(&self, session: &str) -> watch::Receiver<()> {
        let mut changes = locked(&self.changes);
        changes.retain(|_, change| change.receiver_count() > 0);
        changes.entry(session.to_owned()).or_insert_with(|| watch::Sender::new(())).subscribe()
    }

    pub fn forget_watchers(&self, session: &str) {
        locked(&self.changes).remove(session);
    }

    pub async fn settings(&self, session: &str) -> Result<Settings, SessionError> {
        records::decode(&self.store.settings(session).await?)
    }

    pub fn session(&self, row: SessionRow, settings: Settings) -> Session {
        let kv_token_bytes = self.engine(Some(&settings.model)).map_or(0, |it| it.model().kv_token_bytes());
        records::session(row, settings, kv_token_bytes)
    }
}
