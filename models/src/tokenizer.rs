//! Text to token ids and back, from a GGUF file's own vocabulary or from a `tokenizer.json`.

mod byte_level;
mod from_json;
mod sentencepiece;
mod split;

use std::collections::{HashMap, HashSet};

use aho_corasick::{AhoCorasick, MatchKind};

use crate::TokenId;
use crate::error::ModelError;
use crate::gguf::GgufFile;
use crate::weights::WeightSource;
use byte_level::ByteLevel;
use from_json::Library;
use sentencepiece::SentencePiece;

/// Whether special tokens written out in a text become those tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Specials {
    /// `<|im_end|>` in the text is the token: for text that a chat template rendered.
    Parse,
    /// `<|im_end|>` in the text is ten ordinary characters: for text that a user wrote.
    Literal,
}

/// What a token is, with the numbers of `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Normal = 1,
    Unknown = 2,
    Control = 3,
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

impl Kind {
    /// Found as it stands, before a text is cut into words.
    fn is_special(self) -> bool {
        matches!(self, Kind::Control | Kind::Unknown | Kind::UserDefined)
    }
}

/// Tokens that end a generation, whatever the file calls its end-of-sequence token.
const END_NAMES: [&str; 14] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|end_of_turn|>",
    "<EOT>",
    "<|eot|>",
    "</s>",
    "<eos>",
];

/// A model's tokenizer. Cheap to share, immutable.
pub struct Tokenizer {
    encoder: Encoder,
    tokens: Tokens,
    bos: Option<TokenId>,
    eos: Option<TokenId>,
    adds_bos: bool,
    end_of_generation: Vec<TokenId>,
    /// Whole texts begin with a space that the tokenizer put there.
    adds_space: bool,
    fingerprint: [u8; 32],
}

enum Encoder {
    ByteLevel { model: Box<ByteLevel>, specials: SpecialFinder },
    SentencePiece { model: Box<SentencePiece>, specials: SpecialFinder },
    Library(Box<Library>),
}

/// The bytes of every token, end to end.
struct Tokens {
    bytes: Vec<u8>,
    ends: Vec<usize>,
    kinds: Vec<Kind>,
}

impl Tokens {
    fn with_capacity(count: usize) -> Tokens {
        Tokens {
            bytes: Vec::with_capacity(count * 8),
            ends: Vec::with_capacity(count),
            kinds: Vec::with_capacity(count),
        }
    }

    fn push(&mut self, bytes: &[u8], kind: Kind) {
        self.bytes.extend_from_slice(bytes);
        self.ends.push(self.bytes.len());
        self.kinds.push(kind);
    }

    fn get(&self, id: TokenId) -> Option<&[u8]> {
        let end = *self.ends.get(id as usize)?;
        let start = if id == 0 { 0 } else { self.ends[id as usize - 1] };
        Some(&self.bytes[start..end])
    }
}

