//! Speculation: guesses at the next tokens, computed in the same step as the token that is known.
//!
//! A guess is one more row of its sequence. Its token is accepted when it is the one that the sampler chooses from the
//! row before it, and then its own row says what comes next: the step has yielded one more token. Rows do not depend on
//! their neighbours, draws are a function of (seed, position), and penalties know only accepted tokens, so what is
//! emitted, log-probabilities included, is what plain decoding emits. Speculation changes when tokens come and nothing
//! else. The keys and values of refused guesses stay where they were written, after the table's last position: no commit
//! names them, and the next rows overwrite them.

use std::sync::Arc;

use dormouse_models::TokenId;

use crate::ngram::{Match, NgramIndex};

/// Most guesses that are computed for one sequence in a step. With the row of the known token they fill one tile of the
/// attention kernel, which reads each page once for all of them.
pub const DRAFT_MOST: usize = 15;

/// Where guesses come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Speculation {
    /// No guesses: one token a step.
    Off,
    /// What followed the last time that the session's last tokens occurred in it.
    #[default]
    Ngram,
}

impl Speculation {
    pub const ALL: [Speculation; 2] = [Speculation::Ngram, Speculation::Off];

    pub fn name(self) -> &'static str {
        match self {
            Speculation::Off => "off",
            Speculation::Ngram => "ngram",
        }
    }

    pub fn parse(text: &str) -> Option<Speculation> {
        Speculation::ALL.into_iter().find(|speculation| speculation.name() == text)
    }
}

/// Guesses at what follows a token log, by anyone.
pub type Guess = Arc<dyn Fn(&[TokenId]) -> Vec<TokenId> + Send + Sync>;

/// Who guesses for an engine's turns.
#[derive(Clone)]
pub enum DraftSource {
    Speculation(Speculation),
    /// Somebody else, and all guesses are computed, whatever they turn out to be worth. The tokens must be the same
    /// whatever is guessed: this is how tests reach every way of accepting and refusing.
    Given(Guess),
}

impl From<Speculation> for DraftSource {
    fn from(speculation: Speculation) -> DraftSource {
        DraftSource::Speculation(speculation)
    }
}

impl DraftSource {
    pub(crate) fn is_given(&self) -> bool {
        matches!(self, DraftSource::Given(_))
    }
}

/// One turn's guesses, and how good they have been.
pub struct Drafter {
    source: Source,
    /// Guesses at the tokens after the log's end, from the last [`Drafter::guess`].
    guesses: Vec<TokenId>,
    /// Tokens that agreed before the first guess.
    evidence: usize,
    chances: Chances,
}

enum Source {
    Nothing,
    Ngram(NgramIndex),
    Given(Guess),
}

impl Drafter {
    /// `log_most`: the length that the turn's log may reach.
    pub fn new(source: &DraftSource, log_most: usize) -> Drafter {
        let source = match source {
            DraftSource::Speculation(Speculation::Off) => Source::Nothing,
            DraftSource::Speculation(Speculation::Ngram) => Source::Ngram(NgramIndex::new(log_most)),
            DraftSource::Given(guess) => Source::Given(Arc::clone(guess)),
        };
        Drafter { source, guesses: Vec::new(), evidence: 0, chances: Chances::default() }
    }

    /// Guesses what follows `log`. One guess more than can be computed: the last row's token is compared, too.
    pub fn guess(&mut self, log: &[TokenId]) {
        self.guesses.clear();
        match &mut self.source {
            Source::Nothing => {}
            Source::Given(guess) => self.guesses.extend(guess(log).into_iter().take(DRAFT_MOST + 1)),
            Source::Ngram(index) => {
                if let Some(found @ Match { length, .. }) = index.find(log) {
                    self.evidence = length;
                    self.guesses.extend((0..=DRAFT_MOST).map(|ahead| found.token(log, ahead)));
                }
            }
        }
    }

    /// Whether [`Drafter::hint`] is of use.
    pub fn takes_hints(&self) -> bool {
        matches!(self.source, Source::Ngram(_))
    }

    /// These tokens follow, if the sampler cuts the text as the tokenizer does.
    pub fn hint(&mut self, tokens: Vec<TokenId>) {
        self.guesses = tokens;
        self.guesses.truncate(DRAFT_MOST + 1);
        self.evidence = FORCED;
    }

    /// Forgets all guesses but the first.
    pub fn truncate(&mut self, count: usize) {
        self.guesses.truncate(count);
    }

    pub fn guesses(&self) -> &[TokenId] {
        &self.guesses
    }

    /// The chance that the guess `at` this index is right if all before it are; 0 if there is none.
    pub fn chance(&self, at: usize) -> f64 {
        match self.source {
            _ if at >= self.guesses.len() => 0.0,
            Source::Given(_) => 1.0,
            _ => self.chances.of(self.evidence + at),
        }
    }

    /// The sampler chose `token` where this guess stands, all before it having been right: whether this one is, too.
    /// Whether its row was computed does not matter, so what guesses are worth is known before any is paid for.
    pub fn judge(&mut self, at: usize, token: TokenId) -> bool {
        let Some(guess) = self.guesses.get(at) else { return false };
        let right = *guess == token;
        self.chances.observe(self.evidence + at, right);
        right
    }
}

/// How often guesses were right lately, by the number of tokens that agreed before them: two words in a row say little,
/// a sentence that is being copied says much.
struct Chances([f64; 5]);

/// The evidence of a grammar that leaves no choice.
const FORCED: usize = 1 << 20;

impl Default for Chances {
    fn default() -> Chances {
        Chances([0.2, 0.4, 0.6, 0.8, 0.9])
    }
}

impl Chances {
    fn of(&self, evidence: usize) -> f64 {
        self.0[Chances::class(evidence)]
    }

    fn observe(&mut self, evidence: usize, right: bool) {
        const LEARNING_RATE: f64 = 1.0 / 8.0;
        let chance = &mut self.0[Chances::class(evidence)];
        *chance += LEARNING_RATE * (f64::from(u8::from(right)) - *chance);
    }

    fn class(evidence: usize) -> usize {
        match evidence {
            0..=2 => 0,
            3..=4 => 1,
            5..=8 => 2,
            9..FORCED => 3,
            _ => 4,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guesses_gain_and_lose_trust_without_being_computed() {
        let mut drafter = Drafter::new(&DraftSource::Speculation(Speculation::Ngram), 100);
        let mut log: Vec<TokenId> = (0..20).chain(0..10).collect();
        drafter.guess(&log);
        assert_eq!(drafter.guesses()[..3], [10, 11, 12]);
        let before = drafter.chance(0);
        assert!(drafter.judge(0, 10) && drafter.chance(0) > before);
        log.push(10);
        drafter.guess(&log);
        assert!(!drafter.judge(0, 99) && drafter.chance(0) < before);
        assert_eq!(drafter.chance(DRAFT_MOST + 1), 0.0);
    }

    #[test]
    fn nothing_is_guessed_when_speculation_is_off() {
        let mut drafter = Drafter::new(&DraftSource::Speculation(Speculation::Off), 100);
        drafter.guess(&[1, 2, 3, 1, 2, 3, 1, 2]);
        assert!(drafter.guesses().is_empty() && !drafter.judge(0, 3));
    }

    #[test]
    fn every_name_is_parsed() {
        for speculation in Speculation::ALL {
            assert_eq!(Speculation::parse(speculation.name()), Some(speculation));
        }
        assert_eq!(Speculation::parse("draft"), None);
    }
}
