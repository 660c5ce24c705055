//! Answers drawn at random from a grammar, over a real model's tokens.

#![allow(clippy::unwrap_used)]
// Each test file uses its part.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use dormouse_grammar::{Compiler, Grammar};
use dormouse_models::gguf::GgufFile;
use dormouse_models::{TokenId, Tokenizer};

pub static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    let path = std::env::var_os("DORMOUSE_TEST_MODEL").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/weights/SmolLM2-135M-Instruct.Q4_1.gguf"),
        PathBuf::from,
    );
    assert!(path.exists(), "{} is missing: run scripts/fetch_weights", path.display());
    Tokenizer::from_gguf(&GgufFile::open(&path).unwrap()).unwrap()
});

pub static COMPILER: LazyLock<Compiler> = LazyLock::new(|| Compiler::new(&TOKENIZER).unwrap());

/// Numbers that look random (SplitMix64).
pub struct Dice(pub u64);

impl Dice {
    pub fn below(&mut self, most: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % most as u64) as usize
    }

    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

/// Tokens after which an answer is brought to its end.
const LONG: usize = 250;
/// Tokens after which it had better be at its end.
const TOO_LONG: usize = 6000;

/// The tokens of an answer, all allowed ones being equally likely; the last one ends it. None: it found no end.
pub fn draw(grammar: &Grammar, dice: &mut Dice) -> Option<Vec<TokenId>> {
    let mut constraint = grammar.begin();
    let mut tokens = Vec::new();
    let mut logits = vec![0.0f32; TOKENIZER.vocab_size() + 7];
    let closing = |token: &TokenId| {
        let bytes = TOKENIZER.token_bytes(*token).unwrap_or_default();
        TOKENIZER.eog_tokens().contains(token)
            || bytes.iter().all(|byte| b"\"}]".contains(byte)) && !bytes.is_empty()
    };
    loop {
        logits.fill(0.0);
        constraint.mask(&mut logits).unwrap();
        let allowed: Vec<TokenId> =
            (0..logits.len() as TokenId).filter(|token| logits[*token as usize] == 0.0).collect();
        assert!(!allowed.is_empty());
        let mut choices = allowed.clone();
        if tokens.len() > LONG {
            // In a text, brackets are text.
            let quotes = |token: &TokenId| TOKENIZER.token_bytes(*token) == Some(b"\"");
            let in_text = allowed.len() > 1000 && !allowed.iter().any(quotes);
            let closers: Vec<TokenId> =
                allowed.iter().copied().filter(|token| closing(token) && !in_text).collect();
            // Most of the time: an end may lead nowhere, as in the middle of a pattern.
            let short = |token: &TokenId| TOKENIZER.token_bytes(*token).is_some_and(|bytes| bytes.len() == 1);
            if !closers.is_empty() && dice.chance(90) {
                choices = closers;
            } else if allowed.iter().any(short) {
                // An end may need a certain character.
                choices.retain(short);
            }
        }
        let token = choices[dice.below(choices.len())];
        assert!(constraint.allows(token).unwrap());
        constraint.advance(token).unwrap();
        tokens.push(token);
        if TOKENIZER.eog_tokens().contains(&token) {
            return Some(tokens);
        }
        if tokens.len() > TOO_LONG {
            return None;
        }
    }
}

pub fn text(tokens: &[TokenId]) -> String {
    let bytes: Vec<u8> = tokens
        .iter()
        .filter(|token| !TOKENIZER.eog_tokens().contains(token))
        .flat_map(|token| TOKENIZER.token_bytes(*token).unwrap().to_vec())
        .collect();
    String::from_utf8(bytes).unwrap()
}
