//! Texts, arrays and objects: what a schema says of each, written anew.

use serde_json::{Map, Value, json};

use super::{LEAST_MOST, MOST_LENGTH, MOST_OPTIONAL, SAYING, Writer, format, kind, pattern, reference};
use crate::GrammarError;

/// The names that an object's properties may have.
enum Names {
    Any,
    Listed(Vec<String>),
    Matching(String),
}

impl Writer<'_> {
    pub(super) fn string(
        &self,
        map: &Map<String, Value>,
        types: &[String],
        pointer: &str,
        written: &mut Map<String, Value>,
    ) -> Result<(), GrammarError> {
        self.lengths(map, pointer, "minLength", "maxLength", written)?;
        let text = |keyword: &str| map.get(keyword).and_then(Value::as_str).unwrap_or("");
        let implied = format::implies(text("format"), text("pattern"));
        if let Some(value) = map.get("pattern").filter(|_| !implied) {
            let pattern = match value.as_str().map(pattern::translate) {
                Some(Ok(pattern)) => pattern,
                Some(Err(what)) => return self.error(pointer, "pattern", what),
                None => {
                    return self.error(
                        pointer,
                        "pattern",
                        format!("expected a string, found {}", kind(value)),
                    );
                }
            };
            written.insert("pattern".into(), pattern.into());
        }
        if let Some(value) = map.get("format") {
            let Some(name) = value.as_str() else {
                return self.error(pointer, "format", format!("expected a string, found {}", kind(value)));
            };
            if let Some(expression) = format::expression(name) {
                match written.contains_key("pattern") {
                    false => written.insert("pattern".into(), expression.into()),
                    true => written.insert("allOf".into(), json!([{ "type": types, "pattern": expression }])),
                };
            }
        }
        Ok(())
    }

    /// A least and a most length. The most is never needed where it is large.
    fn lengths(
        &self,
        map: &Map<String, Value>,
        pointer: &str,
        least: &str,
        most: &str,
        written: &mut Map<String, Value>,
    ) -> Result<(), GrammarError> {
        let mut bounds = [None, None];
        for (bound, keyword) in bounds.iter_mut().zip([least, most]) {
            let Some(value) = map.get(keyword) else { continue };
            let whole = value.as_f64().filter(|number| *number >= 0.0 && number.fract() == 0.0);
            let Some(whole) = whole else {
                return self.error(
                    pointer,
                    keyword,
                    format!("expected a whole number from 0, found {value}"),
                );
            };
            *bound = Some(whole as u64);
        }
        if let Some(least_value) = bounds[0].filter(|least| *least > LEAST_MOST) {
            let what = format!("{least_value} is more than the {LEAST_MOST} that are supported");
            return self.error(pointer, least, what);
        }
        if let [Some(least_value), Some(most_value)] = bounds
            && least_value > most_value
        {
            return self.error(pointer, least, format!("{least_value} is more than {most}, {most_value}"));
        }
        for (bound, keyword) in bounds.into_iter().zip([least, most]) {
            if let Some(bound) = bound {
                written.insert(keyword.into(), bound.min(MOST_LENGTH).into());
            }
        }
        Ok(())
    }

    pub(super) fn array(
        &mut self,
        map: &Map<String, Value>,
        pointer: &str,
        depth: usize,
        written: &mut Map<String, Value>,
    ) -> Result<(), GrammarError> {
        self.lengths(map, pointer, "minItems", "maxItems", written)?;
        // Until 2019 `items` could be what is `prefixItems` now, and `additionalItems` what `items` is.
        let old = map.get("items").is_some_and(Value::is_array);
        let (first, rest) = match old {
            true => ("items", "additionalItems"),
            false => ("prefixItems", "items"),
        };
        if let Some(value) = map.get(first) {
            let Value::Array(schemas) = value else {
                return self.error(pointer, first, format!("expected an array, found {}", kind(value)));
            };
            let schemas: Result<Vec<Value>, GrammarError> = schemas
                .iter()
                .enumerate()
                .map(|(index, item)| self.schema(item, &format!("{pointer}/{first}/{index}"), depth + 1))
                .collect();
            written.insert("prefixItems".into(), Value::Array(schemas?));
        }
        let items = match map.get(rest) {
            Some(items) => self.schema(items, &format!("{pointer}/{rest}"), depth + 1)?,
            None => self.anything(),
        };
        if items != Value::Bool(true) {
            written.insert("items".into(), items);
        }
        Ok(())
    }

    pub(super) fn object(
        &mut self,
        map: &Map<String, Value>,
        pointer: &str,
        depth: usize,
        written: &mut Map<String, Value>,
    ) -> Result<(), GrammarError> {
        let mut maps = [("properties", Map::new()), ("patternProperties", Map::new())];
        for (keyword, rewritten) in &mut maps {
            let Some(value) = map.get(*keyword) else { continue };
            let Value::Object(schemas) = value else {
                return self.error(pointer, keyword, format!("expected an object, found {}", kind(value)));
            };
            for (name, schema) in schemas {
                let place = format!("{pointer}/{keyword}/{}", reference::escape(name));
                let name = match *keyword {
                    "properties" => name.clone(),
                    _ => match pattern::translate(name) {
                        Ok(pattern) => pattern,
                        Err(what) => return self.error(&place, keyword, what),
                    },
                };
                rewritten.insert(name, self.schema(schema, &place, depth + 1)?);
            }
        }
        let [(_, mut properties), (_, patterns)] = maps;
        let required = self.required(map, pointer)?;
        if let Some(names) = map.get("propertyNames") {
            let names = self.names(names, pointer)?;
            if !matches!(names, Names::Any) {
                let others = match map.get("additionalProperties") {
                    Some(schema) => {
                        self.schema(schema, &format!("{pointer}/additionalProperties"), depth + 1)?
                    }
                    None => self.anything(),
                };
                let mut patterns = patterns;
                match names {
                    Names::Listed(names) if patterns.is_empty() => {
                        properties.retain(|name, _| names.contains(name));
                        for name in names {
                            properties.entry(name).or_insert_with(|| others.clone());
                        }
                    }
                    Names::Matching(pattern) if patterns.is_empty() && properties.is_empty() => {
                        patterns.insert(pattern, others);
                    }
                    _ => {
                        let what = "together with patterns or declared properties it is not supported";
                        return self.error(pointer, "propertyNames", what);
                    }
                }
                return self.close_object(map, pointer, [properties, patterns], Value::Bool(false), written);
            }
        }
        let declares = !properties.is_empty() || !patterns.is_empty();
        let closed = declares && !self.combines;
        let additional = match map.get("additionalProperties") {
            Some(schema) => self.schema(schema, &format!("{pointer}/additionalProperties"), depth + 1)?,
            None if closed => Value::Bool(false),
            None => self.anything(),
        };
        if closed && !map.contains_key("additionalProperties") && patterns.is_empty() {
            for name in &required {
                if !properties.contains_key(name) {
                    let anything = self.anything();
                    properties.insert(name.clone(), anything);
                }
            }
        }
        self.close_object(map, pointer, [properties, patterns], additional, written)
    }

    /// Writes an object of these properties, patterns of names, and other properties.
    fn close_object(
        &self,
        map: &Map<String, Value>,
        pointer: &str,
        [properties, patterns]: [Map<String, Value>; 2],
        additional: Value,
        written: &mut Map<String, Value>,
    ) -> Result<(), GrammarError> {
        let required = self.required(map, pointer)?;
        let optional = properties.keys().filter(|name| !required.contains(name)).count();
        if optional > MOST_OPTIONAL {
            let what =
                format!("{optional} of the properties are optional, at most {MOST_OPTIONAL} are supported");
            return self.error(pointer, "properties", what);
        }
        self.lengths(map, pointer, "minProperties", "maxProperties", written)?;
        // Names that are not declared may come twice, and then count once.
        let least = written.get("minProperties").and_then(Value::as_u64).unwrap_or(0) as usize;
        let only_declared = patterns.is_empty() && additional == Value::Bool(false);
        if least <= required.len() {
            written.remove("minProperties");
        } else if !(only_declared && least == 1) {
            let what = format!(
                "{least} is more than the {} required properties; name what is required in \"required\"",
                required.len()
            );
            return self.error(pointer, "minProperties", what);
        }
        if !properties.is_empty() {
            written.insert("properties".into(), Value::Object(properties));
        }
        if !patterns.is_empty() {
            written.insert("patternProperties".into(), Value::Object(patterns));
        }
        if !required.is_empty() {
            written.insert("required".into(), json!(required));
        }
        if additional != Value::Bool(true) {
            written.insert("additionalProperties".into(), additional);
        }
        Ok(())
    }

    fn required(&self, map: &Map<String, Value>, pointer: &str) -> Result<Vec<String>, GrammarError> {
        let mut required: Vec<String> = Vec::new();
        if let Some(value) = map.get("required") {
            let names: Option<Vec<&str>> =
                value.as_array().and_then(|names| names.iter().map(Value::as_str).collect());
            let Some(names) = names else {
                return self.error(pointer, "required", "expected an array of names");
            };
            for name in names {
                if !required.iter().any(|other| other == name) {
                    required.push(name.to_owned());
                }
            }
        }
        Ok(required)
    }

    /// The names that `propertyNames` leaves.
    fn names(&self, schema: &Value, pointer: &str) -> Result<Names, GrammarError> {
        let Value::Object(map) = schema else {
            return match schema {
                Value::Bool(true) => Ok(Names::Any),
                _ => self.error(pointer, "propertyNames", "expected a schema that some names satisfy"),
            };
        };
        if let Some(target) = map.get("$ref").and_then(Value::as_str).and_then(reference::pointer)
            && let Some(found @ Value::Object(_)) = reference::resolve(self.root, &target)
            && found.get("$ref").is_none()
        {
            return self.names(found, pointer);
        }
        self.refuse_impossible(map, &format!("{pointer}/propertyNames"))?;
        let says = |keyword: &&str| SAYING.iter().any(|group| group.contains(keyword)) && *keyword != "type";
        let said: Vec<&str> = map.keys().map(String::as_str).filter(says).collect();
        let texts = |values: &[Value]| values.iter().filter_map(Value::as_str).map(String::from).collect();
        match (said.as_slice(), map.get("type").is_none_or(|name| name == "string")) {
            ([], true) => Ok(Names::Any),
            (["const"], true) => {
                Ok(Names::Listed(texts(map.get("const").map(std::slice::from_ref).unwrap_or_default())))
            }
            (["enum"], true) => Ok(Names::Listed(texts(
                map.get("enum").and_then(Value::as_array).map_or(&[][..], Vec::as_slice),
            ))),
            (["pattern"], true) => {
                match pattern::translate(map.get("pattern").and_then(Value::as_str).unwrap_or_default()) {
                    Ok(pattern) => Ok(Names::Matching(pattern)),
                    Err(what) => self.error(pointer, "propertyNames", what),
                }
            }
            _ => self.error(
                pointer,
                "propertyNames",
                "only one of \"enum\", \"const\" and \"pattern\" is supported in it",
            ),
        }
    }
}
