//! `oneOf`: a grammar can only choose an option, so the options must exclude each other.

use serde_json::{Map, Value};

use super::{ARRAY, NUMBER, OBJECT, STRING, TYPES, reference};

/// References that are followed in one comparison.
const MOST_STEPS: usize = 24;

/// Two options that may both match one value, as far as can be seen.
///
/// `closed`: objects that are written have no properties that were not declared, so an answer for one option may be no
/// answer for another that requires more.
pub fn overlap(root: &Value, options: &[Value], closed: bool) -> Option<(usize, usize)> {
    let eyes = Eyes { root, closed };
    let pairs = (0..options.len()).flat_map(|a| (a + 1..options.len()).map(move |b| (a, b)));
    pairs.into_iter().find(|(a, b)| {
        let (a, b) = (&options[*a], &options[*b]);
        !(eyes.disjoint(a, b, MOST_STEPS) && eyes.disjoint(b, a, MOST_STEPS))
    })
}

/// Whether a value is of the type with this name.
pub fn has_type(value: &Value, name: &str) -> bool {
    match value {
        Value::Null => name == "null",
        Value::Bool(_) => name == "boolean",
        Value::Number(number) => {
            name == "number"
                || name == "integer" && number.as_f64().is_some_and(|number| number.fract() == 0.0)
        }
        Value::String(_) => name == "string",
        Value::Array(_) => name == "array",
        Value::Object(_) => name == "object",
    }
}

struct Eyes<'a> {
    root: &'a Value,
    closed: bool,
}

impl<'a> Eyes<'a> {
    /// Whether no value that is written for `written` satisfies `other`.
    fn disjoint(&self, written: &'a Value, other: &'a Value, steps: usize) -> bool {
        let Some(steps) = steps.checked_sub(1) else { return false };
        let (Value::Object(a), Value::Object(b)) = (written, other) else {
            return *written == Value::Bool(false) || *other == Value::Bool(false);
        };
        if let Some(target) = self.target(a)
            && self.disjoint(target, other, steps)
        {
            return true;
        }
        if let Some(target) = self.target(b)
            && self.disjoint(written, target, steps)
        {
            return true;
        }
        // One of several: all of them. All of several: one of them.
        let options = |map: &'a Map<String, Value>, keyword: &str| map.get(keyword).and_then(Value::as_array);
        for keyword in ["anyOf", "oneOf"] {
            if options(a, keyword).is_some_and(|all| all.iter().all(|it| self.disjoint(it, other, steps)))
                || options(b, keyword)
                    .is_some_and(|all| all.iter().all(|it| self.disjoint(written, it, steps)))
            {
                return true;
            }
        }
        if options(a, "allOf").is_some_and(|all| all.iter().any(|it| self.disjoint(it, other, steps)))
            || options(b, "allOf").is_some_and(|all| all.iter().any(|it| self.disjoint(written, it, steps)))
        {
            return true;
        }
        let (types, others) = (types(a, self.closed), types(b, false));
        if !types.iter().any(|name| others.iter().any(|other| meet(name, other))) {
            return true;
        }
        match (values(a), values(b)) {
            (Some(a), Some(b)) if !a.iter().any(|value| b.iter().any(|other| equal(value, other))) => {
                return true;
            }
            (Some(a), None) if !a.iter().any(|value| others.iter().any(|name| has_type(value, name))) => {
                return true;
            }
            (None, Some(b)) if !b.iter().any(|value| types.iter().any(|name| has_type(value, name))) => {
                return true;
            }
            _ => {}
        }
        (types == ["object"] || others == ["object"]) && self.objects_are_disjoint(a, b, steps)
    }

    fn objects_are_disjoint(
        &self,
        a: &'a Map<String, Value>,
        b: &'a Map<String, Value>,
        steps: usize,
    ) -> bool {
        let required = |map: &'a Map<String, Value>| {
            map.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str)
        };
        required(a).chain(required(b)).any(|name| {
            let closed = self.closed && a.contains_key("properties") && !a.contains_key("patternProperties");
            match (property(a, name, closed && !required(a).any(|it| it == name)), property(b, name, false)) {
                (Some(a), Some(b)) => self.disjoint(a, b, steps),
                _ => false,
            }
        })
    }

    fn target(&self, map: &'a Map<String, Value>) -> Option<&'a Value> {
        let reference = map.get("$ref")?.as_str()?;
        reference::resolve(self.root, &reference::pointer(reference)?)
    }
}

/// The schema of a property; `closed`: one that is not declared cannot be. None: it may be anything.
fn property<'a>(map: &'a Map<String, Value>, name: &str, closed: bool) -> Option<&'a Value> {
    const FALSE: &Value = &Value::Bool(false);
    if let Some(declared) = map.get("properties").and_then(|properties| properties.get(name)) {
        return Some(declared);
    }
    if map.contains_key("patternProperties") {
        return None;
    }
    match map.get("additionalProperties") {
        Some(additional) => Some(additional),
        None => closed.then_some(FALSE),
    }
}

/// The types that values may have. `inferred`: where none is named, objects if only they are spoken of, as when it is written.
fn types(map: &Map<String, Value>, inferred: bool) -> Vec<&str> {
    let speaks = |group: &[&str]| group.iter().any(|keyword| map.contains_key(*keyword));
    match map.get("type") {
        Some(Value::String(name)) => vec![name],
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
        _ if inferred && speaks(&OBJECT) && !speaks(&STRING) && !speaks(&NUMBER) && !speaks(&ARRAY) => {
            vec!["object"]
        }
        _ => TYPES.to_vec(),
    }
}

fn meet(a: &str, b: &str) -> bool {
    a == b || matches!((a, b), ("integer", "number") | ("number", "integer"))
}

fn values(map: &Map<String, Value>) -> Option<Vec<&Value>> {
    if let Some(value) = map.get("const") {
        return Some(vec![value]);
    }
    Some(map.get("enum")?.as_array()?.iter().collect())
}

fn equal(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}
