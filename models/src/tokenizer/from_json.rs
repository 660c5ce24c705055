//! A `tokenizer.json`, run by the library that defines the format.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;

use serde_json::{Map, Value};
use tokenizers::{DecoderWrapper, PreTokenizerWrapper, Tokenizer};

use super::{Kind, Specials, Tokens, byte_level, sentencepiece};
use crate::TokenId;
use crate::error::ModelError;
use crate::safetensors::SafetensorsFolder;
use crate::weights::WeightSource;

pub struct Library {
    tokenizer: Tokenizer,
    /// The same with special tokens switched off; made when first needed, since it doubles the memory.
    literal: OnceLock<Box<Tokenizer>>,
}

fn error(what: &str, error: impl std::fmt::Display) -> ModelError {
    ModelError::Tokenizer(format!("{what}: {error}"))
}

impl Library {
    pub fn new(json: &[u8]) -> Result<(Library, Tokens), ModelError> {
        let unusable = |cause: &dyn std::fmt::Display| error("tokenizer.json cannot be used", cause);
        serde_json::from_slice::<serde::de::IgnoredAny>(json).map_err(|cause| unusable(&cause))?;
        // The library panics on some files that are JSON but not tokenizers.
        let mut tokenizer = catch_unwind(|| Tokenizer::from_bytes(json))
            .map_err(|_| unusable(&"its contents are not those of a tokenizer"))?
            .map_err(|cause| unusable(&cause))?;
        // Files exported from training cut or pad every text to a fixed length: never for a prompt.
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(|cause| error("tokenizer.json has a truncation that cannot be removed", cause))?;

        let alphabet = is_byte_level(&tokenizer).then(byte_level::bytes_of_chars);
        let added = tokenizer.get_added_tokens_decoder();
        let count = tokenizer.get_vocab(true).values().max().map_or(0, |&last| last as usize + 1);
        // Ids may have gaps, but a file with billions of them is nonsense.
        if count > json.len() {
            return Err(ModelError::Tokenizer(format!("tokenizer.json has the token id {}", count - 1)));
        }
        let mut tokens = Tokens::with_capacity(count);
        for id in 0..count as TokenId {
            if let Some(token) = added.get(&id) {
                let kind = if token.special { Kind::Control } else { Kind::UserDefined };
                tokens.push(token.content.as_bytes(), kind);
                continue;
            }
            match (tokenizer.id_to_token(id), &alphabet) {
                (None, _) => tokens.push(b"", Kind::Unused),
                (Some(text), Some(alphabet)) => {
                    tokens.push(&byte_level::decode(alphabet, &text), Kind::Normal)
                }
                (Some(text), None) => match sentencepiece::byte_of(&text) {
                    Some(byte) => tokens.push(&[byte], Kind::Byte),
                    None => tokens.push(text.replace(sentencepiece::SPACE, " ").as_bytes(), Kind::Normal),
                },
            }
        }
        Ok((Library { tokenizer, literal: OnceLock::new() }, tokens))
    }

    pub fn token_id(&self, text: &str) -> Option<TokenId> {
        self.tokenizer.token_to_id(text)
    }

    /// The texts and ids of all special tokens, by id.
    pub fn specials(&self) -> Vec<(String, TokenId)> {
        let added = self.tokenizer.get_added_tokens_decoder();
        let mut specials: Vec<(String, TokenId)> = added
            .into_iter()
            .filter(|(_, token)| token.special)
            .map(|(id, token)| (token.content, id))
            .collect();
        specials.sort_by_key(|(_, id)| *id);
        specials
    }

    /// The token that the file's own rule puts before a text.
    pub fn first_added(&self) -> Result<Option<TokenId>, ModelError> {
        let encoding = self
            .tokenizer
            .encode_fast("", true)
            .map_err(|cause| error("cannot encode the empty text", cause))?;
        Ok(encoding.get_ids().first().copied())
    }

    pub fn encode(&self, text: &str, specials: Specials, ids: &mut Vec<TokenId>) -> Result<(), ModelError> {
        let tokenizer = match specials {
            Specials::Parse => &self.tokenizer,
            Specials::Literal => self.literal.get_or_init(|| {
                let mut literal = self.tokenizer.clone();
                literal.set_encode_special_tokens(true);
                Box::new(literal)
            }),
        };
        // The library trusts the file's own rules, and panics where they contradict each other.
        let encoding = catch_unwind(AssertUnwindSafe(|| tokenizer.encode_fast(text, false)))
            .map_err(|_| error("cannot encode the text", "its rules contradict each other"))?
            .map_err(|cause| error("cannot encode the text", cause))?;
        ids.extend_from_slice(encoding.get_ids());
        Ok(())
    }
}

impl super::Tokenizer {
    /// The tokenizer of a model folder: `tokenizer.json` and the settings beside it.
    pub fn from_folder(folder: &SafetensorsFolder) -> Result<super::Tokenizer, ModelError> {
        let path = folder.path().join("tokenizer.json");
        let json = std::fs::read(&path).map_err(|source| ModelError::io(&path, source))?;
        let mut ends = Vec::new();
        for name in ["generation_config.json", "config.json"] {
            let settings: Map<String, Value> = folder.json(name)?.unwrap_or_default();
            ends.extend(settings.get("eos_token_id").map(token_ids).unwrap_or_default());
        }
        let settings = folder.json("tokenizer_config.json")?.unwrap_or_default();
        super::Tokenizer::from_json(&json, &settings, &ends)
    }
}

/// One id or a list of ids.
fn token_ids(value: &Value) -> Vec<TokenId> {
    let id = |value: &Value| value.as_u64().and_then(|id| TokenId::try_from(id).ok());
    match value {
        Value::Array(values) => values.iter().filter_map(id).collect(),
        other => id(other).into_iter().collect(),
    }
}

/// Whether tokens are written in the byte-level alphabet.
fn is_byte_level(tokenizer: &Tokenizer) -> bool {
    fn decodes_bytes(decoder: &DecoderWrapper) -> bool {
        match decoder {
            DecoderWrapper::ByteLevel(_) => true,
            DecoderWrapper::Sequence(parts) => parts.get_decoders().iter().any(decodes_bytes),
            _ => false,
        }
    }
    fn makes_bytes(pre_tokenizer: &PreTokenizerWrapper) -> bool {
        match pre_tokenizer {
            PreTokenizerWrapper::ByteLevel(_) => true,
            PreTokenizerWrapper::Sequence(parts) => parts.as_ref().iter().any(makes_bytes),
            _ => false,
        }
    }
    tokenizer.get_decoder().is_some_and(decodes_bytes)
        || tokenizer.get_pre_tokenizer().is_some_and(makes_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn end_ids_come_alone_or_in_lists() {
        assert_eq!(token_ids(&serde_json::json!([1, 2, -3])), [1, 2]);
        assert_eq!(token_ids(&serde_json::json!(7)), [7]);
    }
}
