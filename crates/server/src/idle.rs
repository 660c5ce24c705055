//! Connections that wait for their client: when places run out, the one that has waited longest gives way. So clients that
//! connect and send nothing keep nobody out.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

/// All idle connections of a server. Cheap to clone.
#[derive(Clone, Default)]
pub struct Idle(Arc<Mutex<Waiting>>);

#[derive(Default)]
struct Waiting {
    /// Told when the connection is to be closed; those that have waited longest first.
    connections: BTreeMap<u64, Arc<Notify>>,
    next: u64,
}

impl Idle {
    fn with<T>(&self, change: impl FnOnce(&mut Waiting) -> T) -> T {
        // Every change is one step.
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A new connection, which waits for its client, and what tells it to go.
    pub fn enter(&self) -> (IdleConnection, Arc<Notify>) {
        let unwanted = Arc::new(Notify::new());
        let place =
            Arc::new(Place { idle: self.clone(), unwanted: Arc::clone(&unwanted), at: Mutex::default() });
        place.wait();
        (IdleConnection(place), unwanted)
    }

    /// Closes the connection that has waited longest, if there is one.
    pub fn close_oldest(&self) {
        if let Some((_, oldest)) = self.with(|waiting| waiting.connections.pop_first()) {
            oldest.notify_one();
        }
    }
}

/// One connection. Its clones are the same one.
#[derive(Clone)]
pub struct IdleConnection(Arc<Place>);

struct Place {
    idle: Idle,
    unwanted: Arc<Notify>,
    /// Where it is in the queue; None while it works.
    at: Mutex<Option<u64>>,
}

impl Place {
    fn wait(&self) {
        let mut at = self.at.lock().unwrap_or_else(PoisonError::into_inner);
        *at = Some(self.idle.with(|waiting| {
            waiting.next += 1;
            waiting.connections.insert(waiting.next, Arc::clone(&self.unwanted));
            waiting.next
        }));
    }

    fn leave(&self) {
        if let Some(at) = self.at.lock().unwrap_or_else(PoisonError::into_inner).take() {
            self.idle.with(|waiting| waiting.connections.remove(&at));
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.leave();
    }
}

impl IdleConnection {
    /// It answers until the guard is dropped, and is then idle again.
    pub fn work(self) -> Busy {
        self.0.leave();
        Busy(self.0)
    }
}

/// A connection at work.
pub struct Busy(Arc<Place>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn is_closed(unwanted: &Notify) -> bool {
        tokio::time::timeout(std::time::Duration::ZERO, unwanted.notified()).await.is_ok()
    }

    #[tokio::test]
    async fn the_connection_that_has_waited_longest_is_closed_and_none_that_works() {
        let idle = Idle::default();
        let (first, first_unwanted) = idle.enter();
        let (_second, second_unwanted) = idle.enter();
        let (third, third_unwanted) = idle.enter();
        let busy = first.clone().work();
        drop(third);
        idle.close_oldest();
        assert!(is_closed(&second_unwanted).await);
        idle.close_oldest();
        assert!(!is_closed(&first_unwanted).await && !is_closed(&third_unwanted).await);
        drop(busy);
        idle.close_oldest();
        assert!(is_closed(&first_unwanted).await);
    }
}
