//! A model's tokens as the grammar engine sees them.

use dormouse_models::{TokenId, Tokenizer};
use std::sync::Arc;
use toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};

use crate::GrammarError;

/// The bytes of all tokens as a trie. Tokens that steer are no text: a grammar allows them by number or not at all.
pub struct Vocabulary {
    pub env: TokEnv,
    /// Texts of the tokens that steer.
    controls: Vec<(String, TokenId)>,
}

impl Vocabulary {
    pub fn new(tokenizer: &Tokenizer) -> Result<Vocabulary, GrammarError> {
        let ends = tokenizer.eog_tokens();
        let Some(first_end) = ends.first() else {
            return Err(GrammarError::new(
                "response_format",
                "the model has no token that ends an answer, so its answers cannot be constrained",
            ));
        };
        let mut controls = Vec::new();
        let count = tokenizer.vocab_size();
        let words: Vec<Vec<u8>> = (0..count as TokenId)
            .map(|id| {
                let bytes = tokenizer.token_bytes(id).unwrap_or_default();
                if !tokenizer.is_control(id) && !ends.contains(&id) {
                    // No text has this byte; a token that does would pass for one that steers.
                    return match bytes.first() {
                        Some(&TokTrie::SPECIAL_TOKEN_MARKER) => Vec::new(),
                        _ => bytes.to_vec(),
                    };
                }
                if let Ok(text) = std::str::from_utf8(bytes) {
                    controls.push((text.to_owned(), id));
                }
                let name = format!("<{id}>");
                [&[TokTrie::SPECIAL_TOKEN_MARKER], name.as_bytes()].concat()
            })
            .collect();
        let trie = TokTrie::from(&TokRxInfo::new(count as u32, *first_end), &words).with_eos_tokens(ends);
        Ok(Vocabulary { env: Arc::new(ApproximateTokEnv::new(trie)), controls })
    }

    /// The token that steers and has this text.
    pub fn control(&self, text: &str) -> Option<TokenId> {
        self.controls.iter().find(|(other, _)| other == text).map(|(_, id)| *id)
    }
}
