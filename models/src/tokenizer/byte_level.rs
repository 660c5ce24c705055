//! Byte-level BPE (GPT-2): every byte is written as one printable character, and merges work on those.

use std::collections::{HashMap, HashSet};

use tokenizers::Model;
use tokenizers::models::bpe::{BPE, Vocab};

use super::Kind;
use super::split::PreTokenizer;
use crate::TokenId;
use crate::error::ModelError;

/// The character that stands for each byte: itself where it is printable Latin-1, else one from U+0100 on.
fn chars_of_bytes() -> [char; 256] {
    let mut next = 0x100;
    std::array::from_fn(|byte| match byte as u8 {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => byte as u8 as char,
        _ => {
            next += 1;
            char::from_u32(next - 1).unwrap_or(char::REPLACEMENT_CHARACTER)
        }
    })
}

/// The reverse of the alphabet.
pub fn bytes_of_chars() -> HashMap<char, u8> {
    chars_of_bytes().into_iter().zip(0..=255).collect()
}

/// The bytes of a token's text; characters outside the alphabet stand for themselves.
pub fn decode(alphabet: &HashMap<char, u8>, text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '!'..='~' => bytes.push(character as u8),
            _ => match alphabet.get(&character) {
                Some(&byte) => bytes.push(byte),
                None => bytes.extend(character.encode_utf8(&mut [0; 4]).as_bytes()),
            },
        }
    }
    bytes
}

pub struct ByteLevel {
    pre_tokenizer: PreTokenizer,
    alphabet: [char; 256],
    model: BPE,
}

impl ByteLevel {
    pub fn new(
        pre_tokenizer: PreTokenizer,
        texts: &[&str],
        kinds: &[Kind],
        merges: &[&str],
    ) -> Result<ByteLevel, ModelError> {
        let mut vocab: Vocab = texts.iter().zip(0..).map(|(text, id)| (text.to_string(), id)).collect();
        let mut merged = HashSet::new();
        let mut product = String::new();
        let mut pairs = Vec::with_capacity(merges.len());
        for merge in merges {
            // The library trusts that a merge's parts and product are tokens, and panics where they are not.
            let parts = merge.split_once(' ').filter(|(left, right)| {
                product.clear();
                product.push_str(left);
                product.push_str(right);
                vocab.contains_key(*left) && vocab.contains_key(*right) && vocab.contains_key(&product)
            });
            let (left, right) = parts.ok_or_else(|| {
                ModelError::Tokenizer(format!("the merge '{merge}' is not about tokens of the vocabulary"))
            })?;
            pairs.push((left.to_owned(), right.to_owned()));
            if pre_tokenizer.whole_words_first {
                merged.extend([left.to_owned(), right.to_owned(), product.clone()]);
            }
        }
        // Where a word that is a token needs no merges, a word that spells a special token would be it.
        if pre_tokenizer.whole_words_first {
            for (text, _) in texts.iter().zip(kinds).filter(|(_, kind)| kind.is_special()) {
                if !merged.contains(*text) {
                    vocab.remove(*text);
                }
            }
        }
        let model = BPE::builder()
            .vocab_and_merges(vocab, pairs)
            .ignore_merges(pre_tokenizer.whole_words_first)
            .build()
            .map_err(|error| ModelError::Tokenizer(format!("the vocabulary cannot be used: {error}")))?;
        Ok(ByteLevel { pre_tokenizer, alphabet: chars_of_bytes(), model })
    }

    pub fn encode(&self, text: &str, ids: &mut Vec<TokenId>) -> Result<(), ModelError> {
        let mut word = String::new();
        self.pre_tokenizer.split(text, &mut |piece| {
            word.clear();
            word.extend(piece.bytes().map(|byte| self.alphabet[byte as usize]));
            let tokens = self
                .model
                .tokenize(&word)
                .map_err(|error| ModelError::Tokenizer(format!("cannot encode '{piece}': {error}")))?;
            ids.extend(tokens.iter().map(|token| token.id));
            Ok(())
        })
    }
}
