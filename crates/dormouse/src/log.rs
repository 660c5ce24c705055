//! The log on standard error: what is in it, and that panics come into it without what they say of requests.

use std::io::IsTerminal;

use anyhow::{Context, Result};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, reload};

/// What is logged where nobody says.
const DEFAULT_FILTER: &str = "warn";

/// The running log. Its filter can be changed.
#[derive(Clone)]
pub struct Log(reload::Handle<EnvFilter, Registry>);

impl Log {
    /// Begins to log, once in a process; as JSON objects or as text.
    pub fn start(as_json: bool) -> Log {
        let (filter, handle) = reload::Layer::new(EnvFilter::new(DEFAULT_FILTER));
        let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
        let lines = lines.with_ansi(std::io::stderr().is_terminal());
        let lines = if as_json { lines.json().boxed() } else { lines.with_target(false).boxed() };
        tracing_subscriber::registry().with(filter).with(lines).init();
        std::panic::set_hook(Box::new(log_panic));
        Log(handle)
    }

    /// From now on logs what `filter` asks for (`info`, `dormouse_engine=debug`, …), or the default.
    pub fn set(&self, filter: Option<&str>) -> Result<()> {
        self.0.reload(parse(filter.unwrap_or(DEFAULT_FILTER))?).context("the log cannot be changed")
    }
}

/// Errors: not a filter.
pub fn parse(filter: &str) -> Result<EnvFilter> {
    EnvFilter::try_new(filter)
        .with_context(|| format!("--log {filter}: expected a level such as info, or targets with levels"))
}

/// Where it happened, and in which thread. What a panic says may quote a prompt, so that is for those who debug.
fn log_panic(panic: &std::panic::PanicHookInfo<'_>) {
    let thread = std::thread::current();
    let thread = thread.name().unwrap_or("without a name");
    let place = panic.location().map_or_else(|| "an unknown place".into(), ToString::to_string);
    let backtrace = std::backtrace::Backtrace::capture();
    tracing::error!("thread '{thread}' panicked at {place}");
    tracing::debug!("the panic says: {}", panic.payload_as_str().unwrap_or("nothing readable"));
    if backtrace.status() == std::backtrace::BacktraceStatus::Captured {
        tracing::error!("{backtrace}");
    }
}
