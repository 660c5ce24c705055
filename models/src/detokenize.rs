//! Token ids to text, one token at a time, never half a character.

use std::sync::Arc;

use crate::TokenId;
use crate::tokenizer::Tokenizer;

/// The text of a growing row of tokens.
pub struct TextStream {
    tokenizer: Arc<Tokenizer>,
    /// The beginning of a UTF-8 character whose end is still to come; at most 3 bytes.
    pending: Vec<u8>,
    drop_space: bool,
    /// Control tokens that give text.
    shown: Vec<TokenId>,
}

impl TextStream {
    /// For tokens that follow others, as a model's answer follows its prompt: no space is dropped.
    pub fn new(tokenizer: Arc<Tokenizer>) -> TextStream {
        TextStream { tokenizer, pending: Vec::new(), drop_space: false, shown: Vec::new() }
    }

    /// For tokens that are a whole text: the space that the tokenizer put before it is dropped.
    pub fn from_start(tokenizer: Arc<Tokenizer>) -> TextStream {
        let drop_space = tokenizer.adds_space();
        TextStream { tokenizer, pending: Vec::new(), drop_space, shown: Vec::new() }
    }

    /// With the text of these control tokens too: marks that the text's reader looks for.
    pub fn showing(mut self, tokens: &[TokenId]) -> TextStream {
        self.shown = tokens.to_vec();
        self
    }

    /// The characters that became certain with this token. Control tokens that are not shown and unknown ids give none.
    pub fn push(&mut self, token: TokenId) -> String {
        if self.tokenizer.is_control(token) && !self.shown.contains(&token) {
            return String::new();
        }
        let Some(mut bytes) = self.tokenizer.token_bytes(token) else {
            return String::new();
        };
        if std::mem::take(&mut self.drop_space) {
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
        }
        self.pending.extend_from_slice(bytes);
        take_certain(&mut self.pending)
    }

    /// Whether bytes of an unfinished character are held back.
    pub fn holds_back(&self) -> bool {
        !self.pending.is_empty()
    }

    /// What is left when no token will follow: U+FFFD for an unfinished character.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.pending).into_owned()
    }
}

/// Removes and returns everything that later bytes cannot change; bytes that can belong to no character become U+FFFD.
fn take_certain(pending: &mut Vec<u8>) -> String {
    let mut text = String::with_capacity(pending.len());
    let mut rest = pending.as_slice();
    loop {
        match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                rest = &[];
                break;
            }
            Err(error) => {
                let (valid, after) = rest.split_at(error.valid_up_to());
                text.push_str(&String::from_utf8_lossy(valid));
                match error.error_len() {
                    Some(invalid) => {
                        text.push(char::REPLACEMENT_CHARACTER);
                        rest = &after[invalid..];
                    }
                    None => {
                        rest = after;
                        break;
                    }
                }
            }
        }
    }
    let done = pending.len() - rest.len();
    pending.drain(..done);
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::GgufFile;
    use crate::tokenizer::Specials;

    #[test]
    fn bytes_in_any_chunks_give_the_text_of_the_whole() {
        let samples: [&[u8]; 5] = [
            "aé日😀z".as_bytes(),
            b"\xf0\x9f\x98",
            b"a\xffb\xf0\x9f\x98\x80",
            b"\xe6\x97a\xc3",
            b"\xed\xa0\x80!",
        ];
        for bytes in samples {
            for size in 1..=bytes.len() {
                let (mut pending, mut text) = (Vec::new(), String::new());
                for chunk in bytes.chunks(size) {
                    pending.extend_from_slice(chunk);
                    text += &take_certain(&mut pending);
                    assert!(pending.len() <= 3);
                }
                text += &String::from_utf8_lossy(&pending);
                assert_eq!(text, String::from_utf8_lossy(bytes), "{bytes:?} by {size}");
            }
        }
    }

    #[test]
    fn a_character_of_several_tokens_appears_with_its_last() {
        let tokenizer =
            Arc::new(Tokenizer::from_gguf(&GgufFile::open(crate::test_model()).unwrap()).unwrap());
        let text = "Hi 🦔 — 日本語, naïve";
        let ids = tokenizer.encode(text, Specials::Parse, false).unwrap();
        let mut stream = TextStream::new(tokenizer.clone());
        let pieces: Vec<String> = ids.iter().map(|&id| stream.push(id)).collect();
        assert!(pieces.iter().any(String::is_empty), "some character spans tokens: {pieces:?}");
        assert!(pieces.iter().all(|piece| !piece.contains(char::REPLACEMENT_CHARACTER)));
        assert_eq!(pieces.concat() + &stream.finish(), text);
        let mut stream = TextStream::new(tokenizer.clone());
        assert_eq!(stream.push(tokenizer.eos().unwrap()), "");
        assert_eq!(stream.push(u32::MAX), "");
    }
}
