//! One JSON value, and the JSON object of a call, character by character.

/// Finds the end of a JSON value. It takes the brackets and strings for what they are and does not check the rest.
#[derive(Clone, Debug, Default)]
pub(crate) struct ValueEnd {
    depth: usize,
    in_string: bool,
    escaped: bool,
    begun: bool,
}

/// Whether a character belongs to a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Belongs {
    Yes,
    /// It is the value's last character.
    Last,
    /// The value ended before it.
    No,
}

impl ValueEnd {
    pub fn take(&mut self, c: char) -> Belongs {
        if self.in_string {
            match c {
                _ if self.escaped => self.escaped = false,
                '\\' => self.escaped = true,
                '"' => {
                    self.in_string = false;
                    if self.depth == 0 {
                        return Belongs::Last;
                    }
                }
                _ => {}
            }
            return Belongs::Yes;
        }
        match c {
            '"' if self.begun && self.depth == 0 => return Belongs::No,
            '"' => self.in_string = true,
            '{' | '[' => self.depth += 1,
            '}' | ']' if self.depth == 0 => return Belongs::No,
            '}' | ']' => {
                self.depth -= 1;
                if self.depth == 0 {
                    return Belongs::Last;
                }
            }
            ',' if self.depth == 0 => return Belongs::No,
            c if c.is_ascii_whitespace() && self.depth == 0 => return Belongs::No,
            _ => {}
        }
        self.begun = true;
        Belongs::Yes
    }
}

/// What a call's object said with a character.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    /// Nothing yet.
    More,
    /// The name is known and the arguments begin: from here on it is a call.
    Begin { name: String, arguments: String },
    /// More of the arguments.
    Arguments(char),
    /// The object is over.
    End,
    /// It is over and was all of a call: a name, and the arguments where they came first or not at all.
    Whole { name: String, arguments: Option<String> },
    /// This is no call.
    Wrong,
}

/// Reads `{"name": …, "arguments": {…}}`: keys in any order, further ones passed over, `parameters` as another word for
/// `arguments`.
#[derive(Clone, Debug, Default)]
pub(crate) struct CallObject {
    at: At,
    name: Option<String>,
    /// Arguments that came before the name.
    early: Option<String>,
    begun: bool,
    value: ValueEnd,
}

#[derive(Clone, Debug, Default, PartialEq)]
enum At {
    #[default]
    Start,
    KeyOrEnd,
    Key,
    InKey {
        text: String,
        escaped: bool,
    },
    Colon(Field),
    BeforeValue(Field),
    Value(Field, String),
    Streaming,
    CommaOrEnd,
    End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    Name,
    Arguments,
    Other,
}

impl CallObject {
    pub fn take(&mut self, c: char) -> Said {
        let space = c.is_ascii_whitespace();
        match std::mem::take(&mut self.at) {
            At::Start if space => self.go(At::Start),
            At::Start if c == '{' => self.go(At::KeyOrEnd),
            At::KeyOrEnd if space => self.go(At::KeyOrEnd),
            At::Key if space => self.go(At::Key),
            At::KeyOrEnd | At::Key if c == '"' => self.go(At::InKey { text: String::new(), escaped: false }),
            At::InKey { mut text, escaped } => {
                if c == '"' && !escaped {
                    let field = match text.as_str() {
                        "name" if self.name.is_none() => Field::Name,
                        "arguments" | "parameters" if self.early.is_none() && !self.begun => Field::Arguments,
                        _ => Field::Other,
                    };
                    return self.go(At::Colon(field));
                }
                text.push(c);
                self.go(At::InKey { text, escaped: c == '\\' && !escaped })
            }
            At::Colon(field) if space => self.go(At::Colon(field)),
            At::Colon(field) if c == ':' => {
                self.value = ValueEnd::default();
                self.go(At::BeforeValue(field))
            }
            At::BeforeValue(field) if space => self.go(At::BeforeValue(field)),
            At::BeforeValue(Field::Arguments) if c == '{' && self.name.is_some() => {
                self.value.take(c);
                self.begun = true;
                self.at = At::Streaming;
                let name = self.name.clone().unwrap_or_default();
                Said::Begin { name, arguments: c.to_string() }
            }
            At::BeforeValue(field) => self.in_value(field, String::new(), c),
            At::Value(field, text) => self.in_value(field, text, c),
            At::Streaming => {
                self.at = match self.value.take(c) {
                    Belongs::Last => At::CommaOrEnd,
                    Belongs::Yes | Belongs::No => At::Streaming,
                };
                Said::Arguments(c)
            }
            At::CommaOrEnd if space => self.go(At::CommaOrEnd),
            At::CommaOrEnd if c == ',' => self.go(At::Key),
            At::CommaOrEnd | At::KeyOrEnd if c == '}' => self.end(),
            At::Start | At::KeyOrEnd | At::Key | At::Colon(_) | At::CommaOrEnd | At::End => Said::Wrong,
        }
    }

    fn go(&mut self, at: At) -> Said {
        self.at = at;
        Said::More
    }

    fn in_value(&mut self, field: Field, mut text: String, c: char) -> Said {
        let belongs = self.value.take(c);
        if belongs != Belongs::No {
            text.push(c);
        }
        if belongs == Belongs::Yes {
            return self.go(At::Value(field, text));
        }
        match field {
            Field::Name => match serde_json::from_str::<String>(&text) {
                Ok(name) if is_name(&name) => self.name = Some(name),
                _ => return Said::Wrong,
            },
            Field::Arguments => match arguments(&text) {
                Some(arguments) => self.early = Some(arguments),
                None => return Said::Wrong,
            },
            Field::Other => {}
        }
        self.at = At::CommaOrEnd;
        match belongs {
            // A number or word ends with what comes after it.
            Belongs::No => self.take(c),
            Belongs::Yes | Belongs::Last => Said::More,
        }
    }

    fn end(&mut self) -> Said {
        self.at = At::End;
        match (self.begun, self.name.take()) {
            (true, _) => Said::End,
            (false, Some(name)) => Said::Whole { name, arguments: self.early.take() },
            (false, None) => Said::Wrong,
        }
    }
}

/// The arguments that were not read while they came: an object, the text of one, or none.
fn arguments(text: &str) -> Option<String> {
    match serde_json::from_str(text).ok()? {
        serde_json::Value::Object(_) => Some(text.to_owned()),
        serde_json::Value::Null => Some("{}".to_owned()),
        serde_json::Value::String(inner) => {
            let inside = serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(&inner);
            inside.is_ok().then_some(inner)
        }
        _ => None,
    }
}

/// Functions have names of letters, digits, underscores, dashes and dots, as every API asks for.
pub(crate) fn is_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= 256 && name.chars().all(is_name_character)
}

pub(crate) fn is_name_character(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.')
}
