//! `dormouse serve`: the server, until it is told to stop.

use std::io::IsTerminal;

use anyhow::{Context, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::keys;
use crate::assemble::open_store;
use crate::cli::ServeArguments;
use crate::config::{Config, Settings};
use crate::log::Log;
use crate::output::outln;
use crate::reload::reload;
use crate::server::Server;
use crate::sizes::Bytes;
use crate::weights;

/// `settings`: what the command line says, for when the file is read again.
pub async fn serve(
    mut config: Config,
    settings: &Settings,
    arguments: ServeArguments,
    log: &Log,
) -> Result<()> {
    let (mut signals, mut hangup) = (Signals::listen()?, listen(SignalKind::hangup())?);
    if config.api_key.is_none() && config.key_needed()?.is_some() {
        // Before anything is downloaded for a server that will not start.
        let store = open_store(&config)?;
        let checked = keys::check_there_is_one(&config, &store).await;
        store.close().await?;
        checked?;
    }
    let starting = async {
        let models = weights::choose(&config, arguments.yes).await?;
        let embedding = weights::choose_embedding(&config, arguments.yes).await?;
        Server::start(&config, models, embedding).await
    };
    let server = tokio::select! {
        server = starting => server?,
        // What a download or a check has done so far is kept, or done again: nothing is half written.
        () = signals.stop() => return Ok(()),
    };
    describe(&config, &server).await?;
    outln!("ready {}", server.url);
    loop {
        tokio::select! {
            () = signals.stop() => break,
            _ = hangup.recv() => {
                if std::io::stderr().is_terminal() {
                    // The terminal was closed, and with it goes what was started there.
                    break;
                }
                let read = Config::resolve(settings).and_then(|new| reload(&config, new, &server, log));
                match read {
                    Ok(new) => config = new,
                    Err(why) => tracing::error!("the settings stay as they are: {why:#}"),
                }
            }
        }
    }
    tokio::select! {
        stopped = server.stop() => stopped,
        // A second signal is someone who will not wait; nothing acknowledged is lost by ending here.
        () = signals.stop() => std::process::exit(1),
    }
}

fn listen(kind: SignalKind) -> Result<Signal> {
    signal(kind).context("cannot listen for signals")
}

/// SIGTERM and SIGINT.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn listen() -> Result<Signals> {
        Ok(Signals {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
        })
    }

    async fn stop(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// What was chosen, on standard error.
async fn describe(config: &Config, server: &Server) -> Result<()> {
    let running = &server.running;
    let line = |name: &str, text: String| eprintln!("{name:<10}{text}");
    line("dormouse", env!("CARGO_PKG_VERSION").into());
    let key = if config.key_needed()?.is_some() { "API key needed" } else { "no API key needed" };
    line("address", format!("{} ({key})", server.url));
    for ((engine, pages), device) in running.engines.iter().zip(&running.pages).zip(&running.devices) {
        let model = engine.model();
        line("model", format!("{} from {}", model.name, model.path().display()));
        line(
            "",
            format!(
                "context {} tokens, KV {} at {} bytes a token",
                model.context(),
                config.kv_dtype.name(),
                model.kv_token_bytes()
            ),
        );
        line("device", format!("{device} ({})", model.numerics()));
        line("", format!("speculation {}", config.speculation.name()));
        let state = if pages.report.created { "new".into() } else { format!("{} pages", pages.report.pages) };
        line("pages", format!("{} ({state})", pages.path.display()));
        if let Some(aside) = &pages.set_aside {
            line("", format!("the file that was there cannot be used and is now {}", aside.display()));
        }
    }
    if let Some(embedder) = &running.embedder {
        let (numbers, tokens) = (embedder.dimensions(), embedder.max_tokens());
        let name = embedder.name();
        line("embedding", format!("{name}, {numbers} numbers from up to {tokens} tokens"));
    }
    for origin in &config.cors_origins {
        line("", format!("web pages of {origin} may use it"));
    }
    line("data", format!("{}, durability {}", config.data_dir.display(), config.durability.name()));
    let (quota, free) = (running.quota, crate::assemble::free_disk(&config.data_dir)?);
    line("quota", format!("{quota} for pages; {} of disk are free", Bytes(free.0)));
    let counts = running.store.session_counts().await?;
    let sessions = counts.idle + counts.in_progress + counts.failed;
    line("sessions", format!("{sessions} found, {} unfinished turns go on", server.recovered_turns));
    for problem in running.store.health().await? {
        line("database", problem);
    }
    Ok(())
}
