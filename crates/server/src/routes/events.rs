//! `/v1/sessions/{id}/events`: the durable log, as a list or as a stream that goes on.

use axum::Json;
use axum::extract::Path;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use tokio_stream::wrappers::UnboundedReceiverStream;

use super::{list_object, to_value};
use crate::App;
use crate::body::Params;
use crate::error::ApiError;
use crate::sse;

pub async fn events(
    app: App,
    Path(session): Path<String>,
    params: Params,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let starting_after = params.number("starting_after")?;
    if params.flag("stream")? || accepts_stream(&headers) {
        let events = app.runtime.follow_events(&app.caller.tenant, &session, starting_after).await?;
        let frames = UnboundedReceiverStream::new(events).map(|event| sse::named(&event.kind, &event));
        return Ok(sse::respond(frames));
    }
    let limit = params.limit(100, 1000)?;
    // One more than asked for tells whether there are more.
    let mut events = app.runtime.events(&app.caller.tenant, &session, starting_after, limit + 1).await?;
    let has_more = events.len() > limit;
    events.truncate(limit);
    let data = events.iter().map(to_value).collect::<Result<_, _>>()?;
    Ok(Json(list_object(data, has_more)).into_response())
}

fn accepts_stream(headers: &HeaderMap) -> bool {
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok());
    accept.is_some_and(|accept| accept.contains("text/event-stream"))
}
