//! What all parts of the API have in common.

use serde::Serialize;
use utoipa::ToSchema;

/// Every failure.
#[derive(Serialize, ToSchema)]
pub struct ErrorBody {
    error: ErrorObject,
}

#[derive(Serialize, ToSchema)]
#[schema(example = json!({"message": "no session 'x'", "type": "invalid_request_error", "param": "session",
    "code": "session_not_found"}))]
struct ErrorObject {
    /// What was tried, on what, and what to do: for people.
    message: String,
    r#type: ErrorType,
    /// The field of the request that is to blame.
    #[schema(required)]
    param: Option<String>,
    /// For programs.
    #[schema(required)]
    code: Option<String>,
}

#[derive(Serialize, ToSchema)]
enum ErrorType {
    #[serde(rename = "authentication_error")]
    Authentication,
    #[serde(rename = "permission_error")]
    Permission,
    #[serde(rename = "rate_limit_error")]
    RateLimit,
    #[serde(rename = "server_error")]
    Server,
    #[serde(rename = "invalid_request_error")]
    InvalidRequest,
}

/// What resuming the conversation cost.
#[derive(Serialize, ToSchema)]
pub struct Receipt {
    /// The session that holds the conversation.
    session: String,
    /// Prompt tokens whose KV was found.
    restored_tokens: u64,
    /// Tokens that had been computed before, and had to be computed again.
    recomputed_tokens: u64,
    tier: Tier,
    restore_ms: f64,
    bytes_read: u64,
    queue_ms: f64,
    ttft_ms: f64,
    /// Time that the turn had given its pages to others.
    paused_ms: f64,
    /// Speculation: guessed tokens that were computed ahead, and those of them that became output.
    drafted_tokens: u64,
    accepted_tokens: u64,
    /// The answer has the bits that an uninterrupted run would have had.
    exact: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    miss: Option<Miss>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum Tier {
    Device,
    Ram,
    Disk,
    None,
}

/// Why restored tokens end where they end.
#[derive(Serialize, ToSchema)]
struct Miss {
    reason: String,
    at_token: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    at_message: Option<u64>,
}

/// Each event of a stream: after `data: ` a JSON object, or `[DONE]`.
#[derive(Serialize, ToSchema)]
pub struct ServerSentEvent {
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    event: Option<String>,
    data: String,
}

#[derive(Serialize, ToSchema)]
pub struct Deleted {
    id: String,
    object: String,
    deleted: bool,
}

#[derive(Serialize, ToSchema)]
pub struct Health {
    status: HealthStatus,
    /// What is wrong, if something is.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    reason: Option<String>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum HealthStatus {
    Ok,
    Unhealthy,
}

#[derive(Serialize, ToSchema)]
pub struct ModelList {
    #[schema(pattern = "^list$")]
    object: String,
    data: Vec<Model>,
}

#[derive(Serialize, ToSchema)]
pub struct Model {
    id: String,
    #[schema(pattern = "^model$")]
    object: String,
    created: u64,
    owned_by: String,
    dormouse: ModelDetails,
}

#[derive(Serialize, ToSchema)]
struct ModelDetails {
    state: ModelState,
    loaded: bool,
    kind: ModelKind,
    /// Tokens.
    context: u64,
    #[schema(nullable = false)]
    kv_bytes_per_token: Option<u64>,
    /// Identity of the arithmetic.
    #[schema(nullable = false)]
    numerics: Option<String>,
    /// Of an embedding model.
    #[schema(nullable = false)]
    dimensions: Option<u64>,
    #[schema(nullable = false)]
    size_bytes: Option<u64>,
    #[schema(nullable = false)]
    licence: Option<String>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum ModelState {
    Loaded,
    Downloaded,
    Known,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum ModelKind {
    Chat,
    Embedding,
}

#[derive(Serialize, ToSchema)]
pub struct NewApiKey {
    #[schema(min_length = 1, max_length = 100)]
    name: String,
    /// Whose sessions it sees; `default` if absent.
    #[schema(pattern = "^[A-Za-z0-9_.-]{1,64}$")]
    tenant: Option<String>,
    /// `inference` and `sessions` if absent.
    #[schema(min_items = 1)]
    scopes: Option<Vec<Scope>>,
    #[schema(minimum = 1, maximum = 1_000_000)]
    requests_per_minute: Option<u32>,
    /// Requests that may be on their way at once.
    #[schema(minimum = 1, maximum = 10_000)]
    concurrency: Option<u32>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    Inference,
    Sessions,
    Admin,
}

#[derive(Serialize, ToSchema)]
pub struct ApiKey {
    id: String,
    #[schema(pattern = "^api_key$")]
    object: String,
    name: String,
    tenant: String,
    scopes: Vec<Scope>,
    #[schema(required)]
    requests_per_minute: Option<u32>,
    #[schema(required)]
    concurrency: Option<u32>,
    created_at: u64,
    #[schema(required)]
    revoked_at: Option<u64>,
}

/// A key that was just made.
#[derive(Serialize, ToSchema)]
pub struct CreatedApiKey {
    #[serde(flatten)]
    key: ApiKey,
    /// Shown this once.
    secret: String,
}
