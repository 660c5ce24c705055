//! The accept loop: connections that are slow or idle hold nothing but themselves, and stopping is quick.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::Request;
use axum::response::Response;
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tower::ServiceExt;

use crate::idle::{Busy, Idle, IdleConnection};

/// A client has this long to send its request's head; idle connections are closed after as long.
const HEADER_TIMEOUT: Duration = Duration::from_secs(60);
/// A client that takes nothing of its answer for this long is cut off, and with it what the answer holds.
#[cfg(target_os = "linux")]
const STALL_TIMEOUT_MS: u32 = 60_000;
/// Connections at once, where the system allows so many files. When all are taken, the one that has been idle for longest
/// makes room for the next.
const MOST_CONNECTIONS: usize = 16_384;
/// Clients that have connected and are not accepted yet: a burst of them waits here, not a second for TCP to try again.
const BACKLOG: i32 = 4096;
/// Files that the rest of the process may need: database, pages, weights.
const OTHER_FILES: u64 = 256;
/// When the server stops, answers that are on their way have this long to end.
const GRACE: Duration = Duration::from_secs(1);
/// After a failed accept (out of file descriptors, for one) trying again at once would only spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves `router` on `listener` until `shutdown` resolves; then accepts nothing more, lets running answers end for
/// at most a second, and returns.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    shutdown: impl Future<Output = ()> + Send,
) -> io::Result<()> {
    serve_at_most(most_connections(), listener, router, shutdown).await
}

async fn serve_at_most(
    most: usize,
    listener: TcpListener,
    router: Router,
    shutdown: impl Future<Output = ()> + Send,
) -> io::Result<()> {
    // It listens already, with a shorter queue.
    rustix::net::listen(&listener, BACKLOG)?;
    let (stop, stopping) = watch::channel(false);
    let (slots, idle) = (Arc::new(Semaphore::new(most)), Idle::default());
    let mut connections = JoinSet::new();
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            () = &mut shutdown => break,
            accepted = accept(&listener, &slots, &idle) => accepted?,
        };
        let Some((stream, slot)) = accepted else { continue };
        let (place, unwanted) = idle.enter();
        let service = hyper::service::service_fn({
            let (router, place) = (router.clone(), place.clone());
            move |request| answer(router.clone(), request, place.clone())
        });
        let mut stopping = stopping.clone();
        connections.spawn(async move {
            let _slot = slot;
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service);
            let mut connection = std::pin::pin!(connection);
            // An error means that `serve` is gone, which is a way of stopping too.
            let stopped = async { stopping.wait_for(|stop| *stop).await.is_ok() };
            let ended = tokio::select! {
                ended = connection.as_mut() => ended,
                () = unwanted.notified() => Ok(()),
                _ = stopped => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            drop(place);
            if let Err(error) = ended {
                tracing::debug!(%error, "a connection ended early");
            }
        });
        // Finished tasks are taken out as new ones come, so the set stays as small as the open connections.
        while connections.try_join_next().is_some() {}
    }
    drop(listener);
    stop.send_replace(true);
    let drained = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(GRACE, drained).await.is_err() {
        tracing::info!("stopped with answers on their way; their sessions go on after the next start");
    }
    Ok(())
}

/// Answers one request; its connection counts as idle again when the answer's last byte is handed over.
async fn answer(
    router: Router,
    request: Request<Incoming>,
    place: IdleConnection,
) -> Result<Response, std::convert::Infallible> {
    let busy = place.work();
    let response = router.oneshot(request.map(Body::new)).await?;
    Ok(response.map(|body| Body::new(Held { body, _busy: busy })))
}

/// A body that keeps its connection from counting as idle.
struct Held {
    body: Body,
    _busy: Busy,
}

