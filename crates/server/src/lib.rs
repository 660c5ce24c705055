//! HTTP for Dormouse: OpenAI-compatible endpoints, the sessions API, health and metrics.
//!
//! Routes by resource, one file each. What a request means is decided by pure functions from JSON to the types of
//! `dormouse-session`; what it does is a call of [`Runtime`]; nothing here knows models, pages or the database.

#![forbid(unsafe_code)]

mod body;
mod error;
mod fields;
mod generation;
mod guard;
mod messages;
mod routes;
mod serve;
mod sse;

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::http::StatusCode;
use axum::{Router, middleware};
use dormouse_embed::Embedder;
use dormouse_session::{ModelCard, Runtime, Tenant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower_http::catch_panic::CatchPanicLayer;

pub use body::BODY_LIMIT_BYTES;
pub use error::ApiError;
pub use routes::KnownModel;
pub use serve::serve;

/// Who may ask, and how much at once.
#[derive(Clone, Debug)]
pub struct Options {
    /// Asked of every request but `/health` when set.
    pub api_key: Option<String>,
    /// The listener is bound to a loopback address: requests that name another host are refused.
    pub loopback_only: bool,
    /// Answers that may be on their way at once; more are answered 429.
    pub max_running: usize,
    /// Models that could be served but are not, for `GET /v1/models`.
    pub known_models: Vec<KnownModel>,
    /// What answers `/v1/embeddings`.
    pub embedder: Option<Embedder>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            api_key: None,
            loopback_only: false,
            max_running: 256,
            known_models: Vec::new(),
            embedder: None,
        }
    }
}

/// What every route works with.
#[derive(Clone)]
struct App {
    runtime: Runtime,
    tenant: Tenant,
    running: Arc<Semaphore>,
    max_running: usize,
    known_models: Arc<[KnownModel]>,
    embedder: Option<Embedder>,
}

impl App {
    /// A place among the answers on their way; it is given back when the permit is dropped.
    fn admit(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        self.running.clone().try_acquire_owned().map_err(|_| {
            let message = format!("{} answers are on their way already; try again shortly", self.max_running);
            ApiError::new(StatusCode::TOO_MANY_REQUESTS, Some("too_many_requests"), message)
        })
    }

    /// The card of this model, or of the one that serves requests naming none.
    fn card(&self, model: Option<&str>) -> Option<ModelCard> {
        let cards = self.runtime.models();
        let is_it = |card: &&ModelCard| model.map_or(card.loaded, |model| card.id == model);
        cards.iter().find(is_it).or_else(|| cards.iter().find(|card| card.loaded)).cloned()
    }
}

/// All routes over `runtime`.
pub fn router(runtime: Runtime, options: Options) -> Router {
    let app = App {
        runtime,
        tenant: Tenant::default(),
        running: Arc::new(Semaphore::new(options.max_running)),
        max_running: options.max_running,
        known_models: options.known_models.clone().into(),
        embedder: options.embedder.clone(),
    };
    routes::all()
        .with_state(app)
        .layer(CatchPanicLayer::custom(routes::panicked))
        .layer(middleware::from_fn_with_state(Arc::new(options), guard::guard))
}

/// Seconds since the epoch.
fn now_seconds() -> u64 {
    // A clock before 1970 is a clock that was never set: 0 says so.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}

fn random_u64() -> Result<u64, ApiError> {
    getrandom::u64().map_err(|error| {
        let message = format!("the operating system gives no random numbers: {error}");
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, None, message)
    })
}
