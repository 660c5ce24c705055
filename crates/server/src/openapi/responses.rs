//! OpenAI's Responses API.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::common::Receipt;
use super::inference::{Content, OutputTokensDetails, PromptTokensDetails, Sampling, ToolChoice};

/// OpenAI's Responses API; `docs/api.md` says which of its fields mean something here.
#[derive(Serialize, ToSchema)]
pub struct ResponseRequest {
    #[serde(flatten)]
    sampling: Sampling,
    model: Option<String>,
    input: ResponseInput,
    instructions: Option<String>,
    previous_response_id: Option<String>,
    /// Id of a conversation, or an object with it.
    #[schema(value_type = Option<ConversationReference>)]
    conversation: Option<Value>,
    store: Option<bool>,
    /// Needs `store`.
    background: Option<bool>,
    stream: Option<bool>,
    #[schema(minimum = 1)]
    max_output_tokens: Option<i64>,
    truncation: Option<Truncation>,
    #[schema(value_type = Option<Vec<Object>>, max_items = 128)]
    tools: Option<Value>,
    #[schema(value_type = Option<ToolChoice>)]
    tool_choice: Option<Value>,
    parallel_tool_calls: Option<bool>,
    #[schema(value_type = Option<Object>)]
    text: Option<Value>,
    #[schema(value_type = Option<Object>)]
    reasoning: Option<Value>,
    include: Option<Vec<String>>,
    #[schema(minimum = 0, maximum = 20)]
    top_logprobs: Option<u8>,
    metadata: Option<BTreeMap<String, String>>,
    #[schema(min_length = 1, max_length = 1024)]
    cache_salt: Option<String>,
}

#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum ConversationReference {
    Id(String),
    #[schema(value_type = Object)]
    Object(Value),
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum Truncation {
    Auto,
    Disabled,
}

#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum ResponseInput {
    Text(String),
    Items(Vec<InputItem>),
}

/// A message, a function call, its output, a reasoning item, or a reference to any of them.
#[derive(Serialize, ToSchema)]
pub struct InputItem {
    /// `message` if absent.
    r#type: Option<String>,
    role: Option<String>,
    #[schema(value_type = Option<Content>)]
    content: Option<Value>,
    id: Option<String>,
    call_id: Option<String>,
    name: Option<String>,
    arguments: Option<String>,
    #[schema(value_type = Option<Content>)]
    output: Option<Value>,
}

/// A message, a reasoning item, a function call or its output.
#[derive(Serialize, ToSchema)]
pub struct ResponseItem {
    id: String,
    r#type: String,
    #[schema(nullable = false)]
    status: Option<String>,
    #[schema(nullable = false)]
    role: Option<String>,
    #[schema(nullable = false, value_type = Option<Vec<Object>>)]
    content: Option<Value>,
    #[schema(nullable = false)]
    call_id: Option<String>,
    #[schema(nullable = false)]
    name: Option<String>,
    #[schema(nullable = false)]
    arguments: Option<String>,
    #[schema(nullable = false)]
    output: Option<String>,
}

#[derive(Serialize, ToSchema)]
pub struct ResponseObject {
    id: String,
    #[schema(pattern = "^response$")]
    object: String,
    created_at: u64,
    #[schema(required)]
    completed_at: Option<u64>,
    model: String,
    status: ResponseStatus,
    output: Vec<ResponseItem>,
    #[schema(required)]
    error: Option<ResponseError>,
    #[schema(required)]
    incomplete_details: Option<IncompleteDetails>,
    #[schema(required)]
    instructions: Option<String>,
    #[schema(required)]
    previous_response_id: Option<String>,
    #[schema(required, value_type = Option<Object>)]
    conversation: Option<Value>,
    background: bool,
    store: bool,
    parallel_tool_calls: bool,
    #[schema(value_type = ToolChoice)]
    tool_choice: Value,
    #[schema(value_type = Vec<Object>)]
    tools: Value,
    temperature: f64,
    top_p: f64,
    truncation: Truncation,
    metadata: BTreeMap<String, String>,
    #[schema(required)]
    usage: Option<ResponseUsage>,
    #[schema(required, value_type = Option<Object>)]
    prompt_cache_diagnostics: Option<Value>,
    #[schema(required)]
    dormouse: Option<Receipt>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum ResponseStatus {
    Queued,
    InProgress,
    Completed,
    Incomplete,
    Cancelled,
    Failed,
}

#[derive(Serialize, ToSchema)]
struct ResponseError {
    code: String,
    message: String,
}

#[derive(Serialize, ToSchema)]
struct IncompleteDetails {
    reason: String,
}

#[derive(Serialize, ToSchema)]
struct ResponseUsage {
    input_tokens: u64,
    input_tokens_details: PromptTokensDetails,
    output_tokens: u64,
    output_tokens_details: OutputTokensDetails,
    total_tokens: u64,
}

#[derive(Serialize, ToSchema)]
pub struct InputTokens {
    #[schema(pattern = "^response\\.input_tokens$")]
    object: String,
    input_tokens: u64,
}
