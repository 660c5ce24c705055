//! A server in this process: a running system and the socket it answers at.

use std::io;
use std::time::Duration;

use anyhow::{Context, Result};
use dormouse_models::catalog::{self, Entry};
use dormouse_server::{KnownModel, Origins};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::assemble::{Running, assemble};
use crate::commands::keys;
use crate::config::Config;
use crate::weights::ModelFile;

/// How long stopping may take in all. What is not committed by then is found again at the next start.
const STOP_LIMIT: Duration = Duration::from_millis(1800);

pub struct Server {
    /// `http://HOST:PORT`.
    pub url: String,
    pub running: Running,
    /// Turns that the last process left unfinished and that are being finished now.
    pub recovered_turns: usize,
    /// Web pages of these may use it.
    pub origins: Origins,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<io::Result<()>>,
}

/// The catalogue, as `GET /v1/models` shows it.
fn known_models(config: &Config) -> Result<Vec<KnownModel>> {
    let known = |entry: &Entry| KnownModel {
        id: entry.name.clone(),
        kind: entry.kind.name(),
        path: entry.weights_path(&config.weights_dir()),
        size_bytes: entry.size_bytes,
        context: entry.context,
        licence: entry.licence.clone(),
    };
    Ok(catalog::entries()?.iter().map(known).collect())
}

impl Server {
    /// Opens the data directory, loads the models and, where there is one, the embedding model, and begins to answer at
    /// the configured address.
    pub async fn start(
        config: &Config,
        models: Vec<ModelFile>,
        embedding: Option<ModelFile>,
    ) -> Result<Server> {
        let running = assemble(config, &models, embedding.as_ref()).await?;
        keys::check_there_is_one(config, &running.store).await?;
        let bound = TcpListener::bind((config.host.as_str(), config.port)).await;
        let listener = bound.with_context(|| {
            format!(
                "cannot listen on {}:{}; choose another address with --host or --port",
                config.host, config.port
            )
        })?;
        let address = listener.local_addr()?;
        let url = format!("http://{address}");
        let origins = Origins::default();
        origins.set(&config.cors_origins)?;
        let options = dormouse_server::Options {
            api_key: config.api_key.clone(),
            require_key: config.key_needed()?.is_some(),
            cors_origins: origins.clone(),
            max_running: config.max_requests,
            loopback_only: address.ip().is_loopback(),
            known_models: known_models(config)?,
            embedder: running.embedder.clone(),
        };
        // Before anyone can ask, and not before it is certain that this process is the server.
        let recovered_turns = running.runtime.recover().await?;
        let router = dormouse_server::router(running.runtime.clone(), options).await?;
        let (stop, stopped) = oneshot::channel();
        let serving = tokio::spawn(dormouse_server::serve(listener, router, async {
            // A sender that is gone stops the server just as well.
            stopped.await.unwrap_or_default();
        }));
        running.store.set_address(url.clone()).await?;
        Ok(Server { url, running, recovered_turns, origins, stop, serving })
    }

    /// Accepts nothing more, stops generating at the next step, commits, and closes the database.
    pub async fn stop(self) -> Result<()> {
        // The receiver is gone only when serving has ended already.
        let _ = self.stop.send(());
        let stopping = async {
            self.running.runtime.shutdown().await;
            self.serving
                .await
                .context("the server's task failed")?
                .context("the server stopped with an error")
        };
        match tokio::time::timeout(STOP_LIMIT, stopping).await {
            Ok(outcome) => outcome,
            Err(_) => {
                tracing::warn!(
                    "stopping took too long; what was not committed is computed again at the next start"
                );
                Ok(())
            }
        }
    }
}
