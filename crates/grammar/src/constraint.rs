//! One answer while it is generated.

use dormouse_models::TokenId;
use llguidance::Matcher;

use crate::ConstraintError;

/// Where an answer stands in its grammar: a function of its tokens alone.
pub struct Constraint {
    matcher: Matcher,
    /// Nothing follows the token that ended the answer.
    ended: bool,
    eos: Vec<TokenId>,
    mask: Option<toktrie::SimpleVob>,
}

impl Constraint {
    pub(crate) fn new(matcher: Matcher) -> Constraint {
        let eos = matcher.tok_env().map(|env| env.tok_trie().eos_tokens().to_vec()).unwrap_or_default();
        Constraint { matcher, ended: false, eos, mask: None }
    }

    /// Takes the logits of tokens that may not come next to minus infinity. Where the answer may end, tokens that end it
    /// may come; where it is complete, only they.
    pub fn mask(&mut self, logits: &mut [f32]) -> Result<(), ConstraintError> {
        self.prepare()?;
        let Some(mask) = &self.mask else { return Ok(()) };
        let words = mask.as_slice();
        for (chunk, word) in logits.chunks_mut(32).zip(words.iter().copied().chain(std::iter::repeat(0))) {
            match word {
                0 => chunk.fill(f32::NEG_INFINITY),
                u32::MAX => {}
                _ => {
                    for (bit, logit) in chunk.iter_mut().enumerate() {
                        if word >> bit & 1 == 0 {
                            *logit = f32::NEG_INFINITY;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Finds the tokens that may come next, so that [`Constraint::mask`] need not.
    pub fn prepare(&mut self) -> Result<(), ConstraintError> {
        if self.mask.is_none() {
            self.mask = Some(self.matcher.compute_mask_or_eos().map_err(|error| failed(&error))?);
        }
        Ok(())
    }

    /// Whether the token may come next.
    pub fn allows(&mut self, token: TokenId) -> Result<bool, ConstraintError> {
        if let Some(mask) = &self.mask {
            return Ok(mask.len() > token as usize && mask.is_allowed(token));
        }
        if self.matcher.is_stopped() || self.eos.contains(&token) {
            self.prepare()?;
            return self.allows(token);
        }
        self.matcher.validate_tokens(&[token]).map(|count| count > 0).map_err(|error| failed(&error))
    }

    /// How many of these tokens, one after the other, may come next.
    pub fn allowed(&mut self, tokens: &[TokenId]) -> Result<usize, ConstraintError> {
        if self.ended || self.matcher.is_stopped() {
            return Ok(0);
        }
        self.matcher.validate_tokens(tokens).map_err(|error| failed(&error))
    }

    /// The answer goes on with this token.
    pub fn advance(&mut self, token: TokenId) -> Result<(), ConstraintError> {
        self.mask = None;
        if self.ended {
            return Err(ConstraintError(format!("token {token} follows the answer's end")));
        }
        if self.eos.contains(&token) {
            self.ended = true;
            let may_end =
                self.matcher.is_stopped() || self.matcher.is_accepting().map_err(|error| failed(&error))?;
            return match may_end {
                true => Ok(()),
                false => Err(ConstraintError(format!("token {token} ends the answer too early"))),
            };
        }
        self.matcher.consume_token(token).map_err(|error| failed(&error))
    }

    /// Bytes that any continuation begins with.
    pub fn forced(&mut self) -> Vec<u8> {
        if self.ended || self.matcher.is_stopped() { Vec::new() } else { self.matcher.compute_ff_bytes() }
    }
}

fn failed(error: &impl std::fmt::Display) -> ConstraintError {
    let text = error.to_string();
    ConstraintError(text.split("\n<").next().unwrap_or(&text).trim().to_owned())
}
