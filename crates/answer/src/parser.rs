//! Takes an answer apart while it arrives.

use std::collections::VecDeque;

use crate::candidate::{Candidate, Step};
use crate::{AnswerFormat, CallShape, CallSyntax, Reasoning};

/// A part of an answer. Calls come one after the other, with consecutive indices from 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    Reasoning(String),
    Content(String),
    CallBegin {
        index: usize,
        name: String,
    },
    /// More of the JSON of the arguments.
    CallArguments {
        index: usize,
        fragment: String,
    },
    /// The arguments are whole. Absent where the answer was cut off in them.
    CallEnd {
        index: usize,
    },
}

/// Reads an answer's text in any chunks.
///
/// What is said with the chunks joins to the same whole however the text was cut: it is read character by character, and
/// what is open (the beginning of a mark, an object that may be a call) is held back until it is certain. What turns out not
/// to be a call is content. In no piece are only the marks, white space beside them, and the JSON around a call's name and
/// arguments.
pub struct AnswerParser {
    calls: Option<(CallSyntax, CallShape)>,
    reasoning: Option<Reasoning>,
    state: State,
    /// Characters still to be read: new ones, and those of a candidate that was no call.
    input: VecDeque<char>,
    /// What may be the beginning of a mark.
    pending: String,
    /// White space (and a separator of calls) that is said when text follows it, and dropped when a mark does.
    spaces: String,
    /// Nothing was said yet, so that reasoning may begin.
    at_beginning: bool,
    /// No content since the beginning, the reasoning or the last call.
    fresh: bool,
    /// White space is not said until content is: a mark came before it.
    drops_spaces: bool,
    /// Calls that were begun.
    begun: usize,
    pieces: Vec<Piece>,
}

enum State {
    Reasoning,
    Content,
    Call(Box<Candidate>),
}

/// What a mark in the text begins.
#[derive(Clone, Copy)]
enum Mark {
    Reasoning,
    Call { at_start: bool },
}

impl AnswerParser {
    pub fn new(format: &AnswerFormat) -> AnswerParser {
        let starts_open = format.reasoning.as_ref().is_some_and(|reasoning| reasoning.starts_open);
        AnswerParser {
            calls: format.calls.map(|syntax| (syntax, syntax.shape())),
            reasoning: format.reasoning.clone(),
            state: if starts_open { State::Reasoning } else { State::Content },
            input: VecDeque::new(),
            pending: String::new(),
            spaces: String::new(),
            at_beginning: true,
            fresh: true,
            drops_spaces: starts_open,
            begun: 0,
            pieces: Vec::new(),
        }
    }

