//! How byte-level BPE cuts text into words before merging: a few regular expressions per family.
//!
//! The published expressions end in `\s+(?!\S)|\s+`: a run of spaces leaves its last one to the following word.
//! That look-ahead is done in code here, so that the expressions are plain, linear-time ones.

use regex::Regex;

use crate::error::ModelError;

/// GPT-2's own expression.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+";
/// Llama 3: words with one leading mark, digits by three, line ends on their own.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+";
/// As Llama 3, but single digits.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+";
/// As Qwen 2, but marks belong to words.
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+";
/// Mistral's Tekken: words are cut where lower case turns to upper.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+";
/// As Tekken, with contractions and digits by three.
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+";
const DIGIT: &str = r"\p{N}";
const CJK: &str = "[一-龥\u{3040}-ゟ゠-ヿ]+";
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+"##;

/// Names of `tokenizer.ggml.pre` with the same rule.
struct Family {
    names: &'static [&'static str],
    /// Applied one after the other, each to the pieces that the ones before left.
    patterns: &'static [&'static str],
    /// A word that is a token is that token, whatever the merges would make of it.
    whole_words_first: bool,
    /// Texts begin with the beginning-of-sequence token unless the file says otherwise.
    adds_bos: bool,
}

const fn family(names: &'static [&'static str], patterns: &'static [&'static str]) -> Family {
    Family { names, patterns, whole_words_first: false, adds_bos: false }
}

