//! HTTP for Dormouse: OpenAI-compatible endpoints, the sessions API, health and metrics.
//!
//! Routes by resource, one file each. What a request means is decided by pure functions from JSON to the types of
//! `dormouse-session`; what it does is a call of [`Runtime`]; nothing here knows models, pages or the database.

#![forbid(unsafe_code)]

mod body;
mod caller;
mod error;
mod fields;
mod generation;
mod guard;
mod idle;
mod keyring;
mod limits;
mod messages;
mod openapi;
mod routes;
mod serve;
mod sse;
mod tools;

use std::ops::Deref;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::extract::FromRequestParts;
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::{Router, middleware};
use dormouse_embed::Embedder;
use dormouse_session::{ModelCard, Runtime, SessionError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower::ServiceExt;
use tower_http::catch_panic::CatchPanicLayer;

use crate::caller::Caller;
use crate::guard::{AnswerCounts, Gate};
use crate::keyring::Keyring;

pub use body::BODY_LIMIT_BYTES;
pub use error::ApiError;
pub use guard::Origins;
pub use routes::KnownModel;
pub use serve::serve;

/// Who may ask, and how much at once.
#[derive(Clone, Debug)]
pub struct Options {
    /// The owner's key, beside those of the database.
    pub api_key: Option<String>,
    /// Every request but those for `/health` and `/openapi.json` needs a key; else those without one are the owner's.
    pub require_key: bool,
    /// The listener is bound to a loopback address: requests that name another host are refused.
    pub loopback_only: bool,
    /// Web pages of these origins may use the server, e.g. `https://app.example`.
    pub cors_origins: Origins,
    /// Answers that may be on their way at once; more are answered 429.
    pub max_running: usize,
    /// Models that could be served but are not, for `GET /v1/models`.
    pub known_models: Vec<KnownModel>,
    /// What answers `/v1/embeddings`.
    pub embedder: Option<Embedder>,
}

/// [`Options::max_running`] unless the settings say otherwise.
pub const DEFAULT_MAX_RUNNING: usize = 256;

impl Default for Options {
    fn default() -> Options {
        Options {
            api_key: None,
            require_key: false,
            loopback_only: false,
            cors_origins: Origins::default(),
            max_running: DEFAULT_MAX_RUNNING,
            known_models: Vec::new(),
            embedder: None,
        }
    }
}

/// What all requests share.
struct Shared {
    runtime: Runtime,
    keyring: Arc<Keyring>,
    running: Arc<Semaphore>,
    max_running: usize,
    known_models: Vec<KnownModel>,
    embedder: Option<Embedder>,
    counts: Arc<AnswerCounts>,
}

/// What every route works with: the server, and who asks.
#[derive(Clone)]
struct App {
    shared: Arc<Shared>,
    caller: Caller,
}

impl Deref for App {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.shared
    }
}

impl FromRequestParts<Arc<Shared>> for App {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, shared: &Arc<Shared>) -> Result<App, ApiError> {
        // Only public paths have no caller.
        let caller = parts.extensions.get::<Caller>().cloned().ok_or_else(|| {
            let message = "this request was not looked at; please report this as a bug";
            ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, Some("internal_error"), message)
        })?;
        Ok(App { shared: Arc::clone(shared), caller })
    }
}

impl App {
    /// A place among the answers on their way; it is given back when the permit is dropped.
    fn admit(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        self.running.clone().try_acquire_owned().map_err(|_| {
            let answers = match self.max_running {
                1 => "1 answer is".to_owned(),
                many => format!("{many} answers are"),
            };
            let message = format!("{answers} on the way already (--max-requests); try again shortly");
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

/// All routes over `runtime`. Errors: the keys cannot be read from the database.
pub async fn router(runtime: Runtime, options: Options) -> Result<Router, SessionError> {
    let keyring = Keyring::new(options.api_key.as_deref(), options.require_key, runtime.keys().await?);
    let keyring = Arc::new(keyring);
    let counts = Arc::<AnswerCounts>::default();
    let gate = Gate {
        keyring: Arc::clone(&keyring),
        loopback_only: options.loopback_only,
        cors_origins: options.cors_origins,
        counts: Arc::clone(&counts),
    };
    let (origins, cors) = (gate.cors_origins.clone(), gate.cors());
    let shared = Arc::new(Shared {
        runtime,
        keyring,
        running: Arc::new(Semaphore::new(options.max_running)),
        max_running: options.max_running,
        known_models: options.known_models,
        embedder: options.embedder,
        counts,
    });
    let router = routes::all()
        .with_state(shared)
        .layer(CatchPanicLayer::custom(routes::panicked))
        .layer(middleware::from_fn_with_state(Arc::new(gate), guard::guard));
    let for_pages = router.clone().layer(cors);
    // Where no origin is listed, nothing is said of origins.
    Ok(Router::new().fallback_service(tower::service_fn(move |request| {
        let router = if origins.are_listed() { &for_pages } else { &router };
        router.clone().oneshot(request)
    })))
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
