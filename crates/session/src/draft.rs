//! A turn's prompt: the conversation rendered and tokenised, as much of it as the log does not hold already.

use dormouse_answer::AnswerFormat;
use dormouse_engine::Engine;
use dormouse_models::Tokenizer;

use crate::answers;
use crate::api::*;
use crate::records::{self, Frame, KnownItem, Settings, content, message};
use crate::rendering::{Conversation, Prompt, Voice};
use crate::truncation;
use crate::turns::Start;

/// The prompt of a turn.
pub(crate) struct Draft {
    pub system: Option<Message>,
    pub prompt: Prompt,
    pub answer_format: AnswerFormat,
    /// The first message (see [`truncation`]) that is not left out.
    pub begin: usize,
    /// Why the log is rendered anew from its start.
    pub rewritten: Option<&'static str>,
    /// The settings were changed.
    pub reframed: bool,
}

impl Draft {
    /// Renders and tokenises the conversation of `known` items, of which `log` has the tokens, with the turn's input.
    pub fn new(
        engine: &Engine,
        settings: &mut Settings,
        known: &[KnownItem],
        log: &[u32],
        start: &Start,
    ) -> Result<Draft, SessionError> {
        if let Some(tokens) = &start.raw {
            return Ok(Draft::raw(tokens.clone()));
        }
        let model = engine.model();
        let (tokenizer, context) = (model.tokenizer(), model.context());
        // Input that is certainly too long is not even tokenised.
        let size = check_size(tokenizer, context, &start.input);
        let size = if start.truncate { size } else { Ok(size?) };
        let reframed = start.reframe(settings);
        answers::check_choice(&start.generation.tool_choice, &settings.tools)?;
        let retokenized = settings.tokenizer != records::hex(&tokenizer.fingerprint());
        let mut rewritten = reframed.or(retokenized.then_some("tokenizer_changed"));
        let system = settings.instructions.as_deref().map(|text| message("system", text));
        let voice = Voice { tokenizer, template: model.template() };
        let plan = |items: &[KnownItem], input: &[Message], log: &[u32]| {
            let (system, tools) = (system.clone(), settings.tools.as_slice());
            let variables = &start.generation.template;
            voice.plan(&Conversation { system, items, input, tools, variables, log })
        };
        let room = context - start.generation.max_tokens.unwrap_or(1).clamp(1, context.div_ceil(2));
        let log = if rewritten.is_some() { &[] } else { log };
        let mut prompt = match size {
            Ok(()) => Ok(plan(known, &start.input, log)?),
            Err(why) => Err(why),
        };
        let mut begin = 0;
        if start.truncate && !prompt.as_ref().is_ok_and(|prompt| prompt.len() <= room) {
            let shorter = truncation::shorten(known, &start.input, |shown| {
                if check_size(tokenizer, context, &shown.input).is_err() {
                    return Ok(None);
                }
                let prompt = plan(&shown.items, &shown.input, &[])?;
                Ok(Some(prompt).filter(|prompt| prompt.len() <= room))
            })?;
            if let Some((first, shortened)) = shorter {
                (begin, prompt, rewritten) = (first, Ok(shortened), Some("truncated"));
            }
        }
        let prompt = prompt?;
        let answer_format =
            answers::format(model.template(), tokenizer, &prompt.end, &settings.tools, &start.generation)?;
        Ok(Draft { system, prompt, answer_format, begin, rewritten, reframed: reframed.is_some() })
    }

    /// Tokens that somebody else made.
    fn raw(tokens: Vec<u32>) -> Draft {
        let prompt = Prompt { keep_tokens: 0, tokens, keep_items: 0, ranges: Vec::new(), end: String::new() };
        let answer_format = AnswerFormat::default();
        Draft { system: None, prompt, answer_format, begin: 0, rewritten: None, reframed: false }
    }
}

impl Start {
    /// Makes the settings name what this turn's prompt begins with; why its tokens are others then than those of the log.
    fn reframe(&self, settings: &mut Settings) -> Option<&'static str> {
        let held = Frame { instructions: settings.instructions.clone(), tools: settings.tools.clone() };
        let mut own = settings.own.take().unwrap_or_else(|| held.clone());
        own.tools = self.tools.clone().unwrap_or(own.tools);
        let wanted = match &self.frame {
            Some(frame) => frame.clone().or(&own),
            None => own.clone(),
        };
        let reason = if wanted.tools != held.tools {
            Some("tools_changed")
        } else {
            (wanted.instructions != held.instructions).then_some("instructions_changed")
        };
        settings.instructions.clone_from(&wanted.instructions);
        settings.tools.clone_from(&wanted.tools);
        settings.own = (own != wanted).then_some(own);
        reason
    }
}

/// Refuses input that cannot fit however it is tokenised, before the work of tokenising it. Answers of earlier turns do
/// not count, nor does white space around a text: templates shorten them.
pub(crate) fn check_size(
    tokenizer: &Tokenizer,
    context: usize,
    input: &[Message],
) -> Result<(), SessionError> {
    let asked = input.iter().filter(|message| message.get("role").is_some_and(|role| role != "assistant"));
    let bytes: usize = asked.map(|message| content(message).trim().len()).sum();
    if bytes < context {
        return Ok(());
    }
    let ids = 0..u32::try_from(tokenizer.vocab_size()).unwrap_or(u32::MAX);
    let longest = ids.filter_map(|id| tokenizer.token_bytes(id)).map(<[u8]>::len).max().unwrap_or(1).max(1);
    match bytes / longest >= context {
        true => Err(SessionError::ContextLengthExceeded { context, tokens: bytes / longest, or_more: true }),
        false => Ok(()),
    }
}
