//! Numbers: those that every reader of JSON holds exactly as they are written.

use serde_json::{Map, Value, json};

/// The largest integer up to which all are floating-point numbers (2^53 - 1), for either sign.
const LARGEST: f64 = 9_007_199_254_740_991.0;
/// The last digit that a number may have: the eighth after the point. The engine counts in 32 bits.
const STEP: f64 = 1e-8;
/// Largest `multipleOf`, alone and where several may have to hold together.
const LARGEST_STEP: f64 = 1e8;
const LARGEST_COMBINED_STEP: f64 = 1000.0;
/// A range this narrow holds hardly a number of so few digits.
const NARROW: f64 = 1e-6;

pub fn any_number() -> Value {
    json!({ "type": "number", "minimum": -LARGEST, "maximum": LARGEST, "multipleOf": STEP })
}

/// Writes the bounds of a number; `combines`: others may have to hold with them. Answers whether only whole ones are left; or
/// the keyword that cannot be, and why.
pub fn bounds(
    map: &Map<String, Value>,
    types: &[String],
    combines: bool,
    written: &mut Map<String, Value>,
) -> Result<bool, (&'static str, String)> {
    let number = |keyword: &'static str| match map.get(keyword) {
        None => Ok(None),
        Some(value) => match value.as_f64().filter(|number| number.is_finite()) {
            Some(number) => Ok(Some(number)),
            None => Err((keyword, format!("expected a number, found {value}"))),
        },
    };
    let (mut least, mut most) = (number("minimum")?, number("maximum")?);
    let mut excluded = [None, None];
    for (excluded, (keyword, bound)) in
        excluded.iter_mut().zip([("exclusiveMinimum", &mut least), ("exclusiveMaximum", &mut most)])
    {
        // Until 2016 these said how the other two are meant.
        match map.get(keyword) {
            Some(Value::Bool(true)) => *excluded = bound.take(),
            Some(Value::Bool(false)) => {}
            _ => *excluded = number(keyword)?,
        }
    }
    let [above, below] = excluded;
    for (keyword, bound, is_least) in [
        ("minimum", least, true),
        ("exclusiveMinimum", above, true),
        ("maximum", most, false),
        ("exclusiveMaximum", below, false),
    ] {
        if let Some(bound) =
            bound.filter(|bound| if is_least { *bound >= LARGEST } else { *bound <= -LARGEST })
        {
            let what = format!("{bound} is beyond the integers that every reader of JSON has exactly");
            return Err((keyword, what));
        }
    }
    let below = below.map(|bound| -next(-bound));
    let least = [Some(-LARGEST), least, above.map(next)].into_iter().flatten().fold(f64::MIN, f64::max);
    let most = [Some(LARGEST), most, below].into_iter().flatten().fold(f64::MAX, f64::min);
    if least > most {
        return Err(("minimum", format!("no number is from {least} to {most}")));
    }
    written.insert("minimum".into(), json!(least));
    written.insert("maximum".into(), json!(most));
    let multiple = number("multipleOf")?;
    if let Some(multiple) = multiple {
        let largest = if combines { LARGEST_COMBINED_STEP } else { LARGEST_STEP };
        if multiple < 1.0 || multiple.fract() != 0.0 || multiple > largest {
            let what = format!(
                "expected a whole number from 1 to {largest}, found {multiple}: readers of JSON do not agree on others"
            );
            return Err(("multipleOf", what));
        }
        written.insert("multipleOf".into(), json!(multiple));
    } else if types.iter().any(|name| name == "number") && !combines && most - least >= NARROW {
        written.insert("multipleOf".into(), json!(STEP));
    }
    Ok(multiple.is_some())
}

/// The least number above `bound` that is written: a bound itself must not be, nor a number with so many digits that it is
/// read as the bound.
fn next(bound: f64) -> f64 {
    // Larger numbers lie further apart than steps do.
    const FINE: f64 = 1e6;
    if bound.abs() > FINE {
        return bound.next_up();
    }
    let step = (bound / STEP).floor();
    [1.0, 2.0, 3.0]
        .into_iter()
        .map(|more| (step + more) / (1.0 / STEP))
        .find(|next| *next > bound)
        .unwrap_or(bound + 1.0)
}

/// Whether a listed number is within the bounds that were written; other values always are.
pub fn satisfies(value: &Value, written: &Map<String, Value>) -> bool {
    let Some(number) = value.as_f64() else { return true };
    let holds = |keyword: &str, holds: fn(f64, f64) -> bool| {
        written.get(keyword).and_then(Value::as_f64).is_none_or(|bound| holds(number, bound))
    };
    holds("minimum", |number, bound| number >= bound)
        && holds("maximum", |number, bound| number <= bound)
        // A step that is no whole number only says how many digits there may be.
        && holds("multipleOf", |number, step| step < 1.0 || number % step == 0.0)
}

/// A listed value in a spelling that is read back as itself; or why there is none.
pub fn writable(value: &Value) -> Result<Value, String> {
    match value {
        Value::Number(number) => {
            let float = number.as_f64().unwrap_or(f64::INFINITY);
            if float.abs() > LARGEST || float != 0.0 && float.abs() < NARROW {
                return Err(format!("{number} is beyond the numbers that every reader of JSON has exactly"));
            }
            Ok(if float.fract() == 0.0 { json!(float as i64) } else { value.clone() })
        }
        Value::String(text) => {
            match text.chars().find(|c| c.is_control() && !"\n\r\t\u{8}\u{c}".contains(*c)) {
                Some(control) => {
                    Err(format!("a text with the control character {control:?} is not supported"))
                }
                None => Ok(value.clone()),
            }
        }
        Value::Array(values) => {
            values.iter().map(writable).collect::<Result<Vec<Value>, String>>().map(Value::Array)
        }
        Value::Object(map) => {
            let entries = map.iter().map(|(name, value)| Ok((name.clone(), writable(value)?)));
            entries.collect::<Result<Map<String, Value>, String>>().map(Value::Object)
        }
        Value::Null | Value::Bool(_) => Ok(value.clone()),
    }
}