impl Tokenizer {
    /// The tokenizer in a GGUF file: `gpt2` (byte-level BPE) or `llama` (SentencePiece BPE by scores).
    pub fn from_gguf(file: &GgufFile) -> Result<Tokenizer, ModelError> {
        let key = "tokenizer.ggml.model";
        let model = file.str(key).ok_or_else(|| file.missing(key))?;
        let key = "tokenizer.ggml.tokens";
        let texts = file.strings(key).ok_or_else(|| file.missing(key))?;
        let kinds = kinds(file, &texts)?;

        let mut hash = blake3::Hasher::new_derive_key("dormouse tokenizer v1");
        for part in [model, file.str("tokenizer.ggml.pre").unwrap_or("")] {
            hash_part(&mut hash, part.as_bytes());
        }
        for (text, kind) in texts.iter().zip(&kinds) {
            hash_part(&mut hash, text.as_bytes());
            hash.update(&[*kind as u8]);
        }

        let mut tokens = Tokens::with_capacity(texts.len());
        let mut adds_space = false;
        let default_adds_bos;
        let encoder = match model {
            "gpt2" => {
                let pre = file.str("tokenizer.ggml.pre").unwrap_or("default");
                let pre_tokenizer = split::PreTokenizer::named(pre)?;
                default_adds_bos = pre_tokenizer.adds_bos;
                let key = "tokenizer.ggml.merges";
                let merges = file.strings(key).ok_or_else(|| file.missing(key))?;
                merges.iter().for_each(|merge| hash_part(&mut hash, merge.as_bytes()));
                let alphabet = byte_level::bytes_of_chars();
                for (text, &kind) in texts.iter().zip(&kinds) {
                    match kind {
                        Kind::Normal | Kind::Unused | Kind::Byte => {
                            tokens.push(&byte_level::decode(&alphabet, text), kind);
                        }
                        Kind::Control | Kind::UserDefined | Kind::Unknown => {
                            tokens.push(text.as_bytes(), kind)
                        }
                    }
                }
                let model = Box::new(ByteLevel::new(pre_tokenizer, &texts, &kinds, &merges)?);
                Encoder::ByteLevel { model, specials: SpecialFinder::new(&texts, &kinds)? }
            }
            "llama" => {
                let key = "tokenizer.ggml.scores";
                let scores = file.f32s(key).ok_or_else(|| file.missing(key))?;
                if scores.len() != texts.len() {
                    let (scores, texts) = (scores.len(), texts.len());
                    let what = format!("{key} has {scores} values for {texts} tokens");
                    return Err(ModelError::malformed(file.path(), what));
                }
                scores.iter().for_each(|score| {
                    hash.update(&score.to_le_bytes());
                });
                adds_space = file.bool("tokenizer.ggml.add_space_prefix").unwrap_or(true);
                default_adds_bos = true;
                for (text, &kind) in texts.iter().zip(&kinds) {
                    match (kind, sentencepiece::byte_of(text)) {
                        (Kind::Byte, Some(byte)) => tokens.push(&[byte], kind),
                        (Kind::Normal | Kind::Unused, _) if text.contains(sentencepiece::SPACE) => {
                            tokens.push(text.replace(sentencepiece::SPACE, " ").as_bytes(), kind);
                        }
                        _ => tokens.push(text.as_bytes(), kind),
                    }
                }
                let unknown = file.u32("tokenizer.ggml.unknown_token_id");
                let model = Box::new(SentencePiece::new(&texts, &kinds, scores, unknown));
                let mut specials = SpecialFinder::new(&texts, &kinds)?;
                // Phi 3's marks swallow the white space after them, which GGUF has no setting for.
                if file.architecture()? == "phi3" {
                    specials.swallow_spaces(&texts, &kinds);
                    hash_part(&mut hash, b"marks swallow spaces");
                }
                Encoder::SentencePiece { model, specials }
            }
            other => {
                return Err(ModelError::Tokenizer(format!(
                    "the GGUF tokenizer model '{other}' is not supported (supported: gpt2, llama)"
                )));
            }
        };

        let id = |name: &str| {
            file.u32(&format!("tokenizer.ggml.{name}_token_id")).filter(|&id| (id as usize) < texts.len())
        };
        let eos = id("eos");
        let mut end_of_generation: Vec<TokenId> = [eos, id("eot"), id("eom")].into_iter().flatten().collect();
        add_named_ends(
            &mut end_of_generation,
            texts
                .iter()
                .zip(&kinds)
                .zip(0..)
                .filter_map(|((text, kind), id)| (*kind == Kind::Control).then_some((*text, id))),
        );
        let adds_bos = file.bool("tokenizer.ggml.add_bos_token").unwrap_or(default_adds_bos);
        hash.update(&[adds_space.into()]);
        Ok(Tokenizer {
            encoder,
            tokens,
            bos: id("bos"),
            eos,
            adds_bos: adds_bos && id("bos").is_some(),
            end_of_generation,
            adds_space,
            fingerprint: hash.finalize().into(),
        })
    }

    /// The tokenizer of a `tokenizer.json`, with the settings beside it in `tokenizer_config.json` (`{}` if there is
    /// none) and further end-of-sequence ids from `generation_config.json` or `config.json`.
    pub fn from_json(
        tokenizer_json: &[u8],
        tokenizer_config: &serde_json::Map<String, serde_json::Value>,
        end_ids: &[TokenId],
    ) -> Result<Tokenizer, ModelError> {
        let (library, tokens) = Library::new(tokenizer_json)?;
        let named = |key: &str| {
            let value = tokenizer_config.get(key)?;
            let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
            library.token_id(text)
        };
        let (bos, eos) = (named("bos_token"), named("eos_token"));
        let mut end_of_generation: Vec<TokenId> = eos.into_iter().collect();
        for &id in end_ids {
            if !end_of_generation.contains(&id) {
                end_of_generation.push(id);
            }
        }
        let specials = library.specials();
        add_named_ends(&mut end_of_generation, specials.iter().map(|(text, id)| (text.as_str(), *id)));
        let adds_bos = bos.is_some() && library.first_added()? == bos;
        Ok(Tokenizer {
            encoder: Encoder::Library(Box::new(library)),
            tokens,
            bos,
            eos,
            adds_bos,
            end_of_generation,
            adds_space: false,
            fingerprint: blake3::derive_key("dormouse tokenizer.json v1", tokenizer_json),
        })
    }

