//! The document says what there is: every route, and every field of what is answered.

use std::collections::BTreeSet;

use dormouse_engine::{Receipt, Tier};
use dormouse_session::{ApiKey, Item, ParkReceipt, Scope, Session, SessionEvent, SessionStatus};
use serde_json::{Map, Value, json};

fn document() -> Value {
    serde_json::from_str(&super::document().to_json().unwrap()).unwrap()
}

/// The routes as `routes/mod.rs` lists them: (path, method).
fn routes() -> BTreeSet<(String, String)> {
    let source = include_str!("../routes/mod.rs");
    let mut found = BTreeSet::new();
    for route in source.split(".route(").skip(1) {
        let path = route.split('"').nth(1).unwrap().replace("{*", "{");
        let handlers = route.split_once(',').unwrap().1;
        let handlers = handlers.split(".fallback(").next().unwrap();
        for method in ["get", "post", "patch", "delete"] {
            if handlers.contains(&format!("{method}(")) {
                found.insert((path.clone(), method.to_owned()));
            }
        }
    }
    found
}

#[test]
fn every_route_is_in_the_document_and_nothing_else() {
    let document = document();
    let mut described = BTreeSet::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for method in item.as_object().unwrap().keys() {
            described.insert((path.clone(), method.clone()));
        }
    }
    assert_eq!(described, routes());
}

#[test]
fn every_operation_has_a_name_of_its_own_and_every_body_an_example() {
    let document = document();
    let mut names = BTreeSet::new();
    for item in document["paths"].as_object().unwrap().values() {
        for operation in item.as_object().unwrap().values() {
            assert!(names.insert(operation["operationId"].as_str().unwrap().to_owned()));
            if let Some(body) = operation.get("requestBody") {
                assert!(body["content"]["application/json"]["example"].is_object(), "{operation}");
            }
        }
    }
}

#[test]
fn every_reference_leads_somewhere() {
    fn references(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(map) => {
                found.extend(map.get("$ref").and_then(Value::as_str).map(str::to_owned));
                map.values().for_each(|value| references(value, found));
            }
            Value::Array(values) => values.iter().for_each(|value| references(value, found)),
            _ => {}
        }
    }
    let document = document();
    let mut found = Vec::new();
    references(&document, &mut found);
    assert!(!found.is_empty());
    for reference in found {
        assert!(document.pointer(reference.trim_start_matches('#')).is_some(), "{reference}");
    }
}

/// A schema's properties, those of the schemas that it is put together from included.
fn properties(document: &Value, schema: &Value) -> Map<String, Value> {
    if let Some(reference) = schema["$ref"].as_str() {
        return properties(document, document.pointer(reference.trim_start_matches('#')).unwrap());
    }
    let mut found = schema["properties"].as_object().cloned().unwrap_or_default();
    for part in schema["allOf"].as_array().into_iter().flatten() {
        found.extend(properties(document, part));
    }
    found
}

fn assert_described(name: &str, real: Value, not_always: &[&str]) {
    let document = document();
    let described = properties(&document, &document["components"]["schemas"][name]);
    let described: BTreeSet<&str> = described.keys().map(String::as_str).collect();
    let mut real: BTreeSet<&str> = real.as_object().unwrap().keys().map(String::as_str).collect();
    real.extend(not_always);
    assert_eq!(described, real, "{name}");
}

#[test]
fn what_is_answered_has_the_fields_that_are_described() {
    let receipt = Receipt { tier: Tier::Ram, ..Receipt::default() };
    assert_described("Receipt", json!(receipt), &["miss"]);
    let session = Session {
        id: "sess_1".into(),
        object: "session".into(),
        model: "m".into(),
        name: None,
        status: SessionStatus::Idle,
        instructions: None,
        tools: Vec::new(),
        metadata: Map::new(),
        seed: 1,
        kv_dtype: "f16".into(),
        ttl_seconds: None,
        pinned: false,
        created_at: 0,
        last_active_at: 0,
        tokens: 0,
        kv_tokens: 0,
        kv_bytes: 0,
        bytes_written: 0,
        turns: 0,
        forked_from: None,
        active_turn: None,
        error: None,
    };
    assert_described("Session", json!(session), &[]);
    let key = ApiKey {
        id: "key_1".into(),
        object: "api_key",
        name: "ci".into(),
        tenant: "default".into(),
        scopes: Scope::ALL.to_vec(),
        requests_per_minute: None,
        concurrency: None,
        created_at: 0,
        revoked_at: None,
    };
    assert_described("ApiKey", json!(key), &[]);
    let item = Item {
        id: "item_1".into(),
        turn: None,
        message: Map::new(),
        token_start: 0,
        token_end: 0,
        created_at: 0,
    };
    assert_described("SessionItem", json!(item), &[]);
    let park = ParkReceipt { session: "s".into(), tokens: 0, ram_bytes_released: 0, park_ms: 0.0 };
    assert_described("ParkReceipt", json!(park), &[]);
    let event = SessionEvent {
        sequence_number: 0,
        kind: "session.created".into(),
        turn: None,
        created_at: 0,
        data: json!({}),
    };
    assert_described("SessionEvent", json!(event), &["turn"]);
}
