//! JSON Schemas that answers can be promised to satisfy.
//!
//! A schema is not handed to the grammar engine as it came: it is written anew from the keywords that are understood here.
//! What is written allows no answer that the schema does not, and often fewer: objects have no properties that are not
//! declared, numbers have no exponents. A keyword that cannot be written so is an error that names it. Keywords that
//! the specification does not know say nothing, as it prescribes.

mod finite;
mod format;
mod numbers;
mod one_of;
mod pattern;
mod reference;
mod values;

use std::collections::{HashMap, VecDeque};

use serde_json::{Map, Value, json};

use crate::GrammarError;

/// Bytes of a schema, written without white space.
const MOST_BYTES: usize = 256 * 1024;
/// Schemas in schemas.
const MOST_DEPTH: usize = 32;
/// Schemas in all, and values of all `enum`s.
const MOST_SCHEMAS: usize = 5000;
const MOST_VALUES: usize = 5000;
/// Keywords that are left out of a schema that need not be promised.
const MOST_RELAXED: usize = 64;
/// Properties of one object that may be left out: each is a few ways to go on at every point of the object.
const MOST_OPTIONAL: usize = 500;
/// Larger bounds of lengths are these: an answer is not so long.
const MOST_LENGTH: u64 = 32_768;
/// A string or an array that must be longer has too many states.
const LEAST_MOST: u64 = 2048;

const TYPES: [&str; 7] = ["null", "boolean", "integer", "number", "string", "array", "object"];
/// Keywords whose meaning a grammar cannot have.
const IMPOSSIBLE: [&str; 16] = [
    "not",
    "if",
    "then",
    "else",
    "contains",
    "minContains",
    "maxContains",
    "uniqueItems",
    "dependentRequired",
    "dependentSchemas",
    "dependencies",
    "unevaluatedItems",
    "unevaluatedProperties",
    "$dynamicRef",
    "$recursiveRef",
    "$recursiveAnchor",
];
const STRING: [&str; 4] = ["minLength", "maxLength", "pattern", "format"];
const NUMBER: [&str; 5] = ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"];
const ARRAY: [&str; 4] = ["items", "prefixItems", "minItems", "maxItems"];
const OBJECT: [&str; 7] = [
    "properties",
    "required",
    "additionalProperties",
    "patternProperties",
    "propertyNames",
    "minProperties",
    "maxProperties",
];
const APPLICATORS: [&str; 4] = ["$ref", "anyOf", "oneOf", "allOf"];

/// The name of the definition of any value.
const ANY: &str = "any";

/// The schema of any object.
pub fn any_object() -> Value {
    json!({ "type": "object" })
}

/// Writes `schema` anew. `param` is the request field that it came in.
pub fn rewrite(schema: &Value, param: &str) -> Result<Value, GrammarError> {
    let bytes = schema.to_string().len();
    if bytes > MOST_BYTES {
        let what = format!("the schema has {bytes} bytes, at most {MOST_BYTES} are supported");
        return Err(GrammarError::new(param, what));
    }
    let combines = combines(schema, 0);
    let mut writer = Writer {
        root: schema,
        param,
        combines,
        names: HashMap::new(),
        pending: VecDeque::new(),
        schemas: 0,
        values: 0,
    };
    let mut root = writer.schema(schema, "", 0)?;
    let mut definitions = Map::new();
    while let Some((name, target)) = writer.pending.pop_front() {
        let definition = match target {
            Target::Any => any(),
            Target::Pointer(pointer) => {
                let found = reference::resolve(schema, &pointer).unwrap_or(&Value::Null);
                writer.schema(found, &pointer, 0)?
            }
        };
        definitions.insert(name, definition);
    }
    finite::prune(&root, &mut definitions).map_err(|keyword| {
        GrammarError::keyword(param, "", keyword, "no finite value satisfies the schema")
    })?;
    if !definitions.is_empty() {
        if !root.is_object() || root.get("$ref").is_some() {
            root = json!({ "anyOf": [root] });
        }
        root["$defs"] = Value::Object(definitions);
    }
    Ok(root)
}