    /// The tokenizer of a model whose embedding has `vocab` rows. Special tokens beyond them are forgotten (Gemma 3's
    /// tokenizer.json has one for images); an ordinary one is an error.
    pub fn limited_to(mut self, vocab: usize) -> Result<Tokenizer, ModelError> {
        let count = self.vocab_size();
        let beyond = self.tokens.kinds.get(vocab..).unwrap_or_default();
        if beyond.iter().any(|kind| matches!(kind, Kind::Normal | Kind::Byte)) {
            let what =
                format!("the tokenizer has {count} tokens, but the model's embedding only {vocab} rows");
            return Err(ModelError::Tokenizer(what));
        }
        self.tokens.ends.truncate(vocab);
        self.tokens.kinds.truncate(vocab);
        self.end_of_generation.retain(|id| (*id as usize) < vocab);
        Ok(self)
    }

    /// The ids of `text`, after the beginning-of-sequence token where `add_bos` asks for it and the model has one.
    ///
    /// A template that renders that token itself wants `add_bos: false` (see [`Tokenizer::adds_bos`]).
    pub fn encode(&self, text: &str, specials: Specials, add_bos: bool) -> Result<Vec<TokenId>, ModelError> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 1);
        if add_bos {
            ids.extend(self.bos);
        }
        match &self.encoder {
            Encoder::ByteLevel { model, specials: finder } => finder.split(text, specials, |part| {
                match part {
                    Part::Special(id) => ids.push(id),
                    Part::Text { text, .. } => model.encode(text, &mut ids)?,
                }
                Ok(())
            })?,
            Encoder::SentencePiece { model, specials: finder } => finder.split(text, specials, |part| {
                match part {
                    Part::Special(id) => ids.push(id),
                    Part::Text { text, after_special } => {
                        model.encode(text, self.adds_space && after_special, &mut ids);
                    }
                }
                Ok(())
            })?,
            Encoder::Library(library) => library.encode(text, specials, &mut ids)?,
        }
        match ids.iter().find(|id| **id as usize >= self.vocab_size()) {
            None => Ok(ids),
            Some(id) => Err(ModelError::Tokenizer(format!(
                "the text has a special token, number {id}, that the model has no embedding for"
            ))),
        }
    }

    /// Whether special tokens are written out in `text` that only [`Specials::Parse`] takes for tokens.
    pub fn mentions_special(&self, text: &str) -> Result<bool, ModelError> {
        match &self.encoder {
            Encoder::ByteLevel { specials, .. } | Encoder::SentencePiece { specials, .. } => {
                Ok(specials.finds_more(text))
            }
            Encoder::Library(_) => {
                Ok(self.encode(text, Specials::Parse, false)?
                    != self.encode(text, Specials::Literal, false)?)
            }
        }
    }

    /// The bytes that a token stands for, which need not be whole UTF-8 characters; None where there is no such token.
    pub fn token_bytes(&self, id: TokenId) -> Option<&[u8]> {
        self.tokens.get(id)
    }

    /// Whether the token steers and gives no text: beginning, end, turn marks, unknown.
    pub fn is_control(&self, id: TokenId) -> bool {
        matches!(self.tokens.kinds.get(id as usize), Some(Kind::Control | Kind::Unknown))
    }

    /// Tokens that end a generation.
    pub fn eog_tokens(&self) -> &[TokenId] {
        &self.end_of_generation
    }

    pub fn bos(&self) -> Option<TokenId> {
        self.bos
    }

    pub fn eos(&self) -> Option<TokenId> {
        self.eos
    }

    /// The text of the beginning-of-sequence token, as chat templates want it; empty without one.
    pub fn bos_text(&self) -> String {
        self.text_of(self.bos)
    }

    /// The text of the end-of-sequence token; empty without one.
    pub fn eos_text(&self) -> String {
        self.text_of(self.eos)
    }

    fn text_of(&self, id: Option<TokenId>) -> String {
        let bytes = id.and_then(|id| self.token_bytes(id)).unwrap_or_default();
        String::from_utf8_lossy(bytes).into_owned()
    }

    /// Whether this model's texts begin with the beginning-of-sequence token.
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    /// Whether a whole text's first token carries a space that is not in the text.
    pub fn adds_space(&self) -> bool {
        self.adds_space
    }

    /// Ids are below this.
    pub fn vocab_size(&self) -> usize {
        self.tokens.ends.len()
    }

    /// Equal where token ids mean the same: BLAKE3 over vocabulary, merges or scores, splitting rule and flags.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }
}

fn hash_part(hash: &mut blake3::Hasher, bytes: &[u8]) {
    hash.update(&(bytes.len() as u32).to_le_bytes());
    hash.update(bytes);
}

