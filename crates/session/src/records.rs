//! What the session crate writes into the store's JSON columns, and how it becomes the API's objects.

use dormouse_answer::AnswerFormat;
use dormouse_engine::{FinishReason, Receipt};
use dormouse_store::{EventRow, ItemRow, NewEvent, SessionRow, StoreError, TurnRow};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::answers;
use crate::api::*;
use crate::request;

/// What a prompt begins with.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Frame {
    pub instructions: Option<String>,
    pub tools: Vec<Value>,
}

impl Frame {
    /// What `other` has, where this has nothing.
    pub fn or(self, other: &Frame) -> Frame {
        Frame {
            instructions: self.instructions.or_else(|| other.instructions.clone()),
            tools: if self.tools.is_empty() { other.tools.clone() } else { self.tools },
        }
    }
}

/// A session's settings.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Settings {
    pub model: String,
    /// Identity of the tokenizer that the log was made with, in hexadecimal.
    pub tokenizer: String,
    /// Fingerprint of the model that computed last, in hexadecimal.
    pub fingerprint: String,
    /// What the log begins with.
    pub instructions: Option<String>,
    pub tools: Vec<Value>,
    /// The session's own instructions and tools, where the last turn had others for itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub own: Option<Frame>,
    pub metadata: Map<String, Value>,
    pub seed: u64,
    pub kv_dtype: String,
    pub ttl_seconds: Option<u64>,
    pub pinned: bool,
    pub forked_from: Option<ForkedFrom>,
    /// Its pages are shared only with sessions that have the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_salt: Option<String>,
}

impl Settings {
    /// When the sweeper may take a session that was last used at `now_ms`.
    pub fn expires_ms(&self, now_ms: u64) -> Option<u64> {
        // The database's integers are signed.
        let after = |ttl: u64| now_ms.saturating_add(ttl.saturating_mul(1000)).min(i64::MAX as u64);
        self.ttl_seconds.filter(|_| !self.pinned).map(after)
    }
}

/// A turn: what was asked for, and how it went.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct TurnRecord {
    pub status: TurnStatus,
    pub background: bool,
    pub generation: Generation,
    /// Tokens of the log that were there before the turn's input.
    pub input_start: usize,
    /// Delete the session when the turn is over.
    pub delete_after: bool,
    /// Its pages stay as cache all the same.
    #[serde(default)]
    pub keep_pages: bool,
    pub completed_ms: Option<u64>,
    pub finish_reason: Option<FinishReason>,
    pub error: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_code: Option<FailureCode>,
    pub output_text: String,
    #[serde(default, skip_serializing_if = "AnswerFormat::is_plain")]
    pub answer_format: AnswerFormat,
    /// Keep the output tokens here, too: the events of a response are told again whatever becomes of the log.
    #[serde(default)]
    pub keep_output: bool,
    /// The output tokens: where they are to be kept, and of an answer that ended with a stop string, as the next turn takes
    /// them out of the log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<Vec<u32>>,
    pub usage: Usage,
    pub receipt: Option<Receipt>,
}

/// A message, and whether the model generated it: then its token range is exact, and stays in the log as it was
/// sampled.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct StoredMessage {
    pub message: Message,
    pub generated: bool,
}

/// An item as the session crate works with it.
#[derive(Clone, Debug)]
pub(crate) struct KnownItem {
    pub id: String,
    pub turn: Option<String>,
    pub message: Message,
    pub generated: bool,
    pub token_start: usize,
    pub token_end: usize,
    pub created_ms: u64,
}

impl KnownItem {
    pub fn from_row(row: ItemRow) -> Result<KnownItem, SessionError> {
        let stored: StoredMessage = decode(&row.message)?;
        Ok(KnownItem {
            id: row.id,
            turn: row.turn,
            message: stored.message,
            generated: stored.generated,
            token_start: row.token_start,
            token_end: row.token_end,
            created_ms: row.created_ms,
        })
    }

    pub fn to_row(&self) -> Result<ItemRow, SessionError> {
        let stored = StoredMessage { message: self.message.clone(), generated: self.generated };
        Ok(ItemRow {
            id: self.id.clone(),
            turn: self.turn.clone(),
            token_start: self.token_start,
            token_end: self.token_end,
            created_ms: self.created_ms,
            message: encode(&stored)?,
        })
    }

    pub fn into_api(self) -> Item {
        Item {
            id: self.id,
            turn: self.turn,
            message: self.message,
            token_start: self.token_start,
            token_end: self.token_end,
            created_at: self.created_ms / 1000,
        }
    }

    pub fn content(&self) -> &str {
        content(&self.message)
    }
}

pub(crate) fn items(rows: Vec<ItemRow>) -> Result<Vec<KnownItem>, SessionError> {
    rows.into_iter().map(KnownItem::from_row).collect()
}

/// A message's text; empty when it has none.
pub(crate) fn content(message: &Message) -> &str {
    message.get("content").and_then(Value::as_str).unwrap_or("")
}

pub(crate) fn message(role: &str, content: &str) -> Message {
    Map::from_iter([("role".to_owned(), Value::from(role)), ("content".to_owned(), Value::from(content))])
}

pub(crate) fn encode<T: Serialize>(value: &T) -> Result<String, SessionError> {
    serde_json::to_string(value)
        .map_err(|why| SessionError::Internal(format!("cannot write a record: {why}")))
}

/// Records are checked by the store; one that does not parse was written by another version.
pub(crate) fn decode<T: DeserializeOwned>(text: &str) -> Result<T, SessionError> {
    serde_json::from_str(text).map_err(|why| {
        SessionError::Internal(format!(
            "a record of the metadata database cannot be read by this version: {why}"
        ))
    })
}

