//! Hashes of conversations, so that a client that re-sends its whole history is recognised by its messages,
//! whatever tokens they would be today.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::api::{Message, Tenant};
use crate::dressing::call_parts;
use crate::records::content;

/// A chain over the messages of a conversation: one hash after each message.
#[derive(Clone)]
pub(crate) struct Chain {
    hash: [u8; 32],
    /// Ids of the calls of the last answer.
    calls: Vec<String>,
}

impl Chain {
    /// `model` and `template` identify what turns messages into tokens, `tools` what the template shows of them.
    pub fn new(tenant: &Tenant, model: &[u8; 32], template: &[u8; 32], tools: &[Value]) -> Chain {
        let mut hasher = blake3::Hasher::new_derive_key("dormouse message chain root v1");
        part(&mut hasher, tenant.0.as_bytes());
        part(&mut hasher, model);
        part(&mut hasher, template);
        for tool in tools {
            part(&mut hasher, tool.to_string().as_bytes());
        }
        Chain { hash: *hasher.finalize().as_bytes(), calls: Vec::new() }
    }

    /// The chain of those who share nothing with others but under this salt.
    pub fn salted(self, salt: &str) -> Chain {
        let mut hasher = blake3::Hasher::new_derive_key("dormouse message chain salt v1");
        hasher.update(&self.hash);
        part(&mut hasher, salt.as_bytes());
        Chain { hash: *hasher.finalize().as_bytes(), ..self }
    }

    /// The hash after one more message. Reasoning does not count, nor does white space around an answer, nor do the
    /// spelling of a call's arguments and the call's id: clients drop the one, trim the other, and write the JSON and the
    /// ids anew. What they wrote themselves they send again as it was.
    pub fn add(&mut self, message: &Message) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key("dormouse message chain v1");
        hasher.update(&self.hash);
        let (role, content) = (text(message, "role"), content(message));
        part(&mut hasher, role.as_bytes());
        part(&mut hasher, if role == "assistant" { content.trim() } else { content }.as_bytes());
        part(&mut hasher, text(message, "name").as_bytes());
        let answered = text(message, "tool_call_id");
        // A result belongs to a call, whatever its id.
        match self.calls.iter().position(|id| id == answered) {
            Some(index) => part(&mut hasher, &(index as u64).to_le_bytes()),
            None => part(&mut hasher, answered.as_bytes()),
        }
        let calls = message.get("tool_calls").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let written: Vec<String> = calls
            .iter()
            .map(call_parts)
            .flat_map(|(name, arguments)| [name.to_owned(), canonical(arguments)])
            .collect();
        // No calls have always been hashed as no text.
        let written = if written.is_empty() { String::new() } else { Value::from(written).to_string() };
        part(&mut hasher, written.as_bytes());
        if role == "assistant" {
            self.calls = calls.iter().map(|call| call["id"].as_str().unwrap_or("").to_owned()).collect();
        }
        self.hash = *hasher.finalize().as_bytes();
        self.hash
    }
}

/// JSON in one spelling of all that mean the same; other text as it is.
fn canonical(text: &str) -> String {
    serde_json::from_str::<Value>(text).map_or_else(|_| text.to_owned(), |value| sorted(&value).to_string())
}

/// The value with the keys of its objects in order.
fn sorted(value: &Value) -> Value {
    match value {
        Value::Array(values) => values.iter().map(sorted).collect(),
        Value::Object(fields) => {
            let ordered: BTreeMap<&String, &Value> = fields.iter().collect();
            Value::Object(ordered.into_iter().map(|(key, value)| (key.clone(), sorted(value))).collect())
        }
        plain => plain.clone(),
    }
}

fn text<'a>(message: &'a Message, field: &str) -> &'a str {
    message.get(field).and_then(Value::as_str).unwrap_or("")
}

fn part(hasher: &mut blake3::Hasher, bytes: &[u8]) {
    hasher.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::message;

    fn chain() -> Chain {
        Chain::new(&Tenant::default(), &[1; 32], &[2; 32], &[])
    }

    fn hash(messages: &[Message]) -> [u8; 32] {
        let mut chain = chain();
        messages.iter().map(|message| chain.add(message)).last().unwrap()
    }

    #[test]
    fn what_a_client_may_change_on_the_way_does_not_count() {
        let said = [message("user", "hi"), message("assistant", "Hello!")];
        let mut echoed = [message("user", "hi"), message("assistant", " Hello!\n")];
        echoed[1].insert("reasoning_content".into(), "hmm".into());
        echoed[1].insert("tool_calls".into(), Value::Null);
        assert_eq!(hash(&said), hash(&echoed));
        // What a client wrote itself it sends again as it was, and another indentation is another text.
        let indented = [message("user", "    hi"), message("assistant", "Hello!")];
        assert_ne!(hash(&said), hash(&indented));
    }

    /// A question, an answer that calls, and a result.
    fn called(id: &str, arguments: &str, answered: &str) -> [Message; 3] {
        let mut calling = message("assistant", "");
        let call = serde_json::json!({"id": id, "function": {"name": "f", "arguments": arguments}});
        calling.insert("tool_calls".into(), Value::from(vec![call]));
        let mut result = message("tool", "done");
        result.insert("tool_call_id".into(), answered.into());
        [message("user", "hi"), calling, result]
    }

    #[test]
    fn a_call_is_its_name_and_the_meaning_of_its_arguments() {
        let ours = called("call_1", r#"{"b": [1, {"d": 2, "c": 3}], "a": "x"}"#, "call_1");
        let theirs = called("other", r#"{"a":"x","b":[1,{"c":3,"d":2}]}"#, "other");
        assert_eq!(hash(&ours), hash(&theirs));
        let cut_off = called("x", "{\"a\": ", "x");
        assert_eq!(hash(&cut_off), hash(&called("y", "{\"a\": ", "y")));
        let mut null = theirs;
        null[1].insert("content".into(), Value::Null);
        assert_eq!(hash(&ours), hash(&null));
    }

    #[test]
    fn other_words_roles_orders_models_tenants_and_tools_are_other_conversations() {
        let said = [message("user", "hi"), message("assistant", "Hello!")];
        assert_ne!(hash(&said), hash(&[message("user", "hi"), message("user", "Hello!")]));
        assert_ne!(hash(&said), hash(&[said[1].clone(), said[0].clone()]));
        assert_ne!(hash(&said), hash(&[message("user", "hiHello!"), message("assistant", "")]));
        assert_ne!(hash(&said), hash(&called("x", "{}", "x")[..2]));
        assert_ne!(hash(&called("x", "{}", "x")), hash(&called("x", "{\"a\": 1}", "x")));
        assert_ne!(hash(&called("x", "{}", "x")), hash(&called("x", "{}", "y")), "of no call");
        let roots = [
            chain(),
            Chain::new(&Tenant("other".into()), &[1; 32], &[2; 32], &[]),
            Chain::new(&Tenant::default(), &[9; 32], &[2; 32], &[]),
            Chain::new(&Tenant::default(), &[1; 32], &[9; 32], &[]),
            Chain::new(&Tenant::default(), &[1; 32], &[2; 32], &[Value::from("tool")]),
            chain().salted("salt"),
        ];
        for (index, root) in roots.iter().enumerate() {
            assert_eq!(roots.iter().position(|other| other.hash == root.hash), Some(index));
        }
    }
}
