//! The response object: what the request said, and how its turn went.

use dormouse_engine::FinishReason;
use dormouse_session::{Response, Turn, TurnStatus};
use serde_json::{Map, Value, json};

use super::diagnostics::diagnostics;

/// What all forms of one response's object have in common.
#[derive(Clone)]
pub struct Envelope {
    fields: Map<String, Value>,
    /// The prompt goes on from something that was computed before: whether it was found again can be told.
    has_past: bool,
    /// See [`super::diagnostics::comparison`].
    comparison: Option<Value>,
}

impl Envelope {
    pub fn new(response: &Response) -> Envelope {
        let mut fields = match response.record.get("object") {
            Some(Value::Object(object)) => object.clone(),
            _ => Map::new(),
        };
        let has_past = ["previous_response_id", "conversation"]
            .iter()
            .any(|name| fields.get(*name).is_some_and(|value| !value.is_null()));
        fields.insert("id".into(), response.id.as_str().into());
        fields.insert("object".into(), "response".into());
        fields.insert("created_at".into(), response.created_at.into());
        fields.insert("model".into(), response.model.as_str().into());
        for empty in
            ["completed_at", "error", "incomplete_details", "usage", "prompt_cache_diagnostics", "dormouse"]
        {
            fields.insert(empty.into(), Value::Null);
        }
        Envelope { fields, has_past, comparison: response.record.get("comparison").cloned() }
    }

    pub fn is_background(&self) -> bool {
        self.fields.get("background") == Some(&Value::Bool(true))
    }

    /// The object of a response that is not finished.
    pub fn object(&self, status: &str, output: &[Value]) -> Value {
        let mut object = self.fields.clone();
        object.insert("status".into(), status.into());
        object.insert("output".into(), output.into());
        Value::Object(object)
    }

    /// The object of a response whose turn is over.
    pub fn finished(&self, turn: &Turn, output: &[Value]) -> Value {
        let is_cut = turn.finish_reason == Some(FinishReason::Length);
        let status = match turn.status {
            TurnStatus::Completed if is_cut => "incomplete",
            TurnStatus::Completed | TurnStatus::InProgress => "completed",
            TurnStatus::Cancelled => "cancelled",
            TurnStatus::Failed => "failed",
        };
        let mut object = self.object(status, output);
        if status == "incomplete" {
            object["incomplete_details"] = json!({ "reason": "max_output_tokens" });
        }
        if status == "completed" {
            object["completed_at"] = turn.completed_at.into();
        }
        if status == "failed" {
            let message = turn.error.as_deref().unwrap_or("the answer failed, and no reason is known");
            object["error"] = json!({ "code": "server_error", "message": message });
        }
        object["usage"] = usage(turn);
        if let Some(receipt) = &turn.dormouse {
            object["dormouse"] = json!(receipt);
            object["prompt_cache_diagnostics"] =
                diagnostics(receipt, turn, self.comparison.as_ref(), self.has_past);
        }
        object
    }
}

fn usage(turn: &Turn) -> Value {
    let usage = &turn.usage;
    json!({
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            // What was computed is in the pages from then on.
            "cache_write_tokens": usage.prompt_tokens - usage.cached_tokens.min(usage.prompt_tokens),
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": { "reasoning_tokens": usage.reasoning_tokens },
        "total_tokens": usage.total_tokens,
    })
}
