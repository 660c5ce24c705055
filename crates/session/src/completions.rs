//! Plain completions: text or tokens that go on, without messages, template or history. Each is a session of its own while it
//! runs; what it computed stays as cache.

use std::sync::Arc;

use dormouse_models::{Specials, Tokenizer};

use crate::api::*;
use crate::draft::check_size;
use crate::hub::Hub;
use crate::ids;
use crate::records::message;
use crate::runtime::{Runtime, detached};
use crate::turns::Start;

/// What is to go on.
#[derive(Clone, Debug, PartialEq)]
pub enum RawPrompt {
    /// Tokenised as it is, special tokens that are written out in it included; BOS is put first where the model wants one.
    Text(String),
    /// Taken as they are.
    Tokens(Vec<u32>),
}

/// `POST /v1/completions`, already parsed.
#[derive(Clone, Debug)]
pub struct CompletionRequest {
    pub model: Option<String>,
    pub prompts: Vec<RawPrompt>,
    pub generation: Generation,
    /// Independent continuations of each prompt.
    pub n: usize,
    /// See [`CreateSession::cache_salt`].
    pub cache_salt: Option<String>,
}

/// One prompt, and its continuations under way.
pub struct Completion {
    pub tokens: Vec<u32>,
    pub streams: Vec<TurnStream>,
}

impl Runtime {
    /// Continues each prompt; the completions are in the prompts' order. Dropping a stream cancels its continuation.
    pub async fn complete(
        &self,
        tenant: &Tenant,
        request: CompletionRequest,
    ) -> Result<Vec<Completion>, SessionError> {
        let (runtime, tenant) = (self.clone(), tenant.clone());
        detached(async move { runtime.complete_all(&tenant, request).await }).await
    }

    async fn complete_all(
        &self,
        tenant: &Tenant,
        request: CompletionRequest,
    ) -> Result<Vec<Completion>, SessionError> {
        let CompletionRequest { model, prompts, generation, n, cache_salt } = request;
        let engine = self.inner.engine(model.as_deref())?.clone();
        let answers = generation.max_tokens != Some(0);
        // All of them before the first one runs: a wrong prompt costs nothing.
        let tokenized = tokio::task::spawn_blocking(move || {
            let (tokenizer, context) = (engine.model().tokenizer(), engine.model().context());
            let one =
                |(index, prompt): (usize, RawPrompt)| tokens(tokenizer, context, answers, index, prompt);
            prompts.into_iter().enumerate().map(one).collect::<Result<Vec<_>, SessionError>>()
        });
        let tokenized = tokenized
            .await
            .map_err(|why| SessionError::Internal(format!("reading the prompt failed: {why}")))??;
        let create = CreateSession { cache_salt, ..CreateSession::default() };
        let settings = self.new_settings(model.as_deref(), &create)?;
        let mut completions = Vec::with_capacity(tokenized.len());
        for tokens in tokenized {
            let mut streams = Vec::with_capacity(n);
            let mut first: Option<Arc<Hub>> = None;
            for choice in 0..n.max(1) {
                let mut generation = generation.clone();
                generation.sampling.seed = ids::choice_seed(generation.sampling.seed, choice);
                let start = Start {
                    raw: Some(tokens.clone()),
                    cancel_when_left: true,
                    delete_after: true,
                    // The other choices find the prompt's pages, once the first has computed them.
                    gate: first.as_ref().map(|hub| hub.warm()),
                    ..Start::new(Vec::new(), generation)
                };
                // After an error, dropping those that were begun cancels them.
                let (hub, stream) = self.begin_hidden(tenant, &settings, start).await?;
                streams.push(stream);
                first.get_or_insert(hub);
            }
            completions.push(Completion { tokens, streams });
        }
        Ok(completions)
    }

    /// The text of these tokens of a model (of the first loaded one when None), special tokens written out. Bytes that are
    /// no text become U+FFFD.
    pub fn text_of(&self, model: Option<&str>, tokens: &[u32]) -> String {
        let bytes: Vec<u8> = tokens.iter().flat_map(|token| self.token_bytes(model, *token)).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

fn tokens(
    tokenizer: &Tokenizer,
    context: usize,
    answers: bool,
    index: usize,
    prompt: RawPrompt,
) -> Result<Vec<u32>, SessionError> {
    let invalid = |param: String, message: String| SessionError::Invalid { param, message };
    let tokens = match prompt {
        RawPrompt::Text(text) => {
            check_size(tokenizer, context, &[message("user", &text)])?;
            let bos = tokenizer.bos_text();
            let add_bos = tokenizer.adds_bos() && (bos.is_empty() || !text.starts_with(&bos));
            tokenizer.encode(&text, Specials::Parse, add_bos)?
        }
        RawPrompt::Tokens(tokens) => {
            let known = tokenizer.vocab_size();
            if let Some((at, token)) = tokens.iter().enumerate().find(|(_, token)| **token as usize >= known)
            {
                let message =
                    format!("prompt: there is no token {token}, the model's tokens are 0 to {}", known - 1);
                return Err(invalid(format!("prompt[{index}][{at}]"), message));
            }
            tokens
        }
    };
    if tokens.is_empty() {
        let message = "prompt: an empty prompt has no continuation; give it at least one token";
        return Err(invalid("prompt".into(), message.into()));
    }
    if tokens.len() + usize::from(answers) > context {
        return Err(SessionError::ContextLengthExceeded { context, tokens: tokens.len(), or_more: false });
    }
    Ok(tokens)
}
