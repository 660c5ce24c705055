//! What templates expect of Python: its floats, `json.dumps`, and tests that count text among the iterables.

use std::io::{self, Write};

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value, escape_formatter};
use serde::Serialize;
use serde_json::ser::Formatter;

use super::limits::{self, OUTPUT_LIMIT, too_large};

/// Makes the environment's functions, filters and tests those that `transformers` gives templates.
pub fn teach(environment: &mut Environment<'_>) {
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(limits::method);
    environment.set_formatter(format);
    environment.add_function("raise_exception", raise_exception);
    environment.add_filter("tojson", to_json);
    environment.add_filter("string", string);
    environment.add_filter("indent", indent);
    environment.add_filter("length", length);
    environment.add_filter("count", length);
    environment.add_test("iterable", is_iterable);
    environment.add_test("sequence", is_sequence);
}

fn invalid(detail: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, detail)
}

fn raise_exception(message: String) -> Result<String, Error> {
    Err(invalid(format!("the template refuses the conversation: {message}")))
}

/// What `strftime_now` gives at `now`.
pub fn strftime(format: &str, now: &jiff::Zoned) -> Result<String, Error> {
    jiff::fmt::strtime::format(format, now)
        .map_err(|error| invalid(format!("strftime_now('{format}'): {error}")))
}

/// What Python can iterate over, which is text too, and what is undefined, but not `None`.
fn is_iterable(value: &Value) -> bool {
    value.kind() == ValueKind::Iterable || is_sequence(value)
}

/// What has a length and items.
fn is_sequence(value: &Value) -> bool {
    use ValueKind::*;
    matches!(value.kind(), Seq | Map | String | Bytes | Undefined)
}

/// The length, which is 0 for what is undefined.
fn length(value: &Value) -> Result<usize, Error> {
    if value.is_undefined() { Ok(0) } else { minijinja::filters::length(value) }
}

fn string(state: &State<'_, '_>, value: &Value) -> Result<Value, Error> {
    if has_exponent(value)? { Ok(text(value).into()) } else { minijinja::filters::string(state, value) }
}

/// Jinja's `indent(text, width=4, first=False, blank=False)`, which keeps a line end at the end.
fn indent(
    mut text: String,
    width: Option<Value>,
    first: Option<bool>,
    blank: Option<bool>,
    more: Kwargs,
) -> Result<String, Error> {
    let width = width.or(more.get("width")?);
    let first = first.or(more.get("first")?).unwrap_or(false);
    let blank = blank.or(more.get("blank")?).unwrap_or(false);
    more.assert_all_used()?;
    let is_end = |character: char| matches!(character, '\n'..='\r' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}');
    text = text.replace("\r\n", "\n");
    let width = width.unwrap_or_else(|| 4.into());
    let margin = match width.as_str() {
        Some(margin) => margin.to_owned(),
        None => " ".repeat(usize::try_from(width)?.min(OUTPUT_LIMIT)),
    };
    let lines = text.matches(is_end).count() + 1;
    if lines.saturating_mul(margin.len()).saturating_add(text.len()) > OUTPUT_LIMIT {
        return Err(too_large());
    }
    let mut indented = String::with_capacity(text.len() + lines * margin.len());
    for (number, line) in text.split(is_end).enumerate() {
        if number > 0 {
            indented.push('\n');
        }
        if (number == 0 && first) || (number > 0 && (blank || !line.is_empty())) {
            indented.push_str(&margin);
        }
        indented.push_str(line);
    }
    Ok(indented)
}

/// Writes what `{{ value }}` shows.
fn format(output: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    if has_exponent(value)? {
        output.write_str(&text(value)).map_err(Error::from)
    } else {
        escape_formatter(output, state, value)
    }
}

/// A float as Python writes it where that needs an exponent, which the engine never writes: below 1e-4, from 1e16 on.
fn with_exponent(number: f64) -> Option<String> {
    let shortest = format!("{number:e}");
    let (digits, exponent) = shortest.split_once('e')?;
    let exponent: i32 = exponent.parse().ok()?;
    let sign = if exponent < 0 { '-' } else { '+' };
    (!(-4..16).contains(&exponent)).then(|| format!("{digits}e{sign}{:02}", exponent.abs()))
}

fn float(value: &Value) -> Option<f64> {
    (value.kind() == ValueKind::Number && !value.is_integer()).then(|| f64::try_from(value.clone()).ok())?
}

/// Lists in lists deeper than this are no conversation's: that deep goes only what holds itself.
const DEPTH_LIMIT: usize = 200;
const ITEM_LIMIT: usize = 10_000_000;

/// Whether a float in the value needs an exponent. An error where the value cannot be written at all.
fn has_exponent(value: &Value) -> Result<bool, Error> {
    fn search(value: &Value, depth: usize, items: &mut usize) -> Result<bool, Error> {
        if depth > DEPTH_LIMIT || *items == 0 {
            return Err(invalid("a value is too deep or too large to be written".to_owned()));
        }
        *items -= 1;
        let is_map = match value.kind() {
            ValueKind::Number => return Ok(float(value).and_then(with_exponent).is_some()),
            ValueKind::Seq => false,
            ValueKind::Map => true,
            _ => return Ok(false),
        };
        let mut found = false;
        for item in value.try_iter()? {
            let item = if is_map { value.get_item(&item)? } else { item };
            found |= search(&item, depth + 1, items)?;
        }
        Ok(found)
    }
    search(value, 0, &mut ITEM_LIMIT.clone())
}

