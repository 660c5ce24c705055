//! Chat completions, completions and embeddings.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::common::Receipt;

/// How tokens are chosen.
#[derive(Serialize, ToSchema)]
pub struct Sampling {
    /// 0 always takes the likeliest token.
    #[schema(minimum = 0, maximum = 2)]
    temperature: Option<f64>,
    #[schema(minimum = 0, maximum = 1)]
    top_p: Option<f64>,
    /// 0 and -1: off.
    #[schema(minimum = -1, maximum = 4_294_967_295_i64)]
    top_k: Option<i64>,
    #[schema(minimum = 0, maximum = 1)]
    min_p: Option<f64>,
    #[schema(minimum = 0.01, maximum = 100)]
    repetition_penalty: Option<f64>,
    #[schema(minimum = -2, maximum = 2)]
    presence_penalty: Option<f64>,
    #[schema(minimum = -2, maximum = 2)]
    frequency_penalty: Option<f64>,
    /// Token ids to what is added to their logits, -100 to 100.
    logit_bias: Option<BTreeMap<String, f64>>,
    seed: Option<i64>,
    stop: Option<Stop>,
    /// Go on after end-of-generation tokens.
    ignore_eos: Option<bool>,
}

/// The answer ends before the first of them: at most 16, of 1 to 1,024 bytes.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum Stop {
    One(String),
    Many(Vec<String>),
}

/// What chats and turns of sessions have in common.
#[derive(Serialize, ToSchema)]
pub struct Answering {
    #[serde(flatten)]
    sampling: Sampling,
    #[schema(minimum = 1)]
    max_tokens: Option<i64>,
    /// Wins over `max_tokens`.
    #[schema(minimum = 1)]
    max_completion_tokens: Option<i64>,
    logprobs: Option<bool>,
    /// Needs `logprobs`.
    #[schema(minimum = 0, maximum = 20)]
    top_logprobs: Option<u8>,
    #[schema(max_items = 128)]
    tools: Option<Vec<Tool>>,
    /// `none`, `auto`, `required`, or an object that names functions.
    tool_choice: Option<ToolChoice>,
    parallel_tool_calls: Option<bool>,
    response_format: Option<ResponseFormat>,
    /// Further variables of the chat template.
    #[schema(value_type = Option<Object>)]
    chat_template_kwargs: Option<Value>,
    reasoning_effort: Option<String>,
    stream: Option<bool>,
}

#[derive(Serialize, ToSchema)]
pub struct Tool {
    #[schema(pattern = "^function$")]
    r#type: String,
    function: Function,
}

#[derive(Serialize, ToSchema)]
struct Function {
    #[schema(pattern = "^[A-Za-z0-9_.-]{1,64}$")]
    name: String,
    description: Option<String>,
    /// JSON Schema.
    #[schema(value_type = Option<Object>)]
    parameters: Option<Value>,
    strict: Option<bool>,
}

#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub enum ToolChoice {
    Word(ToolChoiceWord),
    #[schema(value_type = Object)]
    Named(Value),
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ToolChoiceWord {
    None,
    Auto,
    Required,
}

