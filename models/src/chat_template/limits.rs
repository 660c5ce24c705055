//! What a template from a stranger may take: its size, steps, depth and output, and the texts that one step can make.
//!
//! The engine counts steps and not bytes: a text doubled by `~` thirty times is a gigabyte after thirty steps. Bounded here
//! is what one step can multiply; a template that is written to exhaust memory by small steps still can.

use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};

use minijinja::value::{Kwargs, StringInput};
use minijinja::{Environment, Error, ErrorKind, State, Value, filters};

use crate::error::ModelError;

/// Largest template; real ones are under 20 kB.
pub const SOURCE_LIMIT: usize = 256 << 10;
/// Largest `{{ … }}` or `{% … %}`; real ones are under 6 kB. A chain of operators takes time with the square of its length.
const TAG_LIMIT: usize = 16 << 10;
/// Steps of one rendering. The costliest real templates take a quarter of it for a thousand messages.
const FUEL: u64 = 20_000_000;
const RECURSION_LIMIT: usize = 200;
/// Largest rendered prompt, many times what any context holds, and largest text that one step makes.
pub const OUTPUT_LIMIT: usize = 64 << 20;
/// Columns or groups that a list can be laid out in.
const COUNT_LIMIT: usize = 10_000;
/// Address space, of which only what is used becomes memory. The engine calls itself once for each operator in a chain, and
/// for each list in a list. Threads that have so much stack themselves are spared to map and unmap another for each prompt.
pub const STACK_BYTES: usize = 256 << 20;

/// Refuses a template that is too long to be one.
pub fn check_source(source: &str) -> Result<(), ModelError> {
    let refused = |what: String| Err(ModelError::Template(what));
    if source.len() > SOURCE_LIMIT {
        return refused(format!(
            "it is longer than the {SOURCE_LIMIT} bytes allowed; published templates are under 20 kB"
        ));
    }
    for (open, close) in [("{{", "}}"), ("{%", "%}")] {
        let mut at = 0;
        while let Some(start) = source[at..].find(open).map(|found| at + found) {
            let Some(len) = source[start..].find(close) else { break };
            if len > TAG_LIMIT {
                let line = source[..start].matches('\n').count() + 1;
                return refused(format!("line {line}: a tag is longer than the {TAG_LIMIT} bytes allowed"));
            }
            at = start + len;
        }
    }
    Ok(())
}

/// Bounds the environment's steps, and replaces what can multiply.
pub fn bound(environment: &mut Environment<'_>) {
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(RECURSION_LIMIT);
    environment.add_filter("replace", replace);
    environment.add_filter("join", join);
    environment.add_filter("batch", |state: &State<'_, '_>, value, count, fill| {
        filters::batch(state, value, counted(count)?, fill)
    });
    environment.add_filter("slice", |state: &State<'_, '_>, value, count, fill| {
        filters::slice(state, value, counted(count)?, fill)
    });
}

/// Python's methods.
pub fn method(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    arguments: &[Value],
) -> Result<Value, Error> {
    match (value.as_str(), name, arguments) {
        (Some(text), "replace", [from, to, ..]) => replaced(text, from, to)?,
        (Some(joiner), "join", [items]) => joined(items, joiner)?,
        _ => {}
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, arguments)
}

pub fn too_large() -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("a text would be longer than {OUTPUT_LIMIT} bytes"))
}

fn counted(count: usize) -> Result<usize, Error> {
    match count {
        ..=COUNT_LIMIT => Ok(count),
        _ => Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("{count} is more than the {COUNT_LIMIT} allowed"),
        )),
    }
}

fn replace(
    state: &mut State<'_, '_>,
    text: StringInput<'_>,
    from: StringInput<'_>,
    to: StringInput<'_>,
) -> Result<Value, Error> {
    replaced(text.as_str(), &Value::from(from.as_str()), &Value::from(to.as_str()))?;
    filters::replace(state, text, from, to)
}

/// An error where replacing would make too large a text.
fn replaced(text: &str, from: &Value, to: &Value) -> Result<(), Error> {
    let (Some(from), Some(to)) = (from.as_str(), to.as_str()) else { return Ok(()) };
    let bytes = text.matches(from).count().saturating_mul(to.len()).saturating_add(text.len());
    if bytes > OUTPUT_LIMIT { Err(too_large()) } else { Ok(()) }
}

fn join(
    state: &mut State<'_, '_>,
    items: &Value,
    joiner: Option<StringInput<'_>>,
    attribute: Option<&str>,
    more: Kwargs,
) -> Result<Value, Error> {
    joined(items, joiner.as_ref().map_or("", |joiner| joiner.as_str()))?;
    filters::join(state, items, joiner, attribute, more)
}

/// An error where joining would make too large a text.
fn joined(items: &Value, joiner: &str) -> Result<(), Error> {
    let Ok(items) = items.try_iter() else { return Ok(()) };
    let mut bytes = 0usize;
    for item in items {
        bytes = bytes.saturating_add(joiner.len() + item.as_str().map_or(0, str::len));
        if bytes > OUTPUT_LIMIT {
            return Err(too_large());
        }
    }
    Ok(())
}

/// Runs the engine on a stack where long chains overflow nothing, and where a panic of it ends nothing else.
pub fn on_deep_stack<T>(work: impl FnOnce() -> Result<T, ModelError>) -> Result<T, ModelError> {
    // What a panic leaves half done is the engine's own, and not looked at again.
    catch_unwind(AssertUnwindSafe(|| stacker::maybe_grow(STACK_BYTES, STACK_BYTES, work)))
        .unwrap_or_else(|_| Err(ModelError::Template("the template engine fails on it".to_owned())))
}

/// A buffer that refuses to grow past [`OUTPUT_LIMIT`].
#[derive(Default)]
pub struct Bounded(pub Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > OUTPUT_LIMIT {
            return Err(io::Error::other(format!("the prompt would be longer than {OUTPUT_LIMIT} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
