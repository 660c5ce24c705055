//! Hashes of conversations, so that a client that re-sends its whole history is recognised by its messages,
//! whatever tokens they would be today.

use serde_json::Value;

use crate::api::{Message, Tenant};
use crate::records::content;

/// A chain over the messages of a conversation: one hash after each message.
#[derive(Clone)]
pub(crate) struct Chain {
    hash: [u8; 32],
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
        Chain { hash: *hasher.finalize().as_bytes() }
    }

    /// The hash after one more message. Reasoning does not count, nor does white space around an answer: clients drop
    /// the one, and trim the other. What they wrote themselves they send again as it was.
    pub fn add(&mut self, message: &Message) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key("dormouse message chain v1");
        hasher.update(&self.hash);
        let (role, content) = (text(message, "role"), content(message));
        part(&mut hasher, role.as_bytes());
        part(&mut hasher, if role == "assistant" { content.trim() } else { content }.as_bytes());
        part(&mut hasher, text(message, "name").as_bytes());
        part(&mut hasher, text(message, "tool_call_id").as_bytes());
        let calls = message.get("tool_calls").filter(|calls| !calls.is_null()).map(Value::to_string);
        part(&mut hasher, calls.unwrap_or_default().as_bytes());
        self.hash = *hasher.finalize().as_bytes();
        self.hash
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

    #[test]
    fn other_words_roles_orders_models_tenants_and_tools_are_other_conversations() {
        let said = [message("user", "hi"), message("assistant", "Hello!")];
        assert_ne!(hash(&said), hash(&[message("user", "hi"), message("user", "Hello!")]));
        assert_ne!(hash(&said), hash(&[said[1].clone(), said[0].clone()]));
        assert_ne!(hash(&said), hash(&[message("user", "hiHello!"), message("assistant", "")]));
        let mut called = said.clone();
        called[1].insert("tool_calls".into(), serde_json::json!([{"id": "x"}]));
        assert_ne!(hash(&said), hash(&called));
        let roots = [
            chain(),
            Chain::new(&Tenant("other".into()), &[1; 32], &[2; 32], &[]),
            Chain::new(&Tenant::default(), &[9; 32], &[2; 32], &[]),
            Chain::new(&Tenant::default(), &[1; 32], &[9; 32], &[]),
            Chain::new(&Tenant::default(), &[1; 32], &[2; 32], &[Value::from("tool")]),
        ];
        for (index, root) in roots.iter().enumerate() {
            assert_eq!(roots.iter().position(|other| other.hash == root.hash), Some(index));
        }
    }
}