const FAMILIES: [Family; 12] = [
    family(
        &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"],
        &[DIGIT, GPT2],
    ),
    family(&["gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "modern-bert"], &[GPT2]),
    Family {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"],
        patterns: &[LLAMA3],
        whole_words_first: true,
        adds_bos: true,
    },
    family(&["dbrx", "smaug-bpe", "chatglm-bpe"], &[LLAMA3]),
    family(&["qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan", "grok-2"], &[QWEN2]),
    family(&["qwen35"], &[QWEN35]),
    Family { names: &["tekken"], patterns: &[TEKKEN], whole_words_first: true, adds_bos: true },
    family(&["gpt-4o", "llama4"], &[GPT4O]),
    family(&["deepseek-v3", "hunyuan-dense"], &[r"\p{N}{1,3}", CJK, DEEPSEEK3]),
    family(&["deepseek-coder"], &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\u{d7ff}]+", DIGIT]),
    family(&["falcon"], &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"]),
    family(&["default"], &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]),
];

/// One compiled expression.
struct Pattern {
    regex: Regex,
    /// A run of spaces up to a line end is an alternative of its own, and keeps its last character.
    keeps_line_ends: bool,
}

/// The splitting rule of one family, compiled.
pub struct PreTokenizer {
    patterns: Vec<Pattern>,
    pub whole_words_first: bool,
    pub adds_bos: bool,
}

impl PreTokenizer {
    /// The rule with this name in `tokenizer.ggml.pre`.
    pub fn named(name: &str) -> Result<PreTokenizer, ModelError> {
        let family = FAMILIES.iter().find(|family| family.names.contains(&name)).ok_or_else(|| {
            let known: Vec<&str> = FAMILIES.iter().flat_map(|family| family.names).copied().collect();
            ModelError::Tokenizer(format!(
                "the pre-tokenizer '{name}' is not supported (supported: {})",
                known.join(", ")
            ))
        })?;
        let compile = |pattern: &&str| {
            Regex::new(pattern)
                .map(|regex| Pattern { regex, keeps_line_ends: pattern.contains(r"\s*[\r\n]+") })
        };
        let patterns = family.patterns.iter().map(compile).collect::<Result<_, _>>();
        let patterns =
            patterns.map_err(|error| ModelError::Tokenizer(format!("pre-tokenizer '{name}': {error}")))?;
        Ok(PreTokenizer { patterns, whole_words_first: family.whole_words_first, adds_bos: family.adds_bos })
    }

    /// Calls `each` with the pieces of `text`, which together are the whole of it.
    pub fn split(
        &self,
        text: &str,
        each: &mut impl FnMut(&str) -> Result<(), ModelError>,
    ) -> Result<(), ModelError> {
        split_by(&self.patterns, text, each)
    }
}

fn split_by(
    patterns: &[Pattern],
    text: &str,
    each: &mut impl FnMut(&str) -> Result<(), ModelError>,
) -> Result<(), ModelError> {
    let Some((pattern, rest)) = patterns.split_first() else {
        return each(text);
    };
    let mut at = 0;
    while at < text.len() {
        let Some(found) = pattern.regex.find_at(text, at) else {
            return split_by(rest, &text[at..], each);
        };
        if at < found.start() {
            split_by(rest, &text[at..found.start()], each)?;
        }
        let end = found.start() + pattern.kept(found.as_str(), found.end() == text.len());
        split_by(rest, &text[found.start()..end], each)?;
        at = end;
    }
    Ok(())
}

impl Pattern {
    /// Bytes of a match that are its own: a run of two or more spaces with a word after it gives the last one up.
    fn kept(&self, found: &str, at_end: bool) -> usize {
        match found.char_indices().next_back() {
            Some((last, character)) if !at_end && last > 0 && found.chars().all(char::is_whitespace) => {
                let line_end = matches!(character, '\r' | '\n');
                if line_end && self.keeps_line_ends { found.len() } else { last }
            }
            _ => found.len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(name: &str, text: &str) -> Vec<String> {
        let mut pieces = Vec::new();
        let mut each = |piece: &str| {
            pieces.push(piece.to_owned());
            Ok(())
        };
        PreTokenizer::named(name).unwrap().split(text, &mut each).unwrap();
        pieces
    }

    #[test]
    fn a_run_of_spaces_leaves_its_last_to_the_next_word() {
        assert_eq!(pieces("gpt-2", "a   b\n\nc  "), ["a", "  ", " b", "\n", "\n", "c", "  "]);
        assert_eq!(pieces("qwen2", "a   b\n\nc  "), ["a", "  ", " b", "\n\n", "c", "  "]);
        assert_eq!(pieces("qwen2", "x \n\n  y"), ["x", " \n\n", " ", " y"]);
    }

    #[test]
    fn families_differ_in_digits_and_contractions() {
        assert_eq!(pieces("smollm", "It's 2024"), ["It", "'s", " ", "2", "0", "2", "4"]);
        assert_eq!(pieces("llama-bpe", "IT'S 2024"), ["IT", "'S", " ", "202", "4"]);
        assert_eq!(pieces("gpt-4o", "IT'S myWord 2024"), ["IT'S", " my", "Word", " ", "202", "4"]);
        assert_eq!(pieces("gpt-2", "It's 2024"), ["It", "'s", " 2024"]);
    }

    #[derive(serde::Deserialize)]
    struct Golden {
        text: String,
        /// Characters of each piece, by the name of the rule.
        lengths: std::collections::HashMap<String, Vec<usize>>,
    }

    #[test]
    fn pieces_are_those_of_the_published_expressions_with_their_look_ahead() {
        let goldens: Vec<Golden> =
            serde_json::from_str(include_str!("../../tests/split_goldens.json")).unwrap();
        assert!(goldens.len() >= 150);
        for Golden { text, lengths } in goldens {
            for (name, lengths) in lengths {
                let got: Vec<usize> =
                    pieces(&name, &text).iter().map(|piece| piece.chars().count()).collect();
                assert_eq!(got, lengths, "{name} {text:?}");
            }
        }
    }

    #[test]
    fn every_family_compiles_and_loses_nothing() {
        let text =
            "Hi,  it's\t2024!\r\n\n  \u{3000}日本語 кошки é\u{301} 𝔘 👩‍👩‍👧 /* x+=1; */ __init__ \u{a0} end \n";
        for name in FAMILIES.iter().flat_map(|family| family.names) {
            assert_eq!(pieces(name, text).concat(), text, "{name}");
        }
        assert!(PreTokenizer::named("martian").err().unwrap().to_string().contains("'martian'"));
    }
}