fn kinds(file: &GgufFile, texts: &[&str]) -> Result<Vec<Kind>, ModelError> {
    let Some(numbers) = file.u32s("tokenizer.ggml.token_type") else {
        return Ok(vec![Kind::Normal; texts.len()]);
    };
    if numbers.len() != texts.len() {
        let (kinds, texts) = (numbers.len(), texts.len());
        let what = format!("tokenizer.ggml.token_type has {kinds} values for {texts} tokens");
        return Err(ModelError::malformed(file.path(), what));
    }
    let kind = |(number, text): (u32, &&str)| match number {
        // Some converters forget to mark the tokens that end a turn. `</s>` is HTML too, so it must be marked.
        1 | 4 if END_NAMES.contains(text) && !matches!(*text, "</s>" | "<eos>") => Kind::Control,
        2 => Kind::Unknown,
        3 => Kind::Control,
        4 => Kind::UserDefined,
        5 => Kind::Unused,
        6 => Kind::Byte,
        _ => Kind::Normal,
    };
    Ok(numbers.into_iter().zip(texts).map(kind).collect())
}

fn add_named_ends<'a>(ends: &mut Vec<TokenId>, controls: impl Iterator<Item = (&'a str, TokenId)>) {
    for (text, id) in controls {
        if END_NAMES.contains(&text) && !ends.contains(&id) {
            ends.push(id);
        }
    }
}

/// A stretch of text between special tokens, or one of them.
enum Part<'a> {
    Text {
        text: &'a str,
        /// At the very beginning, or right after a special token.
        after_special: bool,
    },
    Special(TokenId),
}

/// Finds special tokens in text: the leftmost first, of those the longest.
struct SpecialFinder {
    all: Finder,
    /// Those that a user may write: not the marks of turns.
    plain: Finder,
    /// Tokens that swallow the white space after them.
    swallowing: HashSet<TokenId>,
}

struct Finder {
    automaton: AhoCorasick,
    ids: Vec<TokenId>,
}

impl Finder {
    fn new(
        texts: &[&str],
        kinds: &[Kind],
        wanted: impl Fn(&str, Kind) -> bool,
    ) -> Result<Finder, ModelError> {
        let mut by_text = HashMap::new();
        for (id, (text, kind)) in texts.iter().zip(kinds).enumerate() {
            if wanted(text, *kind) && !text.is_empty() {
                by_text.entry(*text).or_insert(id as TokenId);
            }
        }
        let (patterns, ids): (Vec<&str>, Vec<TokenId>) = by_text.into_iter().unzip();
        let automaton =
            AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(&patterns).map_err(
                |error| ModelError::Tokenizer(format!("special tokens cannot be searched for: {error}")),
            )?;
        Ok(Finder { automaton, ids })
    }
}

impl SpecialFinder {
    fn new(texts: &[&str], kinds: &[Kind]) -> Result<SpecialFinder, ModelError> {
        // Some converters mark the tokens that begin a turn (Phi 3's `<|user|>`) as user-defined. White space and HTML tags,
        // which those really are, do not look like that.
        let is_mark = |text: &str| text.starts_with("<|") && text.ends_with("|>");
        let plain = |text: &str, kind| kind == Kind::UserDefined && !is_mark(text);
        Ok(SpecialFinder {
            all: Finder::new(texts, kinds, |_, kind| kind.is_special())?,
            plain: Finder::new(texts, kinds, plain)?,
            swallowing: HashSet::new(),
        })
    }

    /// Makes special tokens swallow the white space after them, all but those that begin and end a document.
    fn swallow_spaces(&mut self, texts: &[&str], kinds: &[Kind]) {
        let special = |kind| matches!(kind, Kind::Control | Kind::UserDefined);
        let swallows = |text: &str| !matches!(text, "<unk>" | "<s>" | "<|endoftext|>");
        let marks = texts.iter().zip(kinds).zip(0..);
        self.swallowing =
            marks.filter(|((text, kind), _)| special(**kind) && swallows(text)).map(|(_, id)| id).collect();
    }

    /// Whether the text has a special token that a user's own text would not have.
    fn finds_more(&self, text: &str) -> bool {
        let found = |found: aho_corasick::Match| self.all.ids[found.pattern()];
        self.all.automaton.find_iter(text).map(found).any(|id| !self.plain.ids.contains(&id))
    }

    fn split<'t>(
        &self,
        text: &'t str,
        specials: Specials,
        mut each: impl FnMut(Part<'t>) -> Result<(), ModelError>,
    ) -> Result<(), ModelError> {
        let finder = match specials {
            Specials::Parse => &self.all,
            Specials::Literal => &self.plain,
        };
        let mut at = 0;
        let mut after_special = true;
        for found in finder.automaton.find_iter(text) {
            if at < found.start() {
                each(Part::Text { text: &text[at..found.start()], after_special })?;
            }
            let id = finder.ids[found.pattern()];
            each(Part::Special(id))?;
            (at, after_special) = (found.end(), true);
            if self.swallowing.contains(&id) {
                at = text.len() - text[at..].trim_start().len();
            }
        }
        if at < text.len() {
            each(Part::Text { text: &text[at..], after_special })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
