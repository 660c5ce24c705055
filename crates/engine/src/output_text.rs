//! From output tokens to text that may be shown.

use dormouse_models::TokenId;
use dormouse_models::tokenizer::{TextStream, Tokenizer};

/// Turns a turn's output tokens into text, whole characters at a time, and ends it before a stop string.
///
/// The pieces are a function of the tokens alone: a turn that is read again from its log, or finished after a crash,
/// comes in the same pieces as when it was generated.
pub struct OutputText<'a> {
    stream: TextStream<'a>,
    stop: &'a [String],
    /// Text that may be the beginning of a stop string.
    held: String,
}

impl<'a> OutputText<'a> {
    pub fn new(tokenizer: &'a Tokenizer, stop: &'a [String]) -> OutputText<'a> {
        OutputText { stream: TextStream::new(tokenizer), stop, held: String::new() }
    }

    /// The text that became certain, and whether a stop string ended the output.
    pub fn push(&mut self, token: TokenId) -> (String, bool) {
        let text = self.stream.push(token);
        self.held.push_str(&text);
        if let Some(at) = self.stop.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let keep = self.stop.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back and no stop string followed; an unfinished character as U+FFFD.
    pub fn finish(&mut self) -> String {
        self.held.push_str(&self.stream.finish());
        std::mem::take(&mut self.held)
    }
}

/// Bytes of the longest proper beginning of `stop` that `text` ends with.
fn overlap(text: &str, stop: &str) -> usize {
    (1..stop.len())
        .rev()
        .find(|n| stop.is_char_boundary(*n) && text.ends_with(&stop[..*n]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::overlap;

    #[test]
    fn the_longest_beginning_of_a_stop_string_is_held_back() {
        assert_eq!(overlap("abc##", "###"), 2);
        assert_eq!(overlap("abc", "cab"), 1);
        assert_eq!(overlap("abc", "xyz"), 0);
        assert_eq!(overlap("aé", "éa"), "é".len());
        assert_eq!(overlap("", "stop"), 0);
    }
}
