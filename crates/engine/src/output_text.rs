//! From output tokens to text that may be shown.

use std::sync::Arc;

use dormouse_models::{TextStream, TokenId, Tokenizer};

/// Turns a turn's output tokens into text, whole characters at a time, and ends it before a stop string.
///
/// The pieces are a function of the tokens alone: a turn that is read again from its log, or finished after a crash,
/// comes in the same pieces as when it was generated.
pub struct OutputText {
    stream: TextStream,
    stop: Vec<String>,
    /// Text that may be the beginning of a stop string.
    held: String,
    stopped: bool,
}

impl OutputText {
    /// `shown`: control tokens that give text, see [`TextStream::showing`].
    pub fn new(tokenizer: &Arc<Tokenizer>, stop: &[String], shown: &[TokenId]) -> OutputText {
        OutputText {
            stream: TextStream::new(Arc::clone(tokenizer)).showing(shown),
            stop: stop.to_vec(),
            held: String::new(),
            stopped: false,
        }
    }

    /// The text that became certain, and whether a stop string ended the output.
    pub fn push(&mut self, token: TokenId) -> (String, bool) {
        let text = self.stream.push(token);
        self.held.push_str(&text);
        if let Some(at) = self.stop.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(at);
            self.stopped = true;
            return (std::mem::take(&mut self.held), true);
        }
        let keep = self.stop.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back and no stop string followed; an unfinished character as U+FFFD.
    pub fn finish(self) -> String {
        if self.stopped { String::new() } else { self.held + &self.stream.finish() }
    }
}

/// Bytes of the longest proper beginning of `stop` that `text` ends with.
fn overlap(text: &str, stop: &str) -> usize {
    (1..stop.len()).rev().find(|n| stop.is_char_boundary(*n) && text.ends_with(&stop[..*n])).unwrap_or(0)
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
