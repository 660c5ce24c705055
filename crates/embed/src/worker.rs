//! [`Embedder`]: an encoder on threads of its own, behind a bounded queue.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};

use crate::error::{EmbedError, LoadError};
use crate::{Embeddings, Encoder, Input};

/// Requests that may wait behind the one that is computed. With bodies of 10 MiB at most they stay within the memory
/// that a server of models has to spare.
const QUEUE: usize = 32;

/// A handle to the encoder that anyone may clone; the threads end when the last one is gone.
#[derive(Clone)]
pub struct Embedder {
    name: Arc<str>,
    encoder: Arc<Encoder>,
    queue: mpsc::Sender<Job>,
}

struct Job {
    inputs: Vec<Input>,
    dimensions: Option<usize>,
    /// Closed when whoever asked has left.
    reply: oneshot::Sender<Result<Embeddings, EmbedError>>,
}

impl Embedder {
    /// Loads the model in `folder` and puts it to work; clients call it `name`. Matrix products run on up to
    /// `threads` threads, the rest on those that Candle makes for itself.
    pub fn start(name: &str, folder: &Path, threads: usize) -> Result<Embedder, LoadError> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|index| format!("embed-{index}"))
            .start_handler(|_| give_way())
            .build()
            .map_err(|error| LoadError::Threads(error.to_string()))?;
        // On the pool, because threads that Candle makes for itself are as patient as the one that makes them.
        let encoder = Arc::new(pool.install(|| Encoder::load(folder))?);
        let (queue, mut jobs) = mpsc::channel::<Job>(QUEUE);
        let worker = encoder.clone();
        let run = move || {
            while let Some(job) = jobs.blocking_recv() {
                pool.install(|| answer(&worker, job));
            }
        };
        let spawned = std::thread::Builder::new().name("embed".into()).spawn(run);
        spawned.map_err(|error| LoadError::Threads(error.to_string()))?;
        Ok(Embedder { name: name.into(), encoder, queue })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Numbers in a vector, where nothing else is asked for.
    pub fn dimensions(&self) -> usize {
        self.encoder.dimensions()
    }

    /// Most tokens of one input, special tokens included.
    pub fn max_tokens(&self) -> usize {
        self.encoder.max_tokens()
    }

    /// The vectors of `inputs`, each cut to its first `dimensions` numbers where that is given. Requests are answered
    /// one after the other; dropping the future takes this one out of the queue, or ends it at its next forward pass.
    pub async fn embed(
        &self,
        inputs: Vec<Input>,
        dimensions: Option<usize>,
    ) -> Result<Embeddings, EmbedError> {
        let (reply, answer) = oneshot::channel();
        self.queue.try_send(Job { inputs, dimensions, reply }).map_err(|error| match error {
            TrySendError::Full(_) => EmbedError::Busy { waiting: QUEUE },
            TrySendError::Closed(_) => EmbedError::Broken,
        })?;
        answer.await.unwrap_or(Err(EmbedError::Broken))
    }
}

impl fmt::Debug for Embedder {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Embedder").field("name", &self.name).finish_non_exhaustive()
    }
}

fn answer(encoder: &Encoder, job: Job) {
    let Job { inputs, dimensions, reply } = job;
    let compute = || encoder.embed(&inputs, dimensions, &|| !reply.is_closed());
    // A broken invariant ends one request, not the worker.
    let outcome = catch_unwind(AssertUnwindSafe(compute)).unwrap_or_else(|_| {
        tracing::error!("the encoder panicked");
        Err(EmbedError::Broken)
    });
    if reply.send(outcome).is_err() {
        tracing::debug!("embeddings were computed for someone who has left");
    }
}

/// Where tokens are generated at the same time, they come first: their threads wait for each other at every layer, and
/// one that must share its core holds all of them up.
fn give_way() {
    // On Linux niceness belongs to a thread; elsewhere it would slow the whole process down. At 10 a busy neighbour gets
    // nine tenths of a core that both want.
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::nice(10) {
        tracing::debug!(%error, "embeddings compete with decoding on equal terms");
    }
}
