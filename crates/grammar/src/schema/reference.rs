//! References into a schema: JSON pointers in the fragment of a URI.

use serde_json::Value;

/// The pointer of a reference to a place in the same schema; None when it is to another one, or to an anchor.
pub fn pointer(reference: &str) -> Option<String> {
    let fragment = reference.strip_prefix('#')?;
    if fragment.is_empty() || fragment == "/" {
        return Some(String::new());
    }
    let decoded = decode(fragment)?;
    decoded.starts_with('/').then_some(decoded)
}

/// The value at a pointer.
pub fn resolve<'a>(root: &'a Value, pointer: &str) -> Option<&'a Value> {
    root.pointer(pointer)
}

/// A name as a step of a pointer.
pub fn escape(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}

/// Undoes percent-encoding.
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        if *first != b'%' {
            bytes.push(*first);
            rest = after;
            continue;
        }
        let digits = std::str::from_utf8(after.get(..2)?).ok()?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        rest = &after[2..];
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn pointers_are_decoded_as_the_specification_says() {
        let schema = json!({"$defs": {"a b": 1, "c/d": 2, "~": 3}});
        for (reference, value) in [("#/$defs/a%20b", 1), ("#/$defs/c~1d", 2), ("#/$defs/~0", 3)] {
            assert_eq!(resolve(&schema, &pointer(reference).unwrap()), Some(&json!(value)));
        }
        assert_eq!(resolve(&schema, &pointer("#").unwrap()), Some(&schema));
        for reference in ["other.json#/a", "#anchor", "https://example.com/schema", "#/%zz"] {
            assert_eq!(pointer(reference), None);
        }
    }
}