    /// What became certain with more text.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        if self.calls.is_none() && self.reasoning.is_none() {
            return if text.is_empty() { Vec::new() } else { vec![Piece::Content(text.to_owned())] };
        }
        self.input.extend(text.chars());
        self.read();
        std::mem::take(&mut self.pieces)
    }

    /// What was held back, when no text follows.
    pub fn finish(mut self) -> Vec<Piece> {
        // Each round says at least one character that an unfinished candidate held back.
        while let State::Call(candidate) = &mut self.state {
            let Some(raw) = candidate.give_up() else { break };
            self.refuse(&raw);
            self.read();
        }
        for c in std::mem::take(&mut self.pending).chars() {
            self.say(c);
        }
        if !self.drops_spaces {
            let spaces = std::mem::take(&mut self.spaces);
            self.say_text(&spaces);
        }
        self.pieces
    }

    /// The text so far ends inside the reasoning.
    pub fn is_reasoning(&self) -> bool {
        matches!(self.state, State::Reasoning)
    }

    fn read(&mut self) {
        while let Some(c) = self.input.pop_front() {
            match &mut self.state {
                State::Reasoning | State::Content => {
                    self.pending.push(c);
                    self.settle();
                }
                State::Call(candidate) => {
                    let step = candidate.take(c);
                    self.step(step, c);
                }
            }
        }
    }

    /// Says of the pending text what can be no mark, or begins what the mark begins.
    fn settle(&mut self) {
        while !self.pending.is_empty() {
            if matches!(self.state, State::Reasoning) {
                if self.settle_reasoning() {
                    return;
                }
            } else if self.settle_content() {
                return;
            }
            let first = self.pending.remove(0);
            self.say(first);
        }
    }

    /// True when the pending text was a mark or may become one.
    fn settle_reasoning(&mut self) -> bool {
        let Some(reasoning) = &self.reasoning else { return false };
        let repeated = self.fresh && reasoning.open.starts_with(&self.pending);
        if self.pending == reasoning.close {
            self.pending.clear();
            self.spaces.clear();
            (self.state, self.fresh, self.at_beginning, self.drops_spaces) =
                (State::Content, true, false, true);
        } else if repeated && self.pending == reasoning.open {
            self.pending.clear();
        } else {
            return repeated || reasoning.close.starts_with(&self.pending);
        }
        true
    }

    fn settle_content(&mut self) -> bool {
        let opening =
            self.reasoning.iter().filter(|_| self.at_beginning).map(|it| (it.open.as_str(), Mark::Reasoning));
        let shape = self.calls.map(|(_, shape)| shape);
        let anywhere =
            shape.and_then(|shape| shape.trigger).map(|text| (text, Mark::Call { at_start: false }));
        let at_start = shape.filter(|_| self.fresh).map_or(&[][..], |shape| shape.at_start);
        let marks =
            opening.chain(anywhere).chain(at_start.iter().map(|text| (*text, Mark::Call { at_start: true })));
        let mut possible = false;
        let mut found = None;
        for (text, mark) in marks {
            possible |= text.starts_with(&self.pending);
            if text == self.pending {
                found = Some(mark);
            }
        }
        match (found, self.calls) {
            (Some(Mark::Reasoning), _) => {
                self.pending.clear();
                self.spaces.clear();
                (self.state, self.drops_spaces) = (State::Reasoning, true);
            }
            (Some(Mark::Call { at_start }), Some((syntax, _))) => {
                let mark = std::mem::take(&mut self.pending);
                self.state = State::Call(Box::new(Candidate::new(syntax, mark, at_start)));
            }
            _ => return possible,
        }
        true
    }

    fn step(&mut self, step: Step, c: char) {
        match step {
            Step::More => {}
            Step::Begin { name, arguments } => {
                self.begin(name);
                self.arguments(&arguments);
            }
            Step::Arguments(c) => self.arguments(c.encode_utf8(&mut [0; 4])),
            Step::End => self.end(),
            Step::Whole { name, arguments } => {
                self.begin(name);
                self.arguments(&arguments);
                self.end();
            }
            Step::LastArguments(c) => {
                self.arguments(c.encode_utf8(&mut [0; 4]));
                self.end();
                self.state = State::Content;
            }
            Step::Over => self.state = State::Content,
            Step::EndBefore(text) => {
                self.end();
                self.state = State::Content;
                self.put_back(&text);
            }
            Step::OverBefore(text) => {
                self.state = State::Content;
                self.put_back(&text);
            }
            Step::Wrong(raw) => {
                debug_assert!(raw.ends_with(c));
                self.refuse(&raw);
            }
        }
    }

    fn begin(&mut self, name: String) {
        self.spaces.clear();
        (self.at_beginning, self.fresh, self.drops_spaces) = (false, true, true);
        self.pieces.push(Piece::CallBegin { index: self.begun, name });
        self.begun += 1;
    }

    fn arguments(&mut self, more: &str) {
        let index = self.begun - 1;
        match self.pieces.last_mut() {
            Some(Piece::CallArguments { index: same, fragment }) if *same == index => fragment.push_str(more),
            _ => self.pieces.push(Piece::CallArguments { index, fragment: more.to_owned() }),
        }
    }

    fn end(&mut self) {
        self.pieces.push(Piece::CallEnd { index: self.begun - 1 });
    }

    /// The text of a candidate that is no call: its first character is content, and what follows is read again.
    fn refuse(&mut self, raw: &str) {
        self.state = State::Content;
        let mut characters = raw.chars();
        if let Some(first) = characters.next() {
            self.say(first);
        }
        self.put_back(characters.as_str());
    }

    fn put_back(&mut self, text: &str) {
        for c in text.chars().rev() {
            self.input.push_front(c);
        }
    }

    /// Says a character as what the state makes it.
    fn say(&mut self, c: char) {
        let separates = c == ';' && self.fresh && self.begun > 0 && self.spaces.is_empty();
        let separates = separates && matches!(self.calls, Some((CallSyntax::Llama3, _)));
        if separates {
            // Said should text follow: see `say_text`.
            self.spaces.push(c);
        } else if c.is_whitespace() {
            if !(self.fresh && self.drops_spaces && self.spaces.is_empty()) {
                self.spaces.push(c);
            }
        } else {
            let mut text = std::mem::take(&mut self.spaces);
            text.push(c);
            self.say_text(&text);
            (self.fresh, self.drops_spaces) = (false, false);
            self.at_beginning &= matches!(self.state, State::Reasoning);
        }
    }

    fn say_text(&mut self, text: &str) {
        if text.is_empty() {
            return;
        }
        match (&self.state, self.pieces.last_mut()) {
            (State::Reasoning, Some(Piece::Reasoning(said))) => said.push_str(text),
            (State::Reasoning, _) => self.pieces.push(Piece::Reasoning(text.to_owned())),
            (_, Some(Piece::Content(said))) => said.push_str(text),
            _ => self.pieces.push(Piece::Content(text.to_owned())),
        }
    }
}

#[cfg(test)]
#[path = "parser_tests.rs"]
mod tests;
