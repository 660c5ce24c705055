//! What may be a call: from the mark that begins it to its end, or to the character that shows that it is none.

use crate::CallSyntax;
use crate::object::{Belongs, CallObject, Said, ValueEnd, is_name_character};

/// Text that a candidate holds back at the most. A call says its name before that; it bounds the work on text that begins
/// call after call and never is one.
const HELD_BACK: usize = 16 << 10;

/// What a candidate says to a character.
#[derive(Debug)]
pub(crate) enum Step {
    More,
    /// It is a call: its name, and the beginning of its arguments.
    Begin {
        name: String,
        arguments: String,
    },
    Arguments(char),
    /// The call is over; its closing mark is still to be read.
    End,
    /// A call in one piece; its closing mark is still to be read.
    Whole {
        name: String,
        arguments: String,
    },
    /// The last character of the arguments, and of the call.
    LastArguments(char),
    /// The closing mark was read.
    Over,
    /// The call is over, and this text comes after it.
    EndBefore(String),
    /// There is no closing mark: this text comes after the call.
    OverBefore(String),
    /// No call: all of its text, from the mark on.
    Wrong(String),
}

pub(crate) struct Candidate {
    syntax: CallSyntax,
    stage: Stage,
    object: CallObject,
    value: ValueEnd,
    /// The text since the mark, or since the last call of a list; while it may be no call.
    raw: String,
    certain: bool,
    in_list: bool,
    /// A name alone is no call: the text began without a mark of calls.
    needs_arguments: bool,
}

enum Stage {
    /// After Mistral's mark: a list, an object or a name.
    Open,
    Object,
    /// In Mistral's list: a comma or the end.
    BetweenObjects,
    Name(String),
    /// A mark after a name: `[ARGS]` or `[CALL_ID]`.
    NameMark {
        name: String,
        mark: String,
    },
    CallId(String),
    BeforeArguments(String),
    Arguments,
    /// The closing mark, as far as it was read.
    Closing(String),
}

impl Candidate {
    /// `mark` was read.
    pub fn new(syntax: CallSyntax, mark: String, at_start: bool) -> Candidate {
        let mut candidate = Candidate {
            syntax,
            stage: match syntax {
                CallSyntax::Mistral | CallSyntax::MistralArgs => Stage::Open,
                _ => Stage::Object,
            },
            object: CallObject::default(),
            value: ValueEnd::default(),
            raw: mark,
            certain: false,
            in_list: false,
            needs_arguments: at_start,
        };
        if candidate.raw == "{" {
            // Without any mark it is the object itself that begins.
            candidate.object.take('{');
        }
        candidate
    }

    /// The text of what can be no call any more, as none follows; None where it was one.
    pub fn give_up(&mut self) -> Option<String> {
        (!self.certain).then(|| std::mem::take(&mut self.raw))
    }

    pub fn take(&mut self, c: char) -> Step {
        if !self.certain {
            self.raw.push(c);
            if self.raw.len() > HELD_BACK {
                return self.wrong();
            }
        }
        let space = c.is_ascii_whitespace();
        match std::mem::replace(&mut self.stage, Stage::Object) {
            Stage::Open if space => self.go(Stage::Open),
            Stage::Open if c == '[' => {
                self.in_list = true;
                Step::More
            }
            Stage::Open if c == '{' => self.in_object(c),
            Stage::Open if is_name_character(c) => self.go(Stage::Name(c.to_string())),
            Stage::Object => self.in_object(c),
            Stage::BetweenObjects if space => self.go(Stage::BetweenObjects),
            Stage::BetweenObjects if c == ',' => {
                (self.object, self.certain) = (CallObject::default(), false);
                self.raw = c.to_string();
                Step::More
            }
            Stage::BetweenObjects if c == ']' => Step::Over,
            Stage::BetweenObjects => Step::OverBefore(c.to_string()),
            Stage::Name(mut name) if is_name_character(c) => {
                name.push(c);
                self.go(Stage::Name(name))
            }
            Stage::Name(name) if space => self.go(Stage::Name(name)),
            Stage::Name(name) if c == '[' => self.go(Stage::NameMark { name, mark: c.to_string() }),
            Stage::Name(name) | Stage::BeforeArguments(name) if c == '{' => self.begin(name, c),
            Stage::NameMark { name, mut mark } => {
                mark.push(c);
                match mark.as_str() {
                    "[ARGS]" => self.go(Stage::BeforeArguments(name)),
                    "[CALL_ID]" => self.go(Stage::CallId(name)),
                    mark if "[ARGS]".starts_with(mark) || "[CALL_ID]".starts_with(mark) => {
                        let mark = mark.to_owned();
                        self.go(Stage::NameMark { name, mark })
                    }
                    _ => self.wrong(),
                }
            }
            Stage::CallId(name) if is_name_character(c) => self.go(Stage::CallId(name)),
            Stage::CallId(name) if c == '[' => self.go(Stage::NameMark { name, mark: c.to_string() }),
            Stage::BeforeArguments(name) if space => self.go(Stage::BeforeArguments(name)),
            Stage::Arguments => match self.value.take(c) {
                Belongs::Last => Step::LastArguments(c),
                Belongs::Yes | Belongs::No => {
                    self.stage = Stage::Arguments;
                    Step::Arguments(c)
                }
            },
            Stage::Closing(read) => self.closing(read, c),
            Stage::Open | Stage::Name(_) | Stage::CallId(_) | Stage::BeforeArguments(_) => self.wrong(),
        }
    }

    fn go(&mut self, stage: Stage) -> Step {
        self.stage = stage;
        Step::More
    }

    fn wrong(&mut self) -> Step {
        Step::Wrong(std::mem::take(&mut self.raw))
    }

    fn begin(&mut self, name: String, c: char) -> Step {
        self.certain = true;
        self.value = ValueEnd::default();
        self.value.take(c);
        self.stage = Stage::Arguments;
        Step::Begin { name, arguments: c.to_string() }
    }

    fn in_object(&mut self, c: char) -> Step {
        match self.object.take(c) {
            Said::More => Step::More,
            Said::Begin { name, arguments } => {
                self.certain = true;
                Step::Begin { name, arguments }
            }
            Said::Arguments(c) => Step::Arguments(c),
            Said::End => {
                self.stage = self.after_object();
                Step::End
            }
            Said::Whole { name, arguments } if arguments.is_some() || !self.needs_arguments => {
                self.certain = true;
                self.stage = self.after_object();
                Step::Whole { name, arguments: arguments.unwrap_or_else(|| "{}".to_owned()) }
            }
            // The arguments are said, and what follows them is not as it should be.
            Said::Wrong if self.certain => Step::EndBefore(c.to_string()),
            Said::Whole { .. } | Said::Wrong => self.wrong(),
        }
    }

    fn after_object(&self) -> Stage {
        match self.in_list {
            true => Stage::BetweenObjects,
            false => Stage::Closing(String::new()),
        }
    }

    fn closing(&mut self, mut read: String, c: char) -> Step {
        let mark = match self.syntax {
            CallSyntax::Hermes | CallSyntax::Generic => "</tool_call>",
            CallSyntax::Gemma => "```",
            CallSyntax::Llama3 | CallSyntax::Mistral | CallSyntax::MistralArgs => "",
        };
        if read.is_empty() && c.is_ascii_whitespace() && !mark.is_empty() {
            return self.go(Stage::Closing(read));
        }
        read.push(c);
        match mark.strip_prefix(read.as_str()) {
            Some("") => Step::Over,
            Some(_) => self.go(Stage::Closing(read)),
            None => Step::OverBefore(read),
        }
    }
}
