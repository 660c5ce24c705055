//! What turns say, on its way to who listens.

use std::sync::Arc;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::{Event, Listener};

/// Events with who is to hear them.
type Letters = Vec<(Arc<dyn Listener>, Event)>;

/// Collects what is said in a round of the engine's loop, and sends it off at once: were every listener woken by itself, the
/// threads that compute would be interrupted as often.
pub struct Outbox {
    letters: Letters,
    post: UnboundedSender<Letters>,
}

/// Where what was sent arrives.
pub struct Post(UnboundedReceiver<Letters>);

impl Outbox {
    pub fn new() -> (Outbox, Post) {
        let (post, arriving) = unbounded_channel();
        (Outbox { letters: Letters::new(), post }, Post(arriving))
    }

    pub fn put(&mut self, listener: &Arc<dyn Listener>, event: Event) {
        self.letters.push((Arc::clone(listener), event));
    }

    pub fn send(&mut self) {
        if !self.letters.is_empty() {
            // Nobody delivers any more once the runtime is gone, and with it all who listen.
            let _ = self.post.send(std::mem::take(&mut self.letters));
        }
    }
}

impl Post {
    /// Tells listeners what they are to hear, until the engine is gone.
    pub async fn deliver(mut self) {
        while let Some(letters) = self.0.recv().await {
            for (listener, event) in letters {
                listener.hear(event);
            }
        }
    }
}
