//! SentencePiece BPE as GGUF files of the llama and gemma families carry it: no merge list, but a score for every
//! token; the adjacent pair whose joined text scores highest is joined first. Characters that no token covers
//! become byte tokens.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use super::Kind;
use crate::TokenId;

/// The character that stands for a space inside tokens.
pub const SPACE: char = '\u{2581}';

/// The byte that a token text of the form `<0x0A>` stands for.
pub fn byte_of(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

pub struct SentencePiece {
    ids: HashMap<Box<str>, TokenId>,
    scores: Vec<f32>,
    /// The token of every byte; the unknown token where the vocabulary has none.
    bytes: [Option<TokenId>; 256],
}

/// A stretch of the text that is one token so far; neighbours by index, `NONE` at the ends.
struct Symbol {
    start: usize,
    /// 0 once it has been joined to its left neighbour.
    len: usize,
    previous: usize,
    next: usize,
}

const NONE: usize = usize::MAX;

/// Two neighbours whose joined text is a token.
struct Pair {
    score: f32,
    left: usize,
    right: usize,
    /// Length of both when the pair was found: another length means that one has been joined since.
    len: usize,
}

impl Ord for Pair {
    fn cmp(&self, other: &Pair) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Pair) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Pair {
    fn eq(&self, other: &Pair) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Pair {}

impl SentencePiece {
    /// `kinds` and `scores` belong to `texts`, one each. Ordinary tokens alone are joined from characters: a control token
    /// whose halves are tokens (`</` and `s>`) would otherwise come out of a text that spells it.
    pub fn new(texts: &[&str], kinds: &[Kind], scores: Vec<f32>, unknown: Option<TokenId>) -> SentencePiece {
        let mut bytes = [unknown; 256];
        let mut ids = HashMap::with_capacity(texts.len());
        for ((text, kind), id) in texts.iter().zip(kinds).zip(0..) {
            match (kind, byte_of(text)) {
                // Files without kinds have byte tokens all the same.
                (Kind::Byte | Kind::Normal, Some(byte)) => bytes[byte as usize] = Some(id),
                (Kind::Normal | Kind::Unused, _) => {
                    ids.insert(Box::from(*text), id);
                }
                _ => {}
            }
        }
        SentencePiece { ids, scores, bytes }
    }

    /// Appends the ids of a text without special tokens.
    pub fn encode(&self, text: &str, add_space: bool, ids: &mut Vec<TokenId>) {
        let mut escaped = String::with_capacity(text.len() * 2);
        if add_space {
            escaped.push(SPACE);
        }
        escaped.extend(text.chars().map(|character| if character == ' ' { SPACE } else { character }));

        let count = escaped.chars().count();
        let mut symbols = Vec::with_capacity(count);
        for (index, (start, character)) in escaped.char_indices().enumerate() {
            let next = if index + 1 == count { NONE } else { index + 1 };
            symbols.push(Symbol { start, len: character.len_utf8(), previous: index.wrapping_sub(1), next });
        }
        let mut pairs = BinaryHeap::new();
        for right in 1..symbols.len() {
            pairs.extend(self.pair(&escaped, &symbols, right - 1, right));
        }
        while let Some(Pair { left, right, len, .. }) = pairs.pop() {
            if symbols[left].len == 0
                || symbols[right].len == 0
                || symbols[left].len + symbols[right].len != len
            {
                continue;
            }
            symbols[left].len = len;
            symbols[right].len = 0;
            let next = symbols[right].next;
            symbols[left].next = next;
            if next != NONE {
                symbols[next].previous = left;
                pairs.extend(self.pair(&escaped, &symbols, left, next));
            }
            let previous = symbols[left].previous;
            if previous != NONE {
                pairs.extend(self.pair(&escaped, &symbols, previous, left));
            }
        }
        for symbol in symbols.iter().filter(|symbol| symbol.len > 0) {
            let text = &escaped[symbol.start..symbol.start + symbol.len];
            match self.ids.get(text) {
                Some(&id) => ids.push(id),
                None => ids.extend(text.bytes().filter_map(|byte| self.bytes[byte as usize])),
            }
        }
    }

    fn pair(&self, text: &str, symbols: &[Symbol], left: usize, right: usize) -> Option<Pair> {
        let len = symbols[left].len + symbols[right].len;
        let id = *self.ids.get(&text[symbols[left].start..symbols[left].start + len])?;
        Some(Pair { score: self.scores[id as usize], left, right, len })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_scored_pair_is_joined_first_and_unknown_characters_become_bytes() {
        let texts = ["<unk>", "a", "b", "c", "ab", "bc", "▁", "<0xC3>", "<0xA9>", "▁a"];
        let scores = vec![0.0, -9.0, -9.0, -9.0, -3.0, -2.0, -9.0, 0.0, 0.0, -4.0];
        let model = SentencePiece::new(&texts, &[Kind::Normal; 10], scores, Some(0));
        let encode = |text, add_space| {
            let mut ids = Vec::new();
            model.encode(text, add_space, &mut ids);
            ids
        };
        assert_eq!(encode("abc", false), [1, 5]);
        assert_eq!(encode("a", true), [9]);
        assert_eq!(encode("é a", false), [7, 8, 9]);
        assert!(encode("", false).is_empty());
        assert_eq!(encode("😀", false), [0, 0, 0, 0]);
    }

    #[test]
    fn text_that_spells_a_token_of_another_kind_is_not_that_token() {
        let texts = ["<unk>", "</s>", "<b>", "<0x0A>", "</", "s>", "<", "b", ">", "<b", "<0x", "0A>"];
        let mut kinds = [Kind::Normal; 12];
        kinds[..4].copy_from_slice(&[Kind::Unknown, Kind::Control, Kind::UserDefined, Kind::Byte]);
        let letters = ["/", "s", "0", "x", "A", "0x", "0A"];
        let texts = [&texts[..], &letters].concat();
        let kinds = [&kinds[..], &[Kind::Normal; 7]].concat();
        let model = SentencePiece::new(&texts, &kinds, vec![0.0; texts.len()], Some(0));
        let encode = |text| {
            let mut ids = Vec::new();
            model.encode(text, false, &mut ids);
            ids.into_iter().map(|id| texts[id as usize]).collect::<Vec<_>>()
        };
        assert_eq!(encode("</s>"), ["</", "s>"]);
        assert_eq!(encode("<b>"), ["<b", ">"]);
        assert_eq!(encode("<0x0A>"), ["<0x", "0A>"]);
        assert_eq!(encode("\n"), ["<0x0A>"]);
    }
}
