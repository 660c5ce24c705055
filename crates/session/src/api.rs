//! The objects that sessions are made of, as every door (HTTP, command line) sees them.

use dormouse_answer::{AnswerFormat, OutputFormat, ToolChoice};
use dormouse_engine::{FinishReason, Receipt, Sampling, TokenLogprob};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Whose data it is. Sessions, names, pages and cached prefixes never cross tenants.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Tenant(pub String);

impl Default for Tenant {
    fn default() -> Tenant {
        Tenant("default".into())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SessionStatus {
    Idle,
    InProgress,
    RequiresAction,
    Failed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TurnStatus {
    InProgress,
    Completed,
    Cancelled,
    Failed,
}

/// What kind of failure ended a turn, for programs; its `error` is for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureCode {
    /// No room for KV pages or for the database: the same turn can go well once there is room.
    OutOfSpace,
    TurnFailed,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Session {
    pub id: String,
    /// Always "session".
    pub object: String,
    pub model: String,
    pub name: Option<String>,
    pub status: SessionStatus,
    pub instructions: Option<String>,
    pub tools: Vec<Value>,
    pub metadata: Map<String, Value>,
    pub seed: u64,
    pub kv_dtype: String,
    pub ttl_seconds: Option<u64>,
    pub pinned: bool,
    /// Seconds since the epoch.
    pub created_at: u64,
    pub last_active_at: u64,
    /// Tokens in the log, and how many of them have their KV on disk.
    pub tokens: usize,
    pub kv_tokens: usize,
    pub kv_bytes: u64,
    /// What its turns have written to the disk.
    pub bytes_written: u64,
    pub turns: usize,
    /// The session and token position this one was forked from.
    pub forked_from: Option<ForkedFrom>,
    /// The turn in progress, if any.
    pub active_turn: Option<String>,
    pub error: Option<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ForkedFrom {
    pub session: String,
    pub at: usize,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub struct CreateSession {
    pub model: Option<String>,
    pub name: Option<String>,
    pub instructions: Option<String>,
    #[serde(default)]
    pub tools: Vec<Value>,
    #[serde(default)]
    pub metadata: Map<String, Value>,
    pub seed: Option<u64>,
    pub kv_dtype: Option<String>,
    pub ttl_seconds: Option<u64>,
    #[serde(default)]
    pub pinned: bool,
    /// Computed pages are shared only with sessions and requests of the tenant that have the same salt.
    pub cache_salt: Option<String>,
}

/// Absent fields stay; `name: null` clears the name.
#[derive(Clone, Debug, Default)]
pub struct UpdateSession {
    pub name: Option<Option<String>>,
    pub metadata: Option<Map<String, Value>>,
    pub ttl_seconds: Option<Option<u64>>,
    pub pinned: Option<bool>,
}

#[derive(Clone, Debug, Default)]
pub struct ListSessions {
    /// Id after which the page begins.
    pub after: Option<String>,
    /// 1 to 100.
    pub limit: usize,
    pub status: Option<SessionStatus>,
    /// Include sessions that chat requests without a `session` field made for themselves.
    pub implicit: bool,
}

#[derive(Clone, Debug, Serialize)]
pub struct Page<T> {
    pub data: Vec<T>,
    pub has_more: bool,
}

/// A chat message in OpenAI's shape: `role`, `content` (string), and whatever the role adds (`tool_calls`, `name`, …).
pub type Message = Map<String, Value>;

/// A message, function call, function call output… of a session, in order.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Item {
    pub id: String,
    pub turn: Option<String>,
    pub message: Message,
    /// Range of the token log that holds the item's own text, template tokens around it included.
    pub token_start: usize,
    pub token_end: usize,
    pub created_at: u64,
}

/// How a turn is to be generated.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Generation {
    pub sampling: Sampling,
    /// None: up to the context's end.
    pub max_tokens: Option<usize>,
    pub stop: Vec<String>,
    pub ignore_eos: bool,
    #[serde(default)]
    pub tool_choice: ToolChoice,
    /// The answer may hold several calls.
    #[serde(default = "yes")]
    pub parallel_tool_calls: bool,
    #[serde(default)]
    pub format: OutputFormat,
    /// Report the log-probability of the prompt's tokens, and this many alternatives to each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<u8>,
    /// Further variables of the chat template (`chat_template_kwargs`), e.g. `enable_thinking`.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub template: Map<String, Value>,
}

fn yes() -> bool {
    true
}

impl Default for Generation {
    fn default() -> Generation {
        Generation {
            sampling: Sampling::default(),
            max_tokens: None,
            stop: Vec::new(),
            ignore_eos: false,
            tool_choice: ToolChoice::Auto,
            parallel_tool_calls: true,
            format: OutputFormat::Text,
            prompt_logprobs: None,
            template: Map::new(),
        }
    }
}

#[derive(Clone, Debug)]
pub struct TurnRequest {
    pub input: Vec<Message>,
    /// None: the session's. Others replace them: the prompt is then computed anew (`miss.reason` is `tools_changed`).
    pub tools: Option<Vec<Value>>,
    pub generation: Generation,
    /// Goes on when its client leaves.
    pub background: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Turn {
    pub id: String,
    /// Always "session.turn".
    pub object: String,
    pub session: String,
    pub status: TurnStatus,
    pub background: bool,
    pub created_at: u64,
    pub completed_at: Option<u64>,
    pub finish_reason: Option<FinishReason>,
    pub error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_code: Option<FailureCode>,
    /// The answer so far (whole when the turn is over), as the model wrote it: with the marks of reasoning and calls.
    pub output_text: String,
    /// The answer taken apart: `role`, `content` (null where the answer is calls only), `reasoning_content`, `tool_calls`.
    /// Empty while the turn runs.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub message: Message,
    /// How `output_text` is to be read.
    #[serde(default, skip_serializing_if = "AnswerFormat::is_plain")]
    pub answer_format: AnswerFormat,
    pub usage: Usage,
    pub dormouse: Option<Receipt>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// All tokens of the log before the turn's output.
    pub prompt_tokens: usize,
    /// Output tokens, the end-of-generation token included.
    pub completion_tokens: usize,
    pub total_tokens: usize,
    /// Prompt tokens whose KV was restored and not computed.
    pub cached_tokens: usize,
    /// Output tokens that are reasoning.
    #[serde(default)]
    pub reasoning_tokens: usize,
}

/// One event of a turn's stream. The sequence number is a function of what is said, not of when: 0 `created`,
/// 1 `in_progress`, `2 + i` the text of output token `i` (absent when that token made no text certain and no logprobs
/// were asked for). After `n` output tokens `2 + n` is the text that was held back until none followed (absent when
/// there is none), and `3 + n` the end. So a turn finished after a crash numbers its events as the uninterrupted one
/// would have. Log-probabilities are kept while the turn runs; afterwards its events come without them, and those that
/// told nothing else not at all.
#[derive(Clone, Debug, Serialize)]
pub struct TurnEvent {
    pub sequence_number: u64,
    #[serde(flatten)]
    pub body: TurnEventBody,
}

#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type")]
pub enum TurnEventBody {
    #[serde(rename = "session.turn.created")]
    Created { session: String, turn: String },
    #[serde(rename = "session.turn.in_progress")]
    InProgress {
        session: String,
        turn: String,
        /// Of the prompt's tokens from the second on, where they were asked for.
        #[serde(skip)]
        prompt: Vec<TokenLogprob>,
    },
    #[serde(rename = "session.turn.output_text.delta")]
    Delta {
        delta: String,
        token: u32,
        #[serde(skip_serializing_if = "Option::is_none")]
        logprob: Option<TokenLogprob>,
    },
    #[serde(rename = "session.turn.completed")]
    Completed { turn: Box<Turn> },
    #[serde(rename = "session.turn.cancelled")]
    Cancelled { turn: Box<Turn> },
    #[serde(rename = "session.turn.failed")]
    Failed { turn: Box<Turn> },
}

impl TurnEventBody {
    /// A failed turn's end. What its client saw last may not have become durable and have a number beyond the end's, so a
    /// failure is told to whoever attaches.
    pub fn is_failure(&self) -> bool {
        matches!(self, TurnEventBody::Failed { .. })
    }

    /// Nothing follows this event.
    pub fn is_last(&self) -> bool {
        matches!(
            self,
            TurnEventBody::Completed { .. } | TurnEventBody::Cancelled { .. } | TurnEventBody::Failed { .. }
        )
    }
}

impl Turn {
    /// The sequence number of the turn's last event, once it is over.
    pub fn last_number(&self) -> u64 {
        3 + self.usage.completion_tokens as u64
    }
}

/// A turn that was begun or found again, and its stream. Dropping the stream of a turn that is not `background`
/// and not named by a session request cancels it (see [`crate::Runtime::chat`]).
pub struct TurnStream {
    pub session: String,
    pub turn: String,
    /// How the text of the events is to be read.
    pub answer_format: AnswerFormat,
    pub events: tokio::sync::mpsc::UnboundedReceiver<TurnEvent>,
}

/// `POST /v1/chat/completions`, already parsed.
#[derive(Clone, Debug)]
pub struct ChatRequest {
    pub model: Option<String>,
    pub messages: Vec<Message>,
    /// Id or name of a session: `messages` are then only the new ones. A name that does not exist is created.
    pub session: Option<String>,
    /// In OpenAI's shape. None: those of the session, if it has any (see [`TurnRequest::tools`]).
    pub tools: Option<Vec<Value>>,
    pub generation: Generation,
    /// Independent answers to the same messages.
    pub n: usize,
    /// False: the implicit session is deleted when the answer is complete.
    pub store: bool,
    /// See [`CreateSession::cache_salt`]. A session that is there already keeps its own.
    pub cache_salt: Option<String>,
}

/// One line of a session's durable log.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SessionEvent {
    pub sequence_number: u64,
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub turn: Option<String>,
    pub created_at: u64,
    pub data: Value,
}

/// A place in a session: after a turn, or at a token position.
#[derive(Clone, Debug, PartialEq)]
pub enum Place {
    Turn(String),
    Token(usize),
}

#[derive(Clone, Debug, Serialize)]
pub struct ModelCard {
    pub id: String,
    pub context: usize,
    pub created: u64,
    /// Loaded and answering; else merely known.
    pub loaded: bool,
    pub kv_bytes_per_token: usize,
    /// Identity of the bits: kernel version, ISA tier, dtypes. Goes out as `system_fingerprint`.
    pub numerics: String,
}

/// What `park` gave back.
#[derive(Clone, Debug, Serialize)]
pub struct ParkReceipt {
    pub session: String,
    pub tokens: usize,
    /// KV bytes of the session that left RAM (they stay on disk).
    pub ram_bytes_released: u64,
    pub park_ms: f64,
}

#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error("no session '{0}'")]
    SessionNotFound(String),
    #[error("no turn '{0}' in this session")]
    TurnNotFound(String),
    #[error("no response '{0}'")]
    ResponseNotFound(String),
    #[error("no item '{0}' here")]
    ItemNotFound(String),
    #[error("no API key '{0}'")]
    KeyNotFound(String),
    /// Status 409.
    #[error("the name '{0}' belongs to another API key: choose another, or revoke that key first")]
    KeyNameTaken(String),
    #[error("model '{0}' is not loaded; loaded: {1}")]
    ModelNotFound(String, String),
    /// Status 409.
    #[error("session '{session}' is busy with turn '{turn}': wait for it, or cancel it")]
    Busy { session: String, turn: String },
    /// Status 409.
    #[error("the name '{0}' belongs to another session")]
    NameTaken(String),
    /// Status 400, code `context_length_exceeded`.
    #[error(
        "this model's maximum context length is {context} tokens, but the prompt has {}{tokens} and needs room for an \
         answer: shorten it, or rewind the session (context_length_exceeded)",
        if *or_more { "at least " } else { "" }
    )]
    ContextLengthExceeded {
        context: usize,
        tokens: usize,
        /// Counting stopped when it was clear that the prompt cannot fit.
        or_more: bool,
    },
    /// Status 400; `param` names the field.
    #[error("{message}")]
    Invalid { param: String, message: String },
    /// Status 507.
    #[error("{0}")]
    OutOfSpace(String),
    /// Status 503.
    #[error("the server is stopping")]
    Stopping,
    /// Status 500.
    #[error("{0}")]
    Internal(String),
}