impl hyper::body::Body for Held {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// As many as this process may have files open, less what else it needs them for; it asks for as many as it can get.
fn most_connections() -> usize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let wanted = MOST_CONNECTIONS as u64 + OTHER_FILES;
    let raised = limit.maximum.unwrap_or(wanted).min(wanted);
    let current = limit.current.unwrap_or(wanted);
    let raise = |files| setrlimit(Resource::Nofile, Rlimit { current: Some(files), maximum: limit.maximum });
    if current < raised && raise(raised).is_err() {
        // macOS may grant no more than its OPEN_MAX, whatever it says the maximum is.
        let refused = raise(raised.min(10_240).max(current));
        tracing::debug!(?refused, "as many files as wanted cannot be open at once");
    }
    let files = getrlimit(Resource::Nofile).current.unwrap_or(wanted);
    (files.saturating_sub(OTHER_FILES) as usize).clamp(64, MOST_CONNECTIONS)
}

type Accepted = (tokio::net::TcpStream, OwnedSemaphorePermit);

/// The next connection; None when accepting failed in a way that may pass. It takes a place only where someone comes, and
/// where none is left, the connection that has been idle for longest gives its own.
async fn accept(listener: &TcpListener, slots: &Arc<Semaphore>, idle: &Idle) -> io::Result<Option<Accepted>> {
    match listener.accept().await {
        Ok((stream, _)) => {
            if let Err(error) = tune(&stream) {
                tracing::debug!(%error, "a connection keeps the system's settings");
            }
            let slot = match Arc::clone(slots).try_acquire_owned() {
                Ok(slot) => slot,
                Err(_) => take_place(slots, idle).await?,
            };
            Ok(Some((stream, slot)))
        }
        Err(error) => {
            tracing::warn!(%error, "a connection could not be accepted");
            idle.close_oldest();
            tokio::time::sleep(ACCEPT_PAUSE).await;
            Ok(None)
        }
    }
}

/// A place that another connection gives up: one that is idle, or that ends first.
async fn take_place(slots: &Arc<Semaphore>, idle: &Idle) -> io::Result<OwnedSemaphorePermit> {
    loop {
        idle.close_oldest();
        let given_up = tokio::time::timeout(ACCEPT_PAUSE, Arc::clone(slots).acquire_owned()).await;
        if let Ok(slot) = given_up {
            return slot.map_err(io::Error::other);
        }
    }
}

fn tune(stream: &tokio::net::TcpStream) -> io::Result<()> {
    // Tokens are small writes that should leave at once.
    stream.set_nodelay(true)?;
    #[cfg(target_os = "linux")]
    rustix::net::sockopt::set_tcp_user_timeout(stream, STALL_TIMEOUT_MS)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::oneshot;

    #[tokio::test]
    async fn a_served_router_answers_and_stops_when_told_with_an_idle_connection_open() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let router = Router::new().route("/", get(async || "hello"));
        let server = tokio::spawn(serve(listener, router, async {
            stopped.await.unwrap();
        }));
        let mut client = tokio::net::TcpStream::connect(address).await.unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
        let mut answer = vec![0; 15];
        client.read_exact(&mut answer).await.unwrap();
        assert_eq!(answer, b"HTTP/1.1 200 OK");
        stop.send(()).unwrap();
        server.await.unwrap().unwrap();
        assert!(tokio::net::TcpStream::connect(address).await.is_err());
    }

    #[tokio::test]
    async fn connections_that_send_nothing_make_room_for_those_that_do() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().route("/", get(async || "hello"));
        let server = tokio::spawn(serve_at_most(4, listener, router, std::future::pending()));
        let mut silent = Vec::new();
        for _ in 0..12 {
            silent.push(tokio::net::TcpStream::connect(address).await.unwrap());
        }
        for _ in 0..3 {
            let mut client = tokio::net::TcpStream::connect(address).await.unwrap();
            client.write_all(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
            let mut answer = vec![0; 15];
            client.read_exact(&mut answer).await.unwrap();
            assert_eq!(answer, b"HTTP/1.1 200 OK");
        }
        assert_eq!(silent[0].read(&mut [0]).await.unwrap(), 0, "the first that came was the first to go");
        server.abort();
    }
}
