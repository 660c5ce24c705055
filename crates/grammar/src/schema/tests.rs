use serde_json::json;

use super::*;

fn keyword(schema: Value) -> String {
    let error = rewrite(&schema, "schema").unwrap_err();
    assert!(error.message.starts_with("schema: "), "{error}");
    error.keyword.unwrap_or_default()
}

#[test]
fn what_a_grammar_cannot_promise_is_refused_by_name() {
    for (name, schema) in [
        ("not", json!({"not": {"type": "string"}})),
        ("if", json!({"type": "object", "properties": {"a": {"if": {}, "then": {}}}})),
        ("uniqueItems", json!({"type": "array", "uniqueItems": true})),
        ("propertyNames", json!({"type": "object", "propertyNames": {"minLength": 3}})),
        (
            "propertyNames",
            json!({"type": "object", "properties": {"b": {}}, "propertyNames": {"pattern": "^a"}}),
        ),
        ("dependentRequired", json!({"dependentRequired": {"a": ["b"]}})),
        ("contains", json!({"type": "array", "contains": {"type": "string"}})),
        ("unevaluatedProperties", json!({"type": "object", "unevaluatedProperties": false})),
        ("oneOf", json!({"oneOf": [{"type": "integer"}, {"type": "number"}]})),
        ("pattern", json!({"type": "string", "pattern": "(?=a)b"})),
        ("multipleOf", json!({"type": "number", "multipleOf": 0.01})),
        ("minProperties", json!({"type": "object", "minProperties": 3})),
        ("$ref", json!({"$ref": "https://example.com/schema.json"})),
        ("$ref", json!({"$ref": "#/$defs/missing"})),
        ("$ref", json!({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]})),
        ("type", json!({"type": "text"})),
        ("enum", json!({"type": "string", "enum": [1, 2]})),
        ("enum", json!({"enum": []})),
        ("const", json!({"const": 1e300})),
        ("minLength", json!({"type": "string", "minLength": 5, "maxLength": 4})),
        ("minimum", json!({"type": "integer", "minimum": 1e17})),
        ("required", json!({"type": "object", "required": "name"})),
        ("properties", json!({"type": "object", "properties": []})),
    ] {
        assert_eq!(keyword(schema.clone()), name, "{schema}");
    }
}

#[test]
fn the_place_of_what_is_refused_is_told() {
    let schema = json!({"type": "object", "properties": {"a/b": {"type": "array", "items": {"not": {}}}}});
    let error = rewrite(&schema, "tools[1].function.parameters").unwrap_err();
    assert!(error.message.contains("/properties/a~1b/items"), "{error}");
    assert!(error.message.starts_with("tools[1].function.parameters: \"not\""), "{error}");
}

#[test]
fn harmless_spellings_pass() {
    for schema in [
        json!({"type": "object", "uniqueItems": false, "title": "T", "description": "D", "nullable": true}),
        json!({"$schema": "http://json-schema.org/draft-07/schema#", "$id": "x", "type": "string", "format": "cuid"}),
        json!({"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {}}),
        json!({"type": "object", "propertyNames": {"$ref": "#/$defs/colour"}, "$defs": {"colour": {"enum": ["red", "blue"]}}}),
        json!({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}),
        json!({"type": "string", "format": "email", "pattern":
            "^(?!\\.)(?!.*\\.\\.)([A-Za-z0-9_'+\\-\\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\\-]*\\.)+[A-Za-z]{2,}$"}),
        json!({"oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}], "$defs": {
            "cat": {"type": "object", "properties": {"kind": {"const": "cat"}}, "required": ["kind"]},
            "dog": {"type": "object", "properties": {"kind": {"enum": ["dog"]}}, "required": ["kind"]}}}),
        json!({"oneOf": [{"type": "object", "properties": {"a": {}}, "required": ["a"]},
            {"type": "object", "properties": {"b": {}}, "required": ["b"]}]}),
        json!({"type": "array", "items": [{"type": "string"}], "additionalItems": false}),
        json!(true),
    ] {
        rewrite(&schema, "schema").unwrap_or_else(|error| panic!("{schema}: {error}"));
    }
}

#[test]
fn limits_are_stated() {
    let mut deep = json!({"type": "string"});
    for _ in 0..40 {
        deep = json!({"type": "array", "items": deep});
    }
    assert!(rewrite(&deep, "schema").unwrap_err().message.contains("32 levels"));
    let values: Vec<usize> = (0..6000).collect();
    assert!(rewrite(&json!({"enum": values}), "schema").unwrap_err().message.contains("5000"));
    let long = json!({"type": "string", "description": "x".repeat(300_000)});
    assert!(rewrite(&long, "schema").unwrap_err().message.contains("262144"));
}

#[test]
fn a_definition_without_a_finite_value_cannot_be_chosen() {
    let schema = json!({"type": "object", "properties": {"next": {"$ref": "#/$defs/endless"}, "name": {"type": "string"}},
        "$defs": {"endless": {"type": "object", "properties": {"next": {"$ref": "#/$defs/endless"}}, "required": ["next"]}}});
    let written = rewrite(&schema, "schema").unwrap();
    assert_eq!(written["$defs"]["d0"], json!(false));
}
