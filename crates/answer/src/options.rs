//! What a request says an answer may be.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Which tools an answer may or must call.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToolChoice {
    /// No calls.
    None,
    /// The model decides.
    #[default]
    Auto,
    /// At least one call.
    Required,
    /// One call, of the function with this name.
    Function(String),
    /// Only the functions with these names; `required`: at least one call.
    Allowed { names: Vec<String>, required: bool },
}

impl ToolChoice {
    /// The answer may hold calls.
    pub fn permits_calls(&self) -> bool {
        *self != ToolChoice::None
    }

    /// The answer must be calls.
    pub fn requires_call(&self) -> bool {
        matches!(
            self,
            ToolChoice::Required | ToolChoice::Function(_) | ToolChoice::Allowed { required: true, .. }
        )
    }

    /// The function with this name may be called.
    pub fn permits(&self, name: &str) -> bool {
        match self {
            ToolChoice::None => false,
            ToolChoice::Auto | ToolChoice::Required => true,
            ToolChoice::Function(only) => only == name,
            ToolChoice::Allowed { names, .. } => names.iter().any(|allowed| allowed == name),
        }
    }
}

/// The form of an answer's content.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum OutputFormat {
    #[default]
    Text,
    /// Any JSON object.
    JsonObject,
    JsonSchema {
        name: String,
        schema: Value,
        strict: bool,
    },
}
