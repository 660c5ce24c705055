//! From requests to grammars, each compiled once.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use dormouse_models::Tokenizer;
use llguidance::api::TopLevelGrammar;
use llguidance::{Matcher, ParserFactory};

use crate::request::GrammarRequest;
use crate::vocabulary::Vocabulary;
use crate::{Constraint, GrammarError, lark};

/// Grammars that are kept for the next request of the same form.
const MOST_KEPT: usize = 32;
/// States of the automaton of one answer: 1 to 2 kB each.
const MOST_STATES: usize = 50_000;
/// Ways in which an answer may go on; an optional property is four.
const MOST_ITEMS: usize = 8000;

/// Makes grammars for one model.
pub struct Compiler {
    vocabulary: Vocabulary,
    factory: ParserFactory,
    /// The last one used is the last.
    kept: Mutex<Vec<(blake3::Hash, Arc<Grammar>)>>,
}

/// What an answer may be, ready to be used by any number of turns.
pub struct Grammar {
    beginning: Mutex<Matcher>,
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Grammar")
    }
}

impl Compiler {
    /// Reads all tokens: takes a tenth of a second or so.
    pub fn new(tokenizer: &Tokenizer) -> Result<Compiler, GrammarError> {
        let vocabulary = Vocabulary::new(tokenizer)?;
        let mut factory = ParserFactory::new_simple(&vocabulary.env).map_err(|error| {
            GrammarError::new("response_format", format!("the model's tokens cannot be used: {error}"))
        })?;
        factory.quiet();
        let limits = factory.limits_mut();
        limits.verbose_errors = false;
        limits.max_lexer_states = MOST_STATES;
        limits.max_items_in_row = MOST_ITEMS;
        Ok(Compiler { vocabulary, factory, kept: Mutex::default() })
    }

    /// The grammar of the answers to a request; None when they may be any text.
    pub fn compile(&self, request: &GrammarRequest) -> Result<Option<Arc<Grammar>>, GrammarError> {
        let key = request.key();
        if let Ok(mut kept) = self.kept.lock()
            && let Some(at) = kept.iter().position(|(other, _)| *other == key)
        {
            let found = kept.remove(at);
            let grammar = Arc::clone(&found.1);
            kept.push(found);
            return Ok(Some(grammar));
        }
        let Some(text) = lark::grammar(request, &self.vocabulary, &[])? else { return Ok(None) };
        let matcher = match self.matcher(text) {
            Ok(matcher) => matcher,
            Err(why) => self.relaxed(request).ok_or_else(|| self.explain(request, why))?,
        };
        let grammar = Arc::new(Grammar { beginning: Mutex::new(matcher) });
        if let Ok(mut kept) = self.kept.lock() {
            if kept.len() >= MOST_KEPT {
                kept.remove(0);
            }
            kept.push((key, Arc::clone(&grammar)));
        }
        Ok(Some(grammar))
    }

    fn matcher(&self, text: String) -> Result<Matcher, String> {
        let compiled = catch_unwind(AssertUnwindSafe(|| {
            let mut matcher = Matcher::new(self.factory.create_parser(TopLevelGrammar::from_lark(text)));
            // Whether there is an answer at all; and the first mask is the dearest.
            matcher.compute_mask().map(|_| matcher).map_err(|error| format!("{error:#}"))
        }));
        compiled.unwrap_or_else(|_| Err("the grammar engine panicked".into()))
    }

    /// The same where arguments of functions that are not strict, and that the grammar engine refuses, may be any object; where it
    /// refuses all of them together, of all.
    fn relaxed(&self, request: &GrammarRequest) -> Option<Matcher> {
        let functions = request.functions();
        let loose: Vec<&str> = functions.iter().filter(|it| !it.strict).map(|it| it.name).collect();
        let refused: Vec<&str> =
            loose.iter().copied().filter(|name| self.refuses(&alone(request, name)).is_some()).collect();
        [refused, loose].into_iter().filter(|free| !free.is_empty()).find_map(|free| {
            let text = lark::grammar(request, &self.vocabulary, &free).ok()??;
            self.matcher(text).ok()
        })
    }

    /// Why there is no grammar for this request.
    fn refuses(&self, request: &GrammarRequest) -> Option<String> {
        let text = lark::grammar(request, &self.vocabulary, &[]).ok()??;
        self.matcher(text).err()
    }

    /// Says which part of the request the grammar engine refuses, by asking for each alone.
    fn explain(&self, request: &GrammarRequest, why: String) -> GrammarError {
        let text_only = GrammarRequest { tools: Vec::new(), choice: Default::default(), ..request.clone() };
        if let Some(why) = self.refuses(&text_only) {
            return refusal(lark::FORMAT, &why);
        }
        for function in request.functions() {
            if let Some(why) = self.refuses(&alone(request, function.name)) {
                return refusal(&function.param, &why);
            }
        }
        refusal(if request.tools.is_empty() { lark::FORMAT } else { "tools" }, &why)
    }
}

/// The request for a call of this function alone.
fn alone(request: &GrammarRequest, name: &str) -> GrammarRequest {
    let choice = dormouse_answer::ToolChoice::Function(name.to_owned());
    GrammarRequest { format: Default::default(), choice, ..request.clone() }
}

/// The grammar engine's words, and the keyword that they are about.
fn refusal(param: &str, why: &str) -> GrammarError {
    // What it says, the keyword, and what is said instead where its words speak of its own insides.
    const TOLD: [(&str, &str, &str); 11] = [
        ("min/maxProperties", "maxProperties", ""),
        ("patternProperty", "patternProperties", ""),
        ("Regex is empty", "pattern", "no text satisfies the pattern, the format and the lengths"),
        (
            "Unable to determine",
            "pattern",
            "it is too hard to tell whether any text satisfies it; simplify it",
        ),
        ("regex", "pattern", ""),
        ("circular references", "$ref", ""),
        ("required property", "required", ""),
        ("minProperties", "minProperties", ""),
        ("multiple", "multipleOf", ""),
        ("minimum", "minimum", ""),
        ("minItems", "minItems", ""),
    ];
    let why = why.rsplit("failed to compile JSON schema: ").next().unwrap_or(why);
    // What is wrong with an expression stands under the expression.
    let lines = || why.lines().map(str::trim);
    let line = lines().find(|line| line.starts_with("error: ")).or_else(|| lines().next()).unwrap_or(why);
    let line = line.trim_start_matches("error: ");
    // Under its first line stands the grammar.
    let first = lines().next().unwrap_or(why);
    match TOLD.iter().find(|(words, _, _)| first.contains(words)) {
        Some((_, keyword, "")) => GrammarError::keyword(param, "", keyword, line),
        Some((_, keyword, told)) => GrammarError::keyword(param, "", keyword, told),
        None => GrammarError::new(param, format!("no grammar can be made of the schema: {line}")),
    }
}

impl Grammar {
    /// An answer that has not begun.
    pub fn begin(&self) -> Constraint {
        // What panicked while it held the lock only copied.
        let beginning = self.beginning.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        Constraint::new(beginning.deep_clone())
    }
}
