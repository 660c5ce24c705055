//! [`Fields`]: typed reading of a JSON object, with errors that name the field, what was found and what is expected.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::error::ApiError;

/// A JSON object of a request. A field that is `null` counts as absent; unknown fields are never looked at.
#[derive(Clone, Copy)]
pub struct Fields<'a> {
    map: &'a Map<String, Value>,
    /// Where the object sits in the request, e.g. `messages[2].`; empty at the top.
    place: &'a str,
}

impl<'a> Fields<'a> {
    pub fn new(map: &'a Map<String, Value>) -> Fields<'a> {
        Fields { map, place: "" }
    }

    /// Fields of an object inside the request; `place` ends with a dot.
    pub fn inside(map: &'a Map<String, Value>, place: &'a str) -> Fields<'a> {
        Fields { map, place }
    }

    /// The field's full name, for messages.
    pub fn name(&self, field: &str) -> String {
        format!("{}{field}", self.place)
    }

    pub fn get(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    /// The field is there, also as `null`.
    pub fn mentions(&self, field: &str) -> bool {
        self.map.contains_key(field)
    }

    fn wrong(&self, field: &str, expected: &str, found: &Value) -> ApiError {
        let name = self.name(field);
        let message = format!("{name}: expected {expected}, found {}", describe(found));
        ApiError { code: Some("invalid_type"), ..ApiError::invalid(name, message) }
    }

    pub fn string(&self, field: &str) -> Result<Option<&'a str>, ApiError> {
        self.get(field).map(|v| v.as_str().ok_or_else(|| self.wrong(field, "a string", v))).transpose()
    }

    pub fn boolean(&self, field: &str) -> Result<Option<bool>, ApiError> {
        self.get(field).map(|v| v.as_bool().ok_or_else(|| self.wrong(field, "true or false", v))).transpose()
    }

    pub fn list(&self, field: &str) -> Result<Option<&'a Vec<Value>>, ApiError> {
        self.get(field).map(|v| v.as_array().ok_or_else(|| self.wrong(field, "an array", v))).transpose()
    }

    pub fn object(&self, field: &str) -> Result<Option<&'a Map<String, Value>>, ApiError> {
        self.get(field).map(|v| v.as_object().ok_or_else(|| self.wrong(field, "an object", v))).transpose()
    }

    /// A number within `range`.
    pub fn number(&self, field: &str, range: RangeInclusive<f64>) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if range.contains(&number) => Ok(Some(number as f32)),
            _ => {
                let expected = format!("a number from {} to {}", range.start(), range.end());
                Err(self.wrong(field, &expected, value))
            }
        }
    }

    /// A whole number within `range`; `5.0` is one, as some clients know only floating point.
    pub fn integer(&self, field: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match whole(value) {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ => {
                let expected = match *range.end() {
                    i64::MAX => format!("a whole number, at least {}", range.start()),
                    end => format!("a whole number from {} to {end}", range.start()),
                };
                Err(self.wrong(field, &expected, value))
            }
        }
    }

    /// Any 64-bit whole number, negative ones as their two's complement: what seeds are.
    pub fn seed(&self, field: &str) -> Result<Option<u64>, ApiError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_u64().or_else(|| whole(value).map(|number| number as u64)) {
            Some(seed) => Ok(Some(seed)),
            None => Err(self.wrong(field, "a 64-bit whole number", value)),
        }
    }

    /// An error that says `field` should have been `expected`.
    pub fn expected(&self, field: &str, expected: &str) -> ApiError {
        self.wrong(field, expected, self.map.get(field).unwrap_or(&Value::Null))
    }
}

fn whole(value: &Value) -> Option<i64> {
    // 2^53: up to here a float holds every whole number exactly.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    value.as_i64().or_else(|| {
        value
            .as_f64()
            .filter(|number| number.fract() == 0.0 && number.abs() <= EXACT)
            .map(|number| number as i64)
    })
}

/// What a value is, in a few words of an error message.
pub fn describe(value: &Value) -> String {
    match value {
        Value::Null => "nothing (null)".into(),
        Value::Bool(value) => value.to_string(),
        Value::Number(number) => format!("the number {number}"),
        Value::String(text) if text.chars().count() <= 40 => format!("the string {text:?}"),
        Value::String(text) => format!("a string of {} bytes", text.len()),
        Value::Array(values) => format!("an array of {}", values.len()),
        Value::Object(_) => "an object".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn map(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn a_wrong_type_names_the_field_what_was_found_and_what_is_expected() {
        let map = map(json!({"temperature": "hot"}));
        let error = Fields::new(&map).number("temperature", 0.0..=2.0).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("temperature"));
        assert_eq!(error.message, "temperature: expected a number from 0 to 2, found the string \"hot\"");
    }

    #[test]
    fn null_counts_as_absent() {
        let map = map(json!({"seed": null}));
        assert_eq!(Fields::new(&map).seed("seed").unwrap(), None);
        assert!(Fields::new(&map).mentions("seed"));
    }

    #[test]
    fn whole_numbers_may_be_written_as_floats_but_not_have_a_fraction() {
        let map = map(json!({"a": 5.0, "b": 5.5, "c": 1e300}));
        let fields = Fields::new(&map);
        assert_eq!(fields.integer("a", 1..=9).unwrap(), Some(5));
        assert!(fields.integer("b", 1..=9).is_err());
        assert!(fields.integer("c", 1..=i64::MAX).is_err());
    }

    #[test]
    fn seeds_cover_all_sixty_four_bits() {
        let map = map(json!({"a": -1, "b": u64::MAX}));
        let fields = Fields::new(&map);
        assert_eq!(fields.seed("a").unwrap(), Some(u64::MAX));
        assert_eq!(fields.seed("b").unwrap(), Some(u64::MAX));
    }
}
