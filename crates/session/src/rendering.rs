//! From messages to the tokens that a turn appends to its session's log.
//!
//! What the model generated stays in the log as it was sampled: after the last generated answer only the text that
//! the template puts behind it is tokenised. And what people wrote stays text: a special token written out in a
//! message is ordinary characters, only those of the template are tokens.

use dormouse_models::chat_template::ChatTemplate;
use dormouse_models::{Specials, TokenId, Tokenizer};
use serde_json::{Map, Value};

use crate::api::{Message, SessionError};
use crate::dressing::{Dressed, dress};
use crate::records::{KnownItem, content};

/// What speaks a model's language.
pub(crate) struct Voice<'a> {
    pub tokenizer: &'a Tokenizer,
    pub template: &'a ChatTemplate,
}

/// A conversation that is to go on: what is known, and what is new.
pub(crate) struct Conversation<'a> {
    pub system: Option<Message>,
    pub items: &'a [KnownItem],
    pub input: &'a [Message],
    pub tools: &'a [Value],
    /// Further variables of the template.
    pub variables: &'a Map<String, Value>,
    /// The session's token log; empty when its tokens are another tokenizer's.
    pub log: &'a [TokenId],
}

/// The change to the token log that a turn's input makes.
#[derive(Debug, PartialEq)]
pub(crate) struct Prompt {
    /// Tokens of the log that stay.
    pub keep_tokens: usize,
    /// What follows them, generation prompt included.
    pub tokens: Vec<TokenId>,
    /// Items that stay where they are.
    pub keep_items: usize,
    /// Token ranges of the items from there on and of the input's messages, in order.
    pub ranges: Vec<(usize, usize)>,
    /// The last characters of the prompt's text: whether they open the reasoning is the template's choice.
    pub end: String,
}

/// Bytes of a prompt's end that are kept: more than any mark has.
const END_BYTES: usize = 64;

impl Prompt {
    /// Tokens of the log as it then is.
    pub fn len(&self) -> usize {
        self.keep_tokens + self.tokens.len()
    }
}

/// A part of rendered text.
#[derive(Clone, Debug, PartialEq)]
enum Piece {
    Template(String),
    /// The content of a message, by index.
    Content(usize, String),
}

impl Piece {
    fn text(&self) -> &str {
        match self {
            Piece::Template(text) | Piece::Content(_, text) => text,
        }
    }
}