/// The same for a schema that need not be promised: what cannot be is left out, in the last resort everything. The answer
/// is an object.
pub fn relax(schema: &Value, param: &str) -> Value {
    let mut schema = schema.clone();
    for _ in 0..MOST_RELAXED {
        let error = match rewrite(&schema, param) {
            Ok(written) => return written,
            Err(error) => error,
        };
        let (Some(pointer), Some(keyword)) = (error.pointer, error.keyword) else { break };
        let Some(Value::Object(map)) = schema.pointer_mut(&pointer) else { break };
        match map.remove(&keyword) {
            None => break,
            Some(options) if keyword == "oneOf" && !map.contains_key("anyOf") => {
                map.insert("anyOf".into(), options);
            }
            Some(_) => {}
        }
    }
    any_object()
}

/// Whether parts of the schema are combined by "and": then they are left open, as a closed one would exclude the others.
fn combines(schema: &Value, depth: usize) -> bool {
    if depth > 2 * MOST_DEPTH {
        return true;
    }
    match schema {
        Value::Array(values) => values.iter().any(|value| combines(value, depth + 1)),
        Value::Object(map) => {
            let applied = APPLICATORS.iter().filter(|keyword| map.contains_key(**keyword)).count();
            let says = |keyword: &&String| SAYING.iter().any(|group| group.contains(&keyword.as_str()));
            let siblings = map.keys().filter(says).count() > applied;
            let all = map.get("allOf").and_then(Value::as_array).is_some_and(|all| all.len() != 1);
            all || applied > 1
                || applied == 1 && siblings
                || map.values().any(|value| combines(value, depth + 1))
        }
        _ => false,
    }
}

/// Keywords that say which values are valid, by group.
const SAYING: [&[&str]; 6] = [&STRING, &NUMBER, &ARRAY, &OBJECT, &APPLICATORS, &["type", "enum", "const"]];

/// Any value, in numbers that every reader can hold.
fn any() -> Value {
    let this = json!({ "$ref": format!("#/$defs/{ANY}") });
    json!({ "anyOf": [
        { "type": "null" },
        { "type": "boolean" },
        numbers::any_number(),
        { "type": "string" },
        { "type": "array", "items": this },
        { "type": "object", "additionalProperties": this },
    ] })
}

enum Target {
    Any,
    Pointer(String),
}

struct Writer<'a> {
    root: &'a Value,
    param: &'a str,
    combines: bool,
    /// Definitions by where they stand in the schema.
    names: HashMap<String, String>,
    pending: VecDeque<(String, Target)>,
    schemas: usize,
    values: usize,
}

