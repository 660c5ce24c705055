//! Sessions, and conversations, which are sessions under OpenAI's name.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::common::Receipt;
use super::inference::{Answering, ChatMessage, Tool};
use super::responses::InputItem;

#[derive(Serialize, ToSchema)]
pub struct CreateSession {
    model: Option<String>,
    /// A label, unique within the tenant.
    #[schema(min_length = 1, max_length = 100)]
    name: Option<String>,
    /// The system message.
    instructions: Option<String>,
    #[schema(max_items = 128)]
    tools: Option<Vec<Tool>>,
    /// At most 16 strings of 512 characters.
    metadata: Option<BTreeMap<String, String>>,
    seed: Option<i64>,
    kv_dtype: Option<String>,
    /// Deleted when unused for so long.
    #[schema(minimum = 1, maximum = 3_155_760_000_i64)]
    ttl_seconds: Option<i64>,
    /// Never deleted for its age.
    pinned: Option<bool>,
    #[schema(min_length = 1, max_length = 1024)]
    cache_salt: Option<String>,
}

/// Absent fields stay; `null` clears `name` and `ttl_seconds`.
#[derive(Serialize, ToSchema)]
pub struct UpdateSession {
    #[schema(min_length = 1, max_length = 100)]
    name: Option<String>,
    metadata: Option<BTreeMap<String, String>>,
    #[schema(minimum = 1, maximum = 3_155_760_000_i64)]
    ttl_seconds: Option<i64>,
    pinned: Option<bool>,
}

#[derive(Serialize, ToSchema)]
pub struct Session {
    id: String,
    #[schema(pattern = "^session$")]
    object: String,
    model: String,
    #[schema(required)]
    name: Option<String>,
    status: SessionStatus,
    #[schema(required)]
    instructions: Option<String>,
    #[schema(value_type = Vec<Object>)]
    tools: Value,
    metadata: BTreeMap<String, String>,
    /// A 64-bit number.
    seed: u64,
    kv_dtype: String,
    #[schema(required)]
    ttl_seconds: Option<u64>,
    pinned: bool,
    created_at: u64,
    last_active_at: u64,
    tokens: u64,
    kv_tokens: u64,
    kv_bytes: u64,
    /// What its turns have written to the disk.
    bytes_written: u64,
    turns: u64,
    #[schema(required)]
    forked_from: Option<ForkedFrom>,
    #[schema(required)]
    active_turn: Option<String>,
    #[schema(required)]
    error: Option<String>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SessionStatus {
    Idle,
    InProgress,
    RequiresAction,
    Failed,
}

#[derive(Serialize, ToSchema)]
struct ForkedFrom {
    session: String,
    at: u64,
}

/// The new session, and what forking cost.
#[derive(Serialize, ToSchema)]
pub struct Forked {
    #[serde(flatten)]
    session: Session,
    dormouse: Receipt,
}

#[derive(Serialize, ToSchema)]
pub struct SessionItem {
    id: String,
    #[schema(required)]
    turn: Option<String>,
    #[schema(value_type = Object)]
    message: Value,
    token_start: u64,
    token_end: u64,
    created_at: u64,
}

#[derive(Serialize, ToSchema)]
pub struct TurnRequest {
    #[serde(flatten)]
    answering: Answering,
    input: TurnInput,
    /// Answered at once, with 202.
    background: Option<bool>,
}

#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum TurnInput {
    Text(String),
    Messages(Vec<ChatMessage>),
}

#[derive(Serialize, ToSchema)]
pub struct Turn {
    id: String,
    #[schema(pattern = "^session\\.turn$")]
    object: String,
    session: String,
    status: TurnStatus,
    background: bool,
    created_at: u64,
    #[schema(required)]
    completed_at: Option<u64>,
    #[schema(required)]
    finish_reason: Option<TurnFinishReason>,
    #[schema(required)]
    error: Option<String>,
    #[schema(nullable = false)]
    error_code: Option<FailureCode>,
    /// As the model wrote it.
    output_text: String,
    /// Taken apart: `role`, `content`, `reasoning_content`, `tool_calls`.
    #[schema(nullable = false, value_type = Option<Object>)]
    message: Option<Value>,
    /// How `output_text` is to be read.
    #[schema(nullable = false, value_type = Option<Object>)]
    answer_format: Option<Value>,
    usage: TurnUsage,
    #[schema(required)]
    dormouse: Option<Receipt>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum TurnStatus {
    InProgress,
    Completed,
    Cancelled,
    Failed,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum TurnFinishReason {
    Stop,
    Length,
    Cancelled,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum FailureCode {
    OutOfSpace,
    TurnFailed,
}

#[derive(Serialize, ToSchema)]
struct TurnUsage {
    prompt_tokens: u64,
    completion_tokens: u64,
    total_tokens: u64,
    cached_tokens: u64,
    reasoning_tokens: u64,
}

/// A turn's id (the place after it) or a token position.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum Place {
    Turn(String),
    Token(u64),
}

#[derive(Serialize, ToSchema)]
pub struct Fork {
    /// The end if absent.
    at: Option<Place>,
    #[schema(min_length = 1, max_length = 100)]
    name: Option<String>,
}

#[derive(Serialize, ToSchema)]
pub struct Rewind {
    to: Place,
}

#[derive(Serialize, ToSchema)]
pub struct ParkReceipt {
    session: String,
    tokens: u64,
    ram_bytes_released: u64,
    park_ms: f64,
}

/// One line of a session's durable log.
#[derive(Serialize, ToSchema)]
pub struct SessionEvent {
    sequence_number: u64,
    r#type: String,
    #[schema(nullable = false)]
    turn: Option<String>,
    created_at: u64,
    #[schema(value_type = Object)]
    data: Value,
}

#[derive(Serialize, ToSchema)]
pub struct CreateConversation {
    #[schema(max_items = 20)]
    items: Option<Vec<InputItem>>,
    metadata: Option<BTreeMap<String, String>>,
}

#[derive(Serialize, ToSchema)]
pub struct UpdateConversation {
    #[schema(required)]
    metadata: Option<BTreeMap<String, String>>,
}

#[derive(Serialize, ToSchema)]
pub struct CreateItems {
    #[schema(min_items = 1, max_items = 20)]
    items: Vec<InputItem>,
}

#[derive(Serialize, ToSchema)]
pub struct Conversation {
    id: String,
    #[schema(pattern = "^conversation$")]
    object: String,
    created_at: u64,
    metadata: BTreeMap<String, String>,
}
