//! What every request passes before it reaches a route: a request id, who may ask (Host, Origin, API key, limits), and
//! errors in one shape.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use axum::extract::{Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use dormouse_session::{Exposition, SessionError, in_request};
use tower_http::cors::{AllowHeaders, AllowOrigin, AllowPrivateNetwork, CorsLayer};
use tracing::Instrument;

use crate::caller::{is_public, required};
use crate::error::ApiError;
use crate::keyring::{Admitted, Keyring};
use crate::limits::keep_until_sent;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// A longer id of a client is not taken over.
const MOST_ID_BYTES: usize = 128;
/// Browsers ask again whether a page may use the server after this long.
const PREFLIGHT_AGE: Duration = Duration::from_secs(3600);

/// Who may ask.
pub struct Gate {
    pub keyring: Arc<Keyring>,
    /// Requests that name another host than this computer are refused.
    pub loopback_only: bool,
    /// Web pages of these origins may use the server.
    pub cors_origins: Origins,
    /// Of all answers.
    pub counts: Arc<AnswerCounts>,
}

/// Origins whose web pages may use the server; the list may change while it runs. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Origins(Arc<RwLock<Arc<[HeaderValue]>>>);

impl Origins {
    /// Errors: one of them cannot be an origin; then the list is as it was.
    pub fn set(&self, origins: &[String]) -> Result<(), SessionError> {
        let parse = |origin: &String| {
            HeaderValue::from_str(origin).map_err(|_| SessionError::Invalid {
                param: "cors_origin".into(),
                message: format!("'{origin}' is no origin; it should look like https://app.example"),
            })
        };
        let origins: Arc<[HeaderValue]> = origins.iter().map(parse).collect::<Result<_, _>>()?;
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = origins;
        Ok(())
    }

    /// There is at least one.
    pub fn are_listed(&self) -> bool {
        !self.list().is_empty()
    }

    fn list(&self) -> Arc<[HeaderValue]> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Answers by tenant and status.
#[derive(Debug, Default)]
pub struct AnswerCounts(Mutex<BTreeMap<(String, u16), u64>>);

impl AnswerCounts {
    fn count(&self, tenant: Option<&str>, status: StatusCode) {
        // Who has no key that counts is nobody's tenant.
        let key = (tenant.unwrap_or_default().to_owned(), status.as_u16());
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(key).or_default() += 1;
    }