pub(crate) fn session(row: SessionRow, settings: Settings, kv_token_bytes: usize) -> Session {
    let status = match (&row.active_turn, &row.error) {
        (Some(_), _) => SessionStatus::InProgress,
        (None, Some(_)) => SessionStatus::Failed,
        (None, None) if row.waits => SessionStatus::RequiresAction,
        (None, None) => SessionStatus::Idle,
    };
    let held = Frame { instructions: settings.instructions, tools: settings.tools };
    let own = settings.own.unwrap_or(held);
    Session {
        id: row.id,
        object: "session".into(),
        model: settings.model,
        name: row.name,
        status,
        instructions: own.instructions,
        tools: own.tools,
        metadata: settings.metadata,
        seed: settings.seed,
        kv_dtype: settings.kv_dtype,
        ttl_seconds: settings.ttl_seconds,
        pinned: settings.pinned,
        created_at: row.created_ms / 1000,
        last_active_at: row.last_active_ms / 1000,
        tokens: row.log_len,
        kv_tokens: row.kv_len,
        kv_bytes: (row.kv_len * kv_token_bytes) as u64,
        bytes_written: row.bytes_written,
        turns: row.turns,
        forked_from: settings.forked_from,
        active_turn: row.active_turn,
        error: row.error,
    }
}

/// Tokens of a log that its past turns certainly computed, whatever has become of their pages since: all but the last
/// one that was sampled.
pub(crate) fn computed(turns: &[TurnRow]) -> usize {
    let sampled =
        |row: &TurnRow| row.output_end.filter(|end| row.output_start.is_some_and(|start| start < *end));
    turns.iter().rev().find_map(sampled).map_or(0, |end| end - 1)
}

pub(crate) fn turn(session: &str, row: &TurnRow) -> Result<Turn, SessionError> {
    let record: TurnRecord = decode(&row.record)?;
    Ok(turn_of(session, &row.id, row.created_ms, record))
}

pub(crate) fn turn_of(session: &str, id: &str, created_ms: u64, record: TurnRecord) -> Turn {
    let mut message = Map::new();
    if record.status != TurnStatus::InProgress {
        message = answers::answer_message(id, &record.answer_format, &record.output_text);
        if message.contains_key("tool_calls") && content(&message).is_empty() {
            message.insert("content".into(), Value::Null);
        }
    }
    Turn {
        id: id.to_owned(),
        object: "session.turn".into(),
        session: session.to_owned(),
        status: record.status,
        background: record.background,
        created_at: created_ms / 1000,
        completed_at: record.completed_ms.map(|at| at / 1000),
        finish_reason: record.finish_reason,
        error: record.error,
        error_code: record.error_code,
        output_text: record.output_text,
        message,
        answer_format: record.answer_format,
        usage: record.usage,
        dormouse: record.receipt,
    }
}

pub(crate) fn session_event(row: EventRow) -> Result<SessionEvent, SessionError> {
    Ok(SessionEvent {
        sequence_number: row.sequence,
        data: decode(&row.data)?,
        kind: row.kind,
        turn: row.turn,
        created_at: row.created_ms / 1000,
    })
}

/// `data` is an object; it also names the request that the event comes from, where one is being answered.
pub(crate) fn new_event(kind: &str, turn: Option<&str>, mut data: Value) -> NewEvent {
    if let (Some(fields), Some(request)) = (data.as_object_mut(), request::current()) {
        fields.insert("request_id".to_owned(), Value::from(&*request));
    }
    NewEvent { kind: kind.to_owned(), turn: turn.map(str::to_owned), data: data.to_string() }
}

pub(crate) fn hex(bytes: &[u8; 32]) -> String {
    blake3::Hash::from_bytes(*bytes).to_hex().to_string()
}

impl From<StoreError> for SessionError {
    fn from(error: StoreError) -> SessionError {
        match error {
            StoreError::SessionNotFound(session) => SessionError::SessionNotFound(session),
            StoreError::Busy { session, turn } => SessionError::Busy { session, turn },
            StoreError::NameTaken(name) => SessionError::NameTaken(name),
            StoreError::KeyNotFound(key) => SessionError::KeyNotFound(key),
            StoreError::KeyNameTaken(name) => SessionError::KeyNameTaken(name),
            StoreError::Full(_) => SessionError::OutOfSpace(error.to_string()),
            StoreError::Closed => SessionError::Stopping,
            other => SessionError::Internal(other.to_string()),
        }
    }
}

impl From<dormouse_engine::EngineError> for SessionError {
    fn from(error: dormouse_engine::EngineError) -> SessionError {
        use dormouse_engine::EngineError;
        match error {
            EngineError::ContextOverflow { tokens, context } => {
                SessionError::ContextLengthExceeded { context, tokens, or_more: false }
            }
            EngineError::OutOfSpace(_) => SessionError::OutOfSpace(error.to_string()),
            EngineError::Stopped => SessionError::Stopping,
            other => SessionError::Internal(other.to_string()),
        }
    }
}

impl From<dormouse_models::ModelError> for SessionError {
    fn from(error: dormouse_models::ModelError) -> SessionError {
        match error {
            // A template refuses conversations that its model was not trained for.
            dormouse_models::ModelError::Template(why) => SessionError::Invalid {
                param: "messages".into(),
                message: format!("the model's chat template refused the messages: {why}"),
            },
            other => SessionError::Internal(other.to_string()),
        }
    }
}
