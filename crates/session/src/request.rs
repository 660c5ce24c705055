//! Which request is being answered: its id goes into the events that it causes.

use std::sync::Arc;

tokio::task_local! {
    static REQUEST: Arc<str>;
}

/// Does `work` in the name of a request, as its spawned parts do that know of it.
pub async fn in_request<T>(id: Arc<str>, work: impl Future<Output = T>) -> T {
    REQUEST.scope(id, work).await
}

/// The request that is being answered here, if it is one.
pub(crate) fn current() -> Option<Arc<str>> {
    REQUEST.try_with(Arc::clone).ok()
}

/// As [`in_request`], for work that goes on elsewhere: None leaves it without.
pub(crate) async fn go_on<T>(id: Option<Arc<str>>, work: impl Future<Output = T>) -> T {
    match id {
        Some(id) => in_request(id, work).await,
        None => work.await,
    }
}

/// As [`go_on`], on a thread that may wait.
pub(crate) fn go_on_blocking<T>(id: Option<Arc<str>>, work: impl FnOnce() -> T) -> T {
    match id {
        Some(id) => REQUEST.sync_scope(id, work),
        None => work(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_request_is_known_where_its_work_is_done_and_nowhere_else() {
        assert_eq!(current(), None);
        let (here, there) = in_request("req_1".into(), async {
            let id = current();
            let there = tokio::task::spawn_blocking(move || go_on_blocking(id, current)).await.unwrap();
            (current(), there)
        })
        .await;
        assert_eq!((here.as_deref(), there.as_deref()), (Some("req_1"), Some("req_1")));
        assert_eq!(go_on(None, async { current() }).await, None);
    }
}
