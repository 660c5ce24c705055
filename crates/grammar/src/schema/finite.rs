//! Schemas that refer to themselves: does a finite value satisfy them?

use serde_json::{Map, Value};

/// Replaces definitions that no finite value satisfies by `false`. An error names the keyword when the whole is such.
pub fn prune(root: &Value, definitions: &mut Map<String, Value>) -> Result<(), &'static str> {
    // The least fixed point: a definition is satisfied once values of fewer levels satisfy what it needs.
    let mut known: Vec<String> = Vec::new();
    loop {
        let found: Vec<String> = definitions
            .iter()
            .filter(|(name, schema)| !known.contains(name) && satisfiable(schema, &known))
            .map(|(name, _)| name.clone())
            .collect();
        if found.is_empty() {
            break;
        }
        known.extend(found);
    }
    for (name, schema) in definitions.iter_mut() {
        if !known.contains(name) {
            *schema = Value::Bool(false);
        }
    }
    if satisfiable(root, &known) { Ok(()) } else { Err("$ref") }
}

fn satisfiable(schema: &Value, known: &[String]) -> bool {
    let Value::Object(map) = schema else { return *schema == Value::Bool(true) };
    let list = |keyword: &str| map.get(keyword).and_then(Value::as_array);
    if let Some(name) = map.get("$ref").and_then(Value::as_str).and_then(|it| it.strip_prefix("#/$defs/"))
        && !known.iter().any(|other| other == name)
    {
        return false;
    }
    if list("anyOf").is_some_and(|options| !options.iter().any(|option| satisfiable(option, known)))
        || list("allOf").is_some_and(|parts| !parts.iter().all(|part| satisfiable(part, known)))
    {
        return false;
    }
    let is = |name: &str| match map.get("type") {
        Some(Value::String(only)) => only == name,
        Some(Value::Array(names)) => names.iter().any(|it| it == name),
        _ => true,
    };
    if map.contains_key("enum") || ["null", "boolean", "integer", "number", "string"].into_iter().any(is) {
        return true;
    }
    is("object") && object(map, known) || is("array") && array(map, known)
}

fn object(map: &Map<String, Value>, known: &[String]) -> bool {
    let additional = map.get("additionalProperties").is_none_or(|schema| satisfiable(schema, known));
    let mut required =
        map.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    required.all(|name| match map.get("properties").and_then(|properties| properties.get(name)) {
        Some(schema) => satisfiable(schema, known),
        None => additional || map.contains_key("patternProperties"),
    })
}

fn array(map: &Map<String, Value>, known: &[String]) -> bool {
    let least = map.get("minItems").and_then(Value::as_u64).unwrap_or(0) as usize;
    let first = map.get("prefixItems").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    first.iter().take(least).all(|item| satisfiable(item, known))
        && (least <= first.len() || map.get("items").is_none_or(|items| satisfiable(items, known)))
}