impl Voice<'_> {
    pub fn plan(&self, conversation: &Conversation<'_>) -> Result<Prompt, SessionError> {
        let Conversation { system, items, input, tools, variables, log } = conversation;
        check_fields(self, input)?;
        check_hostile(self, variables.values(), "chat_template_kwargs")?;
        let preface = usize::from(system.is_some());
        let mut messages: Vec<Message> =
            system.iter().chain(items.iter().map(|item| &item.message)).chain(*input).cloned().collect();
        let anchor = items
            .iter()
            .rposition(|item| item.generated && 0 < item.token_end && item.token_end <= log.len());
        // What the log holds is not written again.
        let known = anchor.map_or(0, |anchor| anchor + preface + 1);
        for message in &mut messages[known..] {
            // An answer can do without its reasoning, and few templates show it again.
            if let Some(reasoning) = message.get("reasoning_content")
                && self.is_hostile_inside(reasoning)?
            {
                message.shift_remove("reasoning_content");
            }
        }
        let calls = messages[known..].iter().filter_map(|message| message.get("tool_calls"));
        let mut as_text = false;
        for value in tools.iter().chain(calls) {
            as_text = as_text || self.is_hostile_inside(value)?;
        }
        let Dressed { messages, tools, places } = dress(self.template, messages, tools, as_text);
        let rendered = self.template.render_with(&messages, &tools, true, variables)?;
        let end = rendered.floor_char_boundary(rendered.len().saturating_sub(END_BYTES));
        let end = rendered[end..].to_owned();
        let skeleton = |anchor| self.skeleton(&messages, &tools, variables, anchor);
        if let Some(anchor) = anchor
            && let place = places[anchor + preface]
            // A template may refuse results that have no calls before them.
            && let Ok(skeleton) = skeleton(Some(place))
            && let Some(after) =
                skeleton.iter().rposition(|piece| matches!(piece, Piece::Content(at, _) if *at == place))
        {
            let pieces = align(&skeleton[after + 1..], &messages, &rendered, false)
                .unwrap_or_else(|| filled(&skeleton[after + 1..], &messages));
            let keep = items[anchor].token_end;
            let mut prompt = self.tokenize(&pieces, messages.len(), keep, false)?;
            prompt.end = end;
            // The answer may have ended with the very token that the template closes it with.
            if let Some(first) = prompt.tokens.first().copied()
                && log[keep - 1] == first
                && self.tokenizer.eog_tokens().contains(&first)
            {
                prompt.tokens.remove(0);
                for (start, end) in &mut prompt.ranges {
                    (*start, *end) = ((*start).max(keep + 1) - 1, (*end).max(keep + 1) - 1);
                }
            }
            prompt.keep_items = anchor + 1;
            prompt.ranges = undressed(&prompt.ranges, &places[anchor + preface + 1..]);
            return Ok(prompt);
        }
        let skeleton = skeleton(None)?;
        let pieces = match align(&skeleton, &messages, &rendered, true) {
            Some(pieces) => pieces,
            None => self.unaligned(&skeleton, &messages, &rendered)?,
        };
        let bos = self.tokenizer.bos_text();
        let add_bos = self.tokenizer.adds_bos() && (bos.is_empty() || !rendered.starts_with(&bos));
        let mut prompt = self.tokenize(&pieces, messages.len(), 0, add_bos)?;
        prompt.ranges = undressed(&prompt.ranges, &places[preface..]);
        prompt.end = end;
        Ok(prompt)
    }

    /// The rendered conversation with unique words in place of the messages' contents, cut at these words.
    /// Empty contents stay as they are, since templates ask for them; except `anchor`'s, whose calls and reasoning are
    /// left out: the log holds them.
    fn skeleton(
        &self,
        messages: &[Message],
        tools: &[Value],
        variables: &Map<String, Value>,
        anchor: Option<usize>,
    ) -> Result<Vec<Piece>, SessionError> {
        let nonce = nonce(messages);
        let word = |index: usize| format!("{nonce}x{index}z");
        let mut disguised = messages.to_vec();
        for (index, message) in disguised.iter_mut().enumerate() {
            if !content(message).trim().is_empty() || anchor == Some(index) {
                message.insert("content".into(), word(index).into());
            }
            if anchor == Some(index) {
                message.retain(|field, _| !matches!(field.as_str(), "tool_calls" | "reasoning_content"));
            }
        }
        let text = self.template.render_with(&disguised, tools, true, variables)?;
        let mut pieces = Vec::new();
        let mut rest = text.as_str();
        while let Some(at) = rest.find(&nonce) {
            pieces.push(Piece::Template(rest[..at].to_owned()));
            rest = &rest[at..];
            let index = rest[nonce.len()..]
                .strip_prefix('x')
                .and_then(|tail| tail.split_once('z'))
                .and_then(|(digits, _)| digits.parse::<usize>().ok())
                .filter(|index| *index < messages.len());
            let Some(index) = index else {
                // The template took a word apart: nothing can be told from this rendering.
                return Ok(vec![Piece::Template(text)]);
            };
            pieces.push(Piece::Content(index, String::new()));
            rest = &rest[word(index).len()..];
        }
        pieces.push(Piece::Template(rest.to_owned()));
        Ok(pieces)
    }

    fn tokenize(
        &self,
        pieces: &[Piece],
        messages: usize,
        base: usize,
        add_bos: bool,
    ) -> Result<Prompt, SessionError> {
        let mut tokens = Vec::new();
        let mut text = String::new();
        for piece in pieces {
            match piece {
                Piece::Content(_, content) if self.is_hostile(content)? => {
                    let first = add_bos && tokens.is_empty();
                    tokens.extend(self.tokenizer.encode(&text, Specials::Parse, first)?);
                    text.clear();
                    tokens.extend(self.tokenizer.encode(content, Specials::Literal, false)?);
                }
                piece => text.push_str(piece.text()),
            }
        }
        let first = add_bos && tokens.is_empty();
        tokens.extend(self.tokenizer.encode(&text, Specials::Parse, first)?);
        let ranges = self.ranges(pieces, messages, &tokens, base, add_bos);
        Ok(Prompt { keep_tokens: base, tokens, keep_items: 0, ranges, end: String::new() })
    }

    /// The whole rendering where the places of the contents in it cannot be told. A content with a special token written
    /// out then takes the place that ordinary text would have, or is refused where that has none.
    fn unaligned(
        &self,
        skeleton: &[Piece],
        messages: &[Message],
        rendered: &str,
    ) -> Result<Vec<Piece>, SessionError> {
        let mut any_hostile = false;
        for (index, message) in messages.iter().enumerate() {
            if !self.is_hostile(content(message))? {
                continue;
            }
            any_hostile = true;
            if !skeleton.iter().any(|piece| matches!(piece, Piece::Content(at, _) if *at == index)) {
                return Err(SessionError::Invalid {
                    param: "messages".into(),
                    message: format!(
                        "a message of role {:?} has one of the model's special tokens written out in its text, and the \
                         model's chat template rewrites texts, so that the two cannot be told apart; take it out",
                        message.get("role").and_then(Value::as_str).unwrap_or("")
                    ),
                });
            }
        }
        match any_hostile {
            true => Ok(filled(skeleton, messages)),
            false => Ok(vec![Piece::Template(rendered.to_owned())]),
        }
    }

    /// Whether a text somewhere in a JSON value holds a special token written out.
    fn is_hostile_inside(&self, value: &Value) -> Result<bool, SessionError> {
        let mut rest = vec![value];
        while let Some(value) = rest.pop() {
            let hostile = match value {
                Value::String(text) => self.is_hostile(text)?,
                Value::Array(values) => {
                    rest.extend(values);
                    false
                }
                Value::Object(fields) => {
                    rest.extend(fields.values());
                    fields
                        .keys()
                        .map(|key| self.is_hostile(key))
                        .collect::<Result<Vec<_>, _>>()?
                        .contains(&true)
                }
                Value::Null | Value::Bool(_) | Value::Number(_) => false,
            };
            if hostile {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether a message's text holds a special token written out.
    fn is_hostile(&self, content: &str) -> Result<bool, SessionError> {
        Ok(self.tokenizer.mentions_special(content)?)
    }

    /// The token range of each message. A message ends after the end-of-generation token that the template closes
    /// it with, or with its content where there is none; the next one begins there.
    fn ranges(
        &self,
        pieces: &[Piece],
        messages: usize,
        tokens: &[TokenId],
        base: usize,
        add_bos: bool,
    ) -> Vec<(usize, usize)> {
        let mut ends = vec![None; messages];
        let mut token = usize::from(add_bos && tokens.first() == self.tokenizer.bos().as_ref());
        let (mut token_offset, mut offset) = (0, 0);
        let mut last = None;
        for piece in pieces {
            let from = offset;
            offset += piece.text().len();
            while token < tokens.len() && token_offset < offset {
                let closes = token_offset >= from && self.tokenizer.eog_tokens().contains(&tokens[token]);
                token_offset += self.tokenizer.token_bytes(tokens[token]).map_or(0, <[u8]>::len).max(1);
                token += 1;
                if let (Piece::Template(_), true, Some(message)) = (piece, closes, last.take_if(|_| closes)) {
                    ends[message] = Some(token);
                }
            }
            if let Piece::Content(message, _) = piece {
                ends[*message] = Some(token);
                last = Some(*message);
            }
        }
        let mut start = base;
        // A message that the template did not show at its place ends where the one before it does.
        ends.into_iter()
            .map(|end| {
                let range = (start, end.map_or(start, |end| (base + end).max(start)));
                start = range.1;
                range
            })
            .collect()
    }
}

/// Templates write names among their own words, where special tokens count: none may be written out there. (Tools and calls
/// with one become content, and reasoning is left out.)
fn check_fields(voice: &Voice<'_>, input: &[Message]) -> Result<(), SessionError> {
    for message in input {
        for (field, value) in message.iter().filter(|(field, _)| {
            !matches!(field.as_str(), "role" | "content" | "tool_calls" | "reasoning_content")
        }) {
            check_hostile(voice, [value].into_iter(), &format!("messages.{field}"))?;
        }
    }
    Ok(())
}

fn check_hostile<'a>(
    voice: &Voice<'_>,
    mut values: impl Iterator<Item = &'a Value>,
    param: &str,
) -> Result<(), SessionError> {
    let found = values.find_map(|value| match voice.is_hostile_inside(value) {
        Ok(false) => None,
        found => Some(found),
    });
    if found.transpose()?.is_none() {
        return Ok(());
    }
    let field = param.strip_prefix("messages.").unwrap_or(param);
    Err(SessionError::Invalid {
        param: param.to_owned(),
        message: format!(
            "{field}: one of the model's special tokens is written out in it; take it out, or put it into a message's \
             content, where it is ordinary text"
        ),
    })
}

/// The range of each message that was dressed, from those of what it was dressed as: of several that became one, the first
/// has its tokens.
fn undressed(ranges: &[(usize, usize)], places: &[usize]) -> Vec<(usize, usize)> {
    let mut last = None;
    let range = |place: &usize| {
        let (start, end) = ranges[*place];
        if last.replace(*place) == Some(*place) { (end, end) } else { (start, end) }
    };
    places.iter().map(range).collect()
}

/// A word that is in no message.
fn nonce(messages: &[Message]) -> String {
    let mut hasher = blake3::Hasher::new();
    for message in messages {
        hasher.update(content(message).as_bytes());
    }
    // 64 bits of a hash of the messages: none of them can hold it but by a search of 2^64.
    format!("dm{}", &hasher.finalize().to_hex()[..16])
}

/// The skeleton with the messages' contents as they are.
fn filled(skeleton: &[Piece], messages: &[Message]) -> Vec<Piece> {
    let fill = |piece: &Piece| match piece {
        Piece::Content(index, _) => Piece::Content(*index, content(&messages[*index]).to_owned()),
        template => template.clone(),
    };
    skeleton.iter().map(fill).collect()
}

/// The skeleton with the contents as the template really renders them, found from the end of `rendered` backwards;
/// None when the two do not fit (the template does more to a content than to trim it or to drop its reasoning).
/// `whole`: nothing may be left over.
fn align(skeleton: &[Piece], messages: &[Message], rendered: &str, whole: bool) -> Option<Vec<Piece>> {
    let mut rest = rendered;
    let mut pieces = Vec::with_capacity(skeleton.len());
    for (at, piece) in skeleton.iter().enumerate().rev() {
        let piece = match piece {
            Piece::Template(text) => Piece::Template(text.clone()),
            Piece::Content(index, _) => {
                let before = at.checked_sub(1).map_or("", |before| skeleton[before].text());
                let content = content(&messages[*index]);
                let without_reasoning = content.rsplit_once("</think>").map_or(content, |(_, answer)| answer);
                let forms = [
                    content,
                    content.trim(),
                    content.trim_end(),
                    content.trim_start(),
                    without_reasoning.trim(),
                ];
                let form = forms
                    .into_iter()
                    .find(|form| rest.strip_suffix(form).is_some_and(|rest| rest.ends_with(before)))?;
                Piece::Content(*index, form.to_owned())
            }
        };
        rest = rest.strip_suffix(piece.text())?;
        pieces.push(piece);
    }
    if whole && !rest.is_empty() {
        return None;
    }
    pieces.reverse();
    Some(pieces)
}

#[cfg(test)]
#[path = "rendering_tests.rs"]
mod tests;