#[derive(Serialize, ToSchema)]
struct ResponseFormat {
    r#type: ResponseFormatType,
    /// `{name, schema, strict?}`, of the type `json_schema`.
    #[schema(value_type = Option<Object>)]
    json_schema: Option<Value>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum ResponseFormatType {
    Text,
    JsonObject,
    JsonSchema,
}

#[derive(Serialize, ToSchema)]
pub struct ChatRequest {
    #[serde(flatten)]
    answering: Answering,
    /// Id of a loaded model; the first loaded one if absent.
    model: Option<String>,
    #[schema(min_items = 1)]
    messages: Vec<ChatMessage>,
    stream_options: Option<StreamOptions>,
    #[schema(minimum = 1, maximum = 16)]
    n: Option<u8>,
    /// Dormouse: id or name of a session; `messages` are then only the new ones.
    session: Option<String>,
    /// False: nothing is kept.
    store: Option<bool>,
    /// What is computed is used only by requests with the same salt.
    #[schema(min_length = 1, max_length = 1024)]
    cache_salt: Option<String>,
}

#[derive(Serialize, ToSchema)]
pub struct StreamOptions {
    include_usage: Option<bool>,
}

#[derive(Serialize, ToSchema)]
pub struct ChatMessage {
    role: Role,
    /// May be absent of an assistant's message.
    content: Option<Content>,
    name: Option<String>,
    tool_calls: Option<Vec<ToolCall>>,
    tool_call_id: Option<String>,
    reasoning_content: Option<String>,
    reasoning: Option<String>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum Role {
    System,
    Developer,
    User,
    Assistant,
    Tool,
}

#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub enum Content {
    Text(String),
    Parts(Vec<TextPart>),
}

#[derive(Serialize, ToSchema)]
pub struct TextPart {
    r#type: TextPartType,
    text: String,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum TextPartType {
    Text,
    InputText,
    OutputText,
}

#[derive(Serialize, ToSchema)]
pub struct ToolCall {
    id: String,
    #[schema(pattern = "^function$")]
    r#type: String,
    function: CalledFunction,
}

#[derive(Serialize, ToSchema)]
struct CalledFunction {
    name: String,
    /// JSON.
    arguments: String,
}

#[derive(Serialize, ToSchema)]
pub struct ChatCompletion {
    id: String,
    #[schema(pattern = "^chat\\.completion$")]
    object: String,
    created: u64,
    model: String,
    system_fingerprint: String,
    choices: Vec<ChatChoice>,
    usage: Usage,
    #[schema(required)]
    dormouse: Option<Receipt>,
}

#[derive(Serialize, ToSchema)]
struct ChatChoice {
    index: u64,
    message: ChatAnswer,
    #[schema(required)]
    logprobs: Option<ChatLogprobs>,
    finish_reason: FinishReason,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum FinishReason {
    Stop,
    Length,
    ToolCalls,
}

#[derive(Serialize, ToSchema)]
struct ChatAnswer {
    #[schema(pattern = "^assistant$")]
    role: String,
    #[schema(required)]
    content: Option<String>,
    #[schema(required)]
    refusal: Option<String>,
    reasoning_content: Option<String>,
    reasoning: Option<String>,
    #[schema(nullable = false)]
    tool_calls: Option<Vec<ToolCall>>,
}

#[derive(Serialize, ToSchema)]
struct ChatLogprobs {
    content: Vec<TokenLogprob>,
    #[schema(required, value_type = Option<Vec<Object>>)]
    refusal: Option<Value>,
}

#[derive(Serialize, ToSchema)]
struct TokenLogprob {
    token: String,
    logprob: f64,
    bytes: Vec<u8>,
    top_logprobs: Vec<Alternative>,
}

#[derive(Serialize, ToSchema)]
struct Alternative {
    token: String,
    logprob: f64,
    bytes: Vec<u8>,
}

#[derive(Serialize, ToSchema)]
struct Usage {
    prompt_tokens: u64,
    completion_tokens: u64,
    total_tokens: u64,
    prompt_tokens_details: PromptTokensDetails,
    #[schema(nullable = false)]
    completion_tokens_details: Option<OutputTokensDetails>,
}

#[derive(Serialize, ToSchema)]
pub struct PromptTokensDetails {
    cached_tokens: u64,
}

#[derive(Serialize, ToSchema)]
pub struct OutputTokensDetails {
    reasoning_tokens: u64,
}

#[derive(Serialize, ToSchema)]
pub struct CompletionRequest {
    #[serde(flatten)]
    sampling: Sampling,
    model: Option<String>,
    prompt: Prompt,
    /// 0 scores the prompt and writes nothing, together with `echo` and `logprobs`.
    #[schema(minimum = 0, default = 16)]
    max_tokens: Option<i64>,
    #[schema(minimum = 1, maximum = 1024)]
    n: Option<u16>,
    /// The same as `n`, or absent.
    #[schema(minimum = 1, maximum = 1024)]
    best_of: Option<u16>,
    /// The answer begins with the prompt; with `logprobs`, its tokens are scored.
    echo: Option<bool>,
    #[schema(minimum = 0, maximum = 5)]
    logprobs: Option<u8>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    #[schema(min_length = 1, max_length = 1024)]
    cache_salt: Option<String>,
}

#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum Prompt {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    ManyTokens(Vec<Vec<u32>>),
}

#[derive(Serialize, ToSchema)]
pub struct Completion {
    id: String,
    #[schema(pattern = "^text_completion$")]
    object: String,
    created: u64,
    model: String,
    system_fingerprint: String,
    choices: Vec<CompletionChoice>,
    usage: Usage,
    #[schema(required)]
    dormouse: Option<Receipt>,
}

#[derive(Serialize, ToSchema)]
struct CompletionChoice {
    index: u64,
    text: String,
    #[schema(required)]
    logprobs: Option<CompletionLogprobs>,
    finish_reason: FinishReason,
}

/// Four lists of one length.
#[derive(Serialize, ToSchema)]
struct CompletionLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f64>>,
    top_logprobs: Vec<Option<BTreeMap<String, f64>>>,
    text_offset: Vec<u64>,
}

#[derive(Serialize, ToSchema)]
pub struct EmbeddingRequest {
    input: EmbeddingInput,
    model: Option<String>,
    encoding_format: Option<EncodingFormat>,
    #[schema(minimum = 1)]
    dimensions: Option<u32>,
}

#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum EmbeddingInput {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    ManyTokens(Vec<Vec<u32>>),
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum EncodingFormat {
    Float,
    Base64,
}

#[derive(Serialize, ToSchema)]
pub struct Embeddings {
    #[schema(pattern = "^list$")]
    object: String,
    data: Vec<Embedding>,
    model: String,
    usage: EmbeddingUsage,
}

#[derive(Serialize, ToSchema)]
struct Embedding {
    #[schema(pattern = "^embedding$")]
    object: String,
    index: u64,
    embedding: Vector,
}

#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum Vector {
    Numbers(Vec<f64>),
    /// Of the little-endian bytes of 32-bit floats.
    Base64(String),
}

#[derive(Serialize, ToSchema)]
struct EmbeddingUsage {
    prompt_tokens: u64,
    total_tokens: u64,
}