    /// As Prometheus text.
    pub fn text(&self) -> String {
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let name = "dormouse_http_requests_total";
        let mut text = Exposition::default();
        text.declare(
            name,
            "counter",
            "Answers by tenant and status; without a tenant those that needed no key",
        );
        for ((tenant, status), count) in counts {
            text.sample(name, &[("tenant", &tenant), ("status", &status.to_string())], count);
        }
        text.text()
    }
}

impl Gate {
    /// Answers browsers that ask whether a page of another origin may use the server.
    pub fn cors(&self) -> CorsLayer {
        let origins = self.cors_origins.clone();
        CorsLayer::new()
            .allow_origin(AllowOrigin::predicate(move |origin, _| origins.list().contains(origin)))
            .allow_methods([Method::GET, Method::POST, Method::PATCH, Method::DELETE])
            .allow_headers(AllowHeaders::mirror_request())
            .allow_private_network(AllowPrivateNetwork::yes())
            .expose_headers([REQUEST_ID, header::RETRY_AFTER])
            .max_age(PREFLIGHT_AGE)
    }
}

/// Admits or refuses the request. Whatever is logged and recorded on its way carries the id that the response has as
/// `x-request-id`: the client's own, where it sent one that can be used.
pub async fn guard(State(gate): State<Arc<Gate>>, request: Request, next: Next) -> Response {
    let id = match client_id(request.headers()).map_or_else(new_id, Ok) {
        Ok(id) => id,
        Err(error) => return error.into_response(),
    };
    // The query may hold anything; the path holds names and ids alone.
    let (method, path) = (request.method().as_str(), request.uri().path());
    // The turn that it begins is recorded once it has an id: the engine's log lines name that.
    let span = tracing::info_span!("request", id = %id, method, path, turn = tracing::field::Empty);
    let work = in_request(Arc::clone(&id), answer(gate, request, next)).instrument(span);
    let mut response = work.await;
    if let Ok(id) = HeaderValue::try_from(&*id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

/// Letters, digits and a few signs, so that it can be written into a log line as it is.
fn client_id(headers: &HeaderMap) -> Option<Arc<str>> {
    let id = headers.get(REQUEST_ID)?.to_str().ok()?;
    let is_sane = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b':');
    ((1..=MOST_ID_BYTES).contains(&id.len()) && id.bytes().all(is_sane)).then(|| id.into())
}

fn new_id() -> Result<Arc<str>, ApiError> {
    Ok(format!("req_{:016x}", crate::random_u64()?).into())
}

async fn answer(gate: Arc<Gate>, request: Request, next: Next) -> Response {
    let began = Instant::now();
    let admitted = admit(&gate, &request);
    let tenant = match &admitted {
        Ok(admitted) => admitted.as_ref().map(|admitted| admitted.caller.tenant.0.clone()),
        // Who is refused for what they ask is known all the same.
        Err(_) => gate.keyring.admit(request.headers()).ok().map(|admitted| admitted.caller.tenant.0),
    };
    let response = match admitted {
        Ok(None) => in_one_shape(next.run(request).await),
        Ok(Some(admitted)) => match admitted.limits().map(|limits| limits.admit(Instant::now())) {
            None => pass(admitted, request, next).await,
            Some(Ok(None)) => pass(admitted, request, next).await,
            Some(Ok(Some(place))) => keep_until_sent(pass(admitted, request, next).await, place),
            Some(Err(exceeded)) => exceeded.into_response(),
        },
        Err(error) => error.into_response(),
    };
    gate.counts.count(tenant.as_deref(), response.status());
    let (status, head_ms) = (response.status().as_u16(), began.elapsed().as_millis() as u64);
    tracing::info!(tenant, status, head_ms, "answered");
    response
}

async fn pass(admitted: Admitted, mut request: Request, next: Next) -> Response {
    request.extensions_mut().insert(admitted.caller);
    in_one_shape(next.run(request).await)
}

/// Who asks; None where that does not matter.
fn admit(gate: &Gate, request: &Request) -> Result<Option<Admitted>, ApiError> {
    let (headers, path) = (request.headers(), request.uri().path());
    if gate.loopback_only {
        check_host(headers, request.uri().authority())?;
    }
    check_origin(headers, request.method(), &gate.cors_origins.list())?;
    if is_public(path) {
        return Ok(None);
    }
    let admitted = gate.keyring.admit(headers)?;
    required(path).map_or(Ok(()), |scope| admitted.caller.require(scope))?;
    Ok(Some(admitted))
}

fn forbidden(code: &'static str, message: String) -> ApiError {
    ApiError::new(StatusCode::FORBIDDEN, Some(code), message)
}

/// A page of another site can make its own name resolve to 127.0.0.1 (DNS rebinding); its requests then still
/// carry that name.
fn check_host(headers: &HeaderMap, authority: Option<&Authority>) -> Result<(), ApiError> {
    let named = match headers.get(header::HOST) {
        Some(host) => host.to_str().unwrap_or("something unreadable"),
        // HTTP/1.0 has no Host; browsers always send one.
        None => match authority {
            Some(authority) => authority.as_str(),
            None => return Ok(()),
        },
    };
    if named.parse::<Authority>().is_ok_and(|authority| is_loopback(authority.host())) {
        return Ok(());
    }
    Err(forbidden(
        "host_not_allowed",
        format!(
            "this server listens on this computer only, and the request was meant for '{named}'; \
             address it as localhost, 127.0.0.1 or [::1]"
        ),
    ))
}

/// Pages of other sites must not change anything, even where browsers send the request without asking first; except those
/// of `listed` origins.
fn check_origin(headers: &HeaderMap, method: &Method, listed: &[HeaderValue]) -> Result<(), ApiError> {
    if matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS) {
        return Ok(());
    }
    let Some(origin) = headers.get(header::ORIGIN) else { return Ok(()) };
    if listed.contains(origin) {
        return Ok(());
    }
    let authority = origin.to_str().ok().and_then(|text| text.split_once("://")?.1.parse::<Authority>().ok());
    let own = headers.get(header::HOST).map(HeaderValue::as_bytes);
    match authority {
        Some(authority) if is_loopback(authority.host()) || own == Some(authority.as_str().as_bytes()) => {
            Ok(())
        }
        _ => Err(forbidden(
            "origin_not_allowed",
            format!(
                "web pages of {origin:?} may not use this server; call it from a program or from a local page, or \
                 start it with --cors-origin"
            ),
        )),
    }
}

fn is_loopback(host: &str) -> bool {
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    host.eq_ignore_ascii_case("localhost")
        || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Errors that the framework made itself (a broken path, for one) are plain text: clients get them as JSON too.
fn in_one_shape(response: Response) -> Response {
    let status = response.status();
    let is_error = status.is_client_error() || status.is_server_error();
    let is_text = response
        .headers()
        .get(header::CONTENT_TYPE)
        .is_none_or(|kind| kind.as_bytes().starts_with(b"text/plain"));
    if !is_error || !is_text {
        return response;
    }
    let reason = status.canonical_reason().unwrap_or("error");
    ApiError::new(status, None, format!("the request's address or head could not be understood: {reason}"))
        .into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::Router;
    use axum::body::Body;
    use axum::routing::any;
    use tower::ServiceExt;

    async fn ask(gate: Gate, method: Method, headers: &[(&str, &str)]) -> Response {
        let router = Router::new()
            .route("/", any(async || "fine"))
            .route("/teapot", any(async || (StatusCode::IM_A_TEAPOT, "plain")))
            .layer(axum::middleware::from_fn_with_state(Arc::new(gate), guard));
        let mut request = Request::builder().method(method).uri("/");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        router.oneshot(request.body(Body::empty()).unwrap()).await.unwrap()
    }

    fn local() -> Gate {
        Gate { loopback_only: true, ..anywhere(None) }
    }

    fn anywhere(key: Option<&str>) -> Gate {
        let keyring = Keyring::new(key, key.is_some(), Vec::new());
        let origins = Origins::default();
        origins.set(&["https://app.example".into()]).unwrap();
        Gate {
            keyring: Arc::new(keyring),
            loopback_only: false,
            cors_origins: origins,
            counts: Arc::default(),
        }
    }

    #[tokio::test]
    async fn a_loopback_server_answers_only_to_loopback_names() {
        for host in ["localhost", "localhost:8642", "127.0.0.1:1", "[::1]:8642", "LOCALHOST:5"] {
            assert_eq!(ask(local(), Method::GET, &[("host", host)]).await.status(), 200, "{host}");
        }
        for host in ["evil.example", "localhost.evil.example:8642", "10.0.0.1", "127.0.0.1.nip.io"] {
            assert_eq!(ask(local(), Method::GET, &[("host", host)]).await.status(), 403, "{host}");
        }
        assert_eq!(ask(anywhere(None), Method::GET, &[("host", "box.lan")]).await.status(), 200);
    }

    #[tokio::test]
    async fn a_foreign_web_page_may_change_nothing() {
        let foreign = [("host", "localhost:1"), ("origin", "https://evil.example")];
        assert_eq!(ask(local(), Method::POST, &foreign).await.status(), 403);
        assert_eq!(
            ask(local(), Method::POST, &[("host", "localhost:1"), ("origin", "null")]).await.status(),
            403
        );
        let own = [("host", "localhost:1"), ("origin", "http://localhost:3000")];
        assert_eq!(ask(local(), Method::POST, &own).await.status(), 200);
        let listed = [("host", "localhost:1"), ("origin", "https://app.example")];
        assert_eq!(ask(local(), Method::POST, &listed).await.status(), 200);
    }

    #[tokio::test]
    async fn the_key_is_asked_for_and_compared() {
        let locked = || anywhere(Some("secret"));
        assert_eq!(ask(locked(), Method::GET, &[]).await.status(), 401);
        assert_eq!(ask(locked(), Method::GET, &[("authorization", "Bearer wrong")]).await.status(), 401);
        assert_eq!(ask(locked(), Method::GET, &[("authorization", "bearer secret")]).await.status(), 200);
    }

    #[tokio::test]
    async fn every_response_has_its_own_request_id() {
        let one = ask(local(), Method::GET, &[]).await.headers()["x-request-id"].clone();
        let other =
            ask(local(), Method::GET, &[("host", "evil.example")]).await.headers()["x-request-id"].clone();
        assert_ne!(one, other);
    }

    #[test]
    fn plain_text_errors_become_openais_shape() {
        let response = in_one_shape((StatusCode::BAD_REQUEST, "no").into_response());
        assert_eq!(response.headers()[header::CONTENT_TYPE], "application/json");
        assert_eq!(
            in_one_shape("fine".into_response()).headers()[header::CONTENT_TYPE],
            "text/plain; charset=utf-8"
        );
    }
}