/// `str(value)` of a value that [`has_exponent`] saw.
fn text(value: &Value) -> String {
    let items = || value.try_iter().into_iter().flatten();
    match value.kind() {
        ValueKind::Seq => {
            let is_tuple = value.to_string().starts_with('(');
            let items: Vec<String> = items().map(|item| repr(&item)).collect();
            match items.as_slice() {
                [one] if is_tuple => format!("({one},)"),
                items if is_tuple => format!("({})", items.join(", ")),
                items => format!("[{}]", items.join(", ")),
            }
        }
        ValueKind::Map => {
            let entry = |key: Value| {
                let value = value.get_item(&key).unwrap_or_default();
                format!("{}: {}", repr(&key), repr(&value))
            };
            format!("{{{}}}", items().map(entry).collect::<Vec<_>>().join(", "))
        }
        _ => float(value).and_then(with_exponent).unwrap_or_else(|| value.to_string()),
    }
}

/// `repr(value)`: text in quotes, all else as [`text`].
fn repr(value: &Value) -> String {
    if value.kind() != ValueKind::String {
        return text(value);
    }
    // The engine quotes what is in a list.
    let listed = Value::from(vec![value.clone()]).to_string();
    listed.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(&listed).to_owned()
}

/// `json.dumps(value, ensure_ascii=False, …)`, which is what `transformers` gives templates: no HTML escapes.
fn to_json(value: Value, keywords: Kwargs) -> Result<String, Error> {
    let failed = |error: &dyn std::fmt::Display| invalid(format!("tojson: {error}"));
    let indent: Option<Value> = keywords.get("indent")?;
    let indent = match indent.filter(|indent| !indent.is_none()) {
        None => None,
        Some(indent) => Some(match indent.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(usize::try_from(indent)?.min(16)),
        }),
    };
    let (mut comma, mut colon) = (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned());
    if let Some(pair) = keywords.get::<Option<Value>>("separators")?.filter(|pair| !pair.is_none()) {
        comma = pair.get_item_by_index(0)?.to_string();
        colon = pair.get_item_by_index(1)?.to_string();
    }
    let ensure_ascii = keywords.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sort_keys = keywords.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    keywords.assert_all_used()?;
    has_exponent(&value)?;
    let mut value = serde_json::to_value(&value).map_err(|error| failed(&error))?;
    if sort_keys {
        value.sort_all_objects();
    }
    let formatter = Dumps { indent, comma, colon, ensure_ascii, depth: 0, is_empty: true };
    let mut json = Vec::new();
    value
        .serialize(&mut serde_json::Serializer::with_formatter(&mut json, formatter))
        .map_err(|error| failed(&error))?;
    String::from_utf8(json).map_err(|error| failed(&error))
}

/// The layout of Python's `json.dumps`.
struct Dumps {
    /// What each level is indented with; None writes one line.
    indent: Option<String>,
    comma: String,
    colon: String,
    ensure_ascii: bool,
    depth: usize,
    /// Whether the innermost list or object has nothing in it yet.
    is_empty: bool,
}

impl Dumps {
    fn begin<W: ?Sized + Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.is_empty = true;
        writer.write_all(bracket)
    }

    fn end<W: ?Sized + Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if !self.is_empty {
            self.new_line(writer)?;
        }
        self.is_empty = false;
        writer.write_all(bracket)
    }

    fn begin_item<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.is_empty = false;
        if !first {
            writer.write_all(self.comma.as_bytes())?;
        }
        self.new_line(writer)
    }

    fn new_line<W: ?Sized + Write>(&self, writer: &mut W) -> io::Result<()> {
        let Some(indent) = &self.indent else { return Ok(()) };
        writer.write_all(b"\n")?;
        (0..self.depth).try_for_each(|_| writer.write_all(indent.as_bytes()))
    }
}

impl Formatter for Dumps {
    fn write_f64<W: ?Sized + Write>(&mut self, writer: &mut W, number: f64) -> io::Result<()> {
        match with_exponent(number) {
            Some(text) => writer.write_all(text.as_bytes()),
            None => write!(writer, "{number:?}"),
        }
    }

    fn write_string_fragment<W: ?Sized + Write>(&mut self, writer: &mut W, text: &str) -> io::Result<()> {
        if !self.ensure_ascii {
            return writer.write_all(text.as_bytes());
        }
        text.chars().try_for_each(|character| match character {
            ' '..='~' => write!(writer, "{character}"),
            _ => character
                .encode_utf16(&mut [0; 2])
                .iter()
                .try_for_each(|unit| write!(writer, "\\u{unit:04x}")),
        })
    }

    fn begin_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.begin(writer, b"[")
    }

    fn end_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.end(writer, b"]")
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.begin_item(writer, first)
    }

    fn begin_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.begin(writer, b"{")
    }

    fn end_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.end(writer, b"}")
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.begin_item(writer, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.colon.as_bytes())
    }
}