impl Writer<'_> {
    fn error<T>(
        &self,
        pointer: &str,
        keyword: &str,
        what: impl std::fmt::Display,
    ) -> Result<T, GrammarError> {
        Err(GrammarError::keyword(self.param, pointer, keyword, what))
    }

    /// The schema of any value.
    fn anything(&mut self) -> Value {
        if self.combines {
            return Value::Bool(true);
        }
        // No pointer into a schema is this.
        if self.names.insert(ANY.into(), ANY.into()).is_none() {
            self.pending.push_back((ANY.into(), Target::Any));
        }
        json!({ "$ref": format!("#/$defs/{ANY}") })
    }

    fn schema(&mut self, schema: &Value, pointer: &str, depth: usize) -> Result<Value, GrammarError> {
        self.schemas += 1;
        if self.schemas > MOST_SCHEMAS {
            let what = format!("the schema has more than {MOST_SCHEMAS} parts");
            return Err(GrammarError::new(self.param, what));
        }
        if depth > MOST_DEPTH {
            let what = format!("the schema is nested deeper than {MOST_DEPTH} levels at {pointer}");
            return Err(GrammarError::new(self.param, what));
        }
        let map = match schema {
            Value::Bool(true) => return Ok(self.anything()),
            Value::Bool(false) => return Ok(Value::Bool(false)),
            Value::Object(map) => map,
            other => {
                let place = if pointer.is_empty() { "the top level" } else { pointer };
                let what =
                    format!("expected a schema (an object or a boolean) at {place}, found {}", kind(other));
                return Err(GrammarError::new(self.param, what));
            }
        };
        self.refuse_impossible(map, pointer)?;
        let Some(types) = self.types(map, pointer)? else {
            return self.applied(map, Map::new(), pointer, depth);
        };
        let mut written = Map::new();
        let has = |name: &str| types.iter().any(|it| it == name);
        if has("string") {
            self.string(map, &types, pointer, &mut written)?;
        }
        if has("array") {
            self.array(map, pointer, depth, &mut written)?;
        }
        if has("object") {
            self.object(map, pointer, depth, &mut written)?;
        }
        let mut types = types;
        if has_number(&types) {
            let whole = numbers::bounds(map, &types, self.combines, &mut written)
                .or_else(|(keyword, what)| self.error(pointer, keyword, what))?;
            if whole {
                types.iter_mut().filter(|name| **name == "number").for_each(|name| *name = "integer".into());
                types.dedup();
            }
        }
        if types.len() < TYPES.len() - 1 || !written.is_empty() {
            let listed = match types.as_slice() {
                [one] => json!(one),
                many => json!(many),
            };
            written.insert("type".into(), listed);
        }
        self.applied(map, written, pointer, depth)
    }

    fn refuse_impossible(&self, map: &Map<String, Value>, pointer: &str) -> Result<(), GrammarError> {
        for keyword in IMPOSSIBLE {
            let harmless = match map.get(keyword) {
                None => true,
                Some(value) => match keyword {
                    "uniqueItems" => *value == json!(false),
                    "unevaluatedItems" | "unevaluatedProperties" => {
                        *value == json!(true) || *value == json!({})
                    }
                    "dependentRequired" | "dependentSchemas" | "dependencies" => *value == json!({}),
                    _ => false,
                },
            };
            if !harmless {
                return self.error(pointer, keyword, "this keyword is not supported; leave it out");
            }
        }
        // A base of its own would move what references in it mean.
        if !pointer.is_empty() && map.contains_key("$id") {
            return self.error(pointer, "$id", "only the top level may have one; leave it out");
        }
        Ok(())
    }

    /// The types that a value may have here: those that are named, or that the keywords speak of. None: nothing says.
    fn types(&self, map: &Map<String, Value>, pointer: &str) -> Result<Option<Vec<String>>, GrammarError> {
        let named = match map.get("type") {
            None => None,
            Some(Value::String(name)) => Some(vec![name.clone()]),
            Some(Value::Array(names)) if !names.is_empty() => {
                let names: Option<Vec<String>> =
                    names.iter().map(|name| name.as_str().map(str::to_owned)).collect();
                match names {
                    Some(names) => Some(names),
                    None => return self.error(pointer, "type", "expected names of types"),
                }
            }
            Some(_) => {
                return self.error(pointer, "type", "expected the name of a type, or several in an array");
            }
        };
        if let Some(names) = named {
            if let Some(unknown) = names.iter().find(|name| !TYPES.contains(&name.as_str())) {
                let what = format!("there is no type {unknown:?}; known: {}", TYPES.join(", "));
                return self.error(pointer, "type", what);
            }
            let wide = names.iter().any(|name| name == "number");
            let mut kept: Vec<String> = Vec::with_capacity(names.len());
            for name in names {
                if !(wide && name == "integer" || kept.contains(&name)) {
                    kept.push(name);
                }
            }
            return Ok(Some(kept));
        }
        let speaks = |group: &[&str]| group.iter().any(|keyword| map.contains_key(*keyword));
        let groups: [(&[&str], &str); 4] =
            [(&STRING, "string"), (&NUMBER, "number"), (&ARRAY, "array"), (&OBJECT, "object")];
        let spoken: Vec<String> =
            groups.iter().filter(|(group, _)| speaks(group)).map(|(_, name)| (*name).to_owned()).collect();
        Ok(match spoken.is_empty() {
            true => None,
            // Combined with another schema, it may be that one which says the type.
            false if self.combines => {
                Some(TYPES.iter().filter(|name| **name != "integer").map(|name| (*name).to_owned()).collect())
            }
            false => Some(spoken),
        })
    }

    /// Adds `enum`, `const`, references and combinations to what else was written.
    fn applied(
        &mut self,
        map: &Map<String, Value>,
        mut written: Map<String, Value>,
        pointer: &str,
        depth: usize,
    ) -> Result<Value, GrammarError> {
        if let Some(value) = map.get("const") {
            self.enumerate(std::slice::from_ref(value), "const", pointer, &mut written)?;
        }
        if let Some(values) = map.get("enum") {
            let Value::Array(values) = values else {
                return self.error(pointer, "enum", format!("expected an array, found {}", kind(values)));
            };
            self.enumerate(values, "enum", pointer, &mut written)?;
        }
        let mut parts = Vec::new();
        if let Some(target) = map.get("$ref") {
            parts.push(self.reference(target, pointer)?);
        }
        for keyword in ["anyOf", "oneOf", "allOf"] {
            let Some(options) = map.get(keyword) else { continue };
            let Some(options) = options.as_array().filter(|options| !options.is_empty()) else {
                return self.error(pointer, keyword, "expected an array of schemas, not empty");
            };
            if keyword == "oneOf"
                && let Some((a, b)) = one_of::overlap(self.root, options, !self.combines)
            {
                let what = format!(
                    "options {a} and {b} may both match a value, and a grammar cannot tell; use \"anyOf\", or a required property with different constants"
                );
                return self.error(pointer, keyword, what);
            }
            let options: Result<Vec<Value>, GrammarError> = options
                .iter()
                .enumerate()
                .map(|(index, option)| {
                    self.schema(option, &format!("{pointer}/{keyword}/{index}"), depth + 1)
                })
                .collect();
            let options = options?;
            match keyword {
                "allOf" => parts.extend(options),
                _ => parts.push(json!({ "anyOf": options })),
            }
        }
        if let Some(Value::Array(more)) = written.remove("allOf") {
            parts.extend(more);
        }
        Ok(match (written.is_empty(), parts.len()) {
            (true, 0) => self.anything(),
            (true, 1) => parts.swap_remove(0),
            (_, 0) => Value::Object(written),
            _ => {
                written.insert("allOf".into(), Value::Array(parts));
                Value::Object(written)
            }
        })
    }

    /// A reference into the schema itself.
    fn reference(&mut self, target: &Value, pointer: &str) -> Result<Value, GrammarError> {
        let found = target.as_str().and_then(reference::pointer);
        let found = found.filter(|pointer| reference::resolve(self.root, pointer).is_some());
        let Some(found) = found else {
            let what = format!(
                "{target} is no place in this schema; only references like \"#/$defs/name\" are supported"
            );
            return self.error(pointer, "$ref", what);
        };
        let next = format!("d{}", self.names.len());
        let name = self.names.entry(found.clone()).or_insert_with(|| {
            self.pending.push_back((next.clone(), Target::Pointer(found)));
            next
        });
        Ok(json!({ "$ref": format!("#/$defs/{name}") }))
    }

    /// Writes the values that are left when those of other types are taken out.
    fn enumerate(
        &mut self,
        values: &[Value],
        keyword: &str,
        pointer: &str,
        written: &mut Map<String, Value>,
    ) -> Result<(), GrammarError> {
        self.values += values.len();
        if self.values > MOST_VALUES {
            let what = format!("the schema lists more than {MOST_VALUES} values");
            return self.error(pointer, keyword, what);
        }
        let types: Option<Vec<&str>> = match written.get("type") {
            Some(Value::String(name)) => Some(vec![name]),
            Some(Value::Array(names)) => Some(names.iter().filter_map(Value::as_str).collect()),
            _ => None,
        };
        let mut kept = Vec::with_capacity(values.len());
        for value in values {
            let value = match numbers::writable(value) {
                Ok(value) => value,
                Err(what) => return self.error(pointer, keyword, what),
            };
            let typed =
                types.as_ref().is_none_or(|types| types.iter().any(|name| one_of::has_type(&value, name)));
            if typed && numbers::satisfies(&value, written) {
                kept.push(value);
            }
        }
        if kept.is_empty() {
            return self.error(pointer, keyword, "no value that is listed satisfies the rest of the schema");
        }
        NUMBER.iter().for_each(|keyword| {
            written.remove(*keyword);
        });
        written.remove("type");
        match written.remove("enum") {
            Some(Value::Array(before)) => {
                kept.retain(|value| before.contains(value));
                if kept.is_empty() {
                    return self.error(pointer, keyword, "no value satisfies both \"enum\" and \"const\"");
                }
            }
            _ => {
                // Of what was written for other types nothing is left to say.
                let said: Vec<String> = written.keys().cloned().collect();
                for keyword in said {
                    let group: &[&str] = match keyword.as_str() {
                        _ if STRING.contains(&keyword.as_str()) => &["string"],
                        _ if ARRAY.contains(&keyword.as_str()) => &["array"],
                        _ if OBJECT.contains(&keyword.as_str()) => &["object"],
                        _ => continue,
                    };
                    if !kept.iter().any(|value| one_of::has_type(value, group[0])) {
                        written.remove(&keyword);
                    }
                }
            }
        }
        written.insert("enum".into(), Value::Array(kept));
        Ok(())
    }
}

fn has_number(types: &[String]) -> bool {
    types.iter().any(|name| name == "number" || name == "integer")
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests;
