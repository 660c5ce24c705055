//! `pattern`: ECMAScript's regular expressions, in the syntax and meaning of the grammar engine's.

/// Most repetitions of a part: each is a state.
const MOST_REPETITIONS: u32 = 1000;
const MOST_BYTES: usize = 2048;

/// What white space is to everyone: ECMAScript, Rust and Python differ in the rest.
const SPACE: &str = r" \t\n\r\x0B\x0C";
/// What nobody calls white space is outside these.
const ANY_SPACE: &str = r"\x09-\x0D\x1C-\x20\u{85}\u{A0}\u{1680}\u{2000}-\u{200A}\u{2028}\u{2029}\u{202F}\u{205F}\u{3000}\u{FEFF}";
/// `.` is everything else.
const LINE_ENDS: &str = r"\n\r\u{2028}\u{2029}";

/// The same expression for the grammar engine, matching nothing that ECMAScript's would not; or what in it is not supported.
pub fn translate(pattern: &str) -> Result<String, String> {
    if pattern.len() > MOST_BYTES {
        return Err(format!("it has {} bytes, at most {MOST_BYTES} are supported", pattern.len()));
    }
    let mut text = String::with_capacity(pattern.len() + 16);
    let mut rest = pattern;
    let mut in_class = false;
    while let Some(character) = rest.chars().next() {
        let after = &rest[character.len_utf8()..];
        rest = match character {
            '\\' => escape(after, in_class, &mut text)?,
            '[' if !in_class => {
                in_class = true;
                text.push('[');
                let after = after.strip_prefix('^').map_or(after, |after| {
                    text.push('^');
                    after
                });
                if after.starts_with(']') {
                    return Err("an empty class is not supported".into());
                }
                after
            }
            ']' if in_class => {
                in_class = false;
                text.push(']');
                after
            }
            // These would begin a nested class or a set operation.
            '[' | '&' | '~' if in_class => {
                text.push('\\');
                text.push(character);
                after
            }
            '-' if in_class && after.starts_with('-') => {
                return Err("'--' in a class is not supported; write '\\-'".into());
            }
            '(' if after.starts_with('?') => {
                text.push_str("(?:");
                group(after)?
            }
            '.' if !in_class => {
                text.push_str(&format!("[^{LINE_ENDS}]"));
                after
            }
            '{' if !in_class => repetition(after, &mut text)?,
            '}' if !in_class => return Err("a '}' without '{' is not supported; write '\\}'".into()),
            _ => {
                text.push(character);
                after
            }
        };
    }
    if in_class { Err("a '[' is not closed".into()) } else { Ok(text) }
}

/// What follows a backslash. Answers the rest.
fn escape<'a>(after: &'a str, in_class: bool, text: &mut String) -> Result<&'a str, String> {
    let Some(character) = after.chars().next() else { return Err("it ends with a backslash".into()) };
    let rest = &after[character.len_utf8()..];
    let mut class = |inner: &str, negated: bool| match (in_class, negated) {
        (true, false) => text.push_str(inner),
        (_, negated) => text.push_str(&format!("[{}{inner}]", if negated { "^" } else { "" })),
    };
    match character {
        'd' | 'D' => class("0-9", character == 'D'),
        'w' | 'W' => class("0-9A-Za-z_", character == 'W'),
        's' => class(SPACE, false),
        'S' => class(ANY_SPACE, true),
        'n' | 'r' | 't' => text.extend(['\\', character]),
        'f' => text.push_str(r"\x0C"),
        'v' => text.push_str(r"\x0B"),
        'b' if in_class => text.push_str(r"\x08"),
        '0' if !rest.starts_with(|next: char| next.is_ascii_digit()) => text.push_str(r"\x00"),
        'x' => return code(rest, 2, text),
        'u' if rest.starts_with('{') => {
            let end = rest.find('}').ok_or("'\\u{' is not closed")?;
            code(&rest[1..end], end - 1, text)?;
            return Ok(&rest[end + 1..]);
        }
        'u' => return code(rest, 4, text),
        'p' | 'P' if rest.starts_with('{') => text.extend(['\\', character]),
        // With a backslash these would be the edges of words.
        '<' | '>' => text.push(character),
        _ if character.is_ascii_punctuation() => text.extend(['\\', character]),
        'b' | 'B' => return Err(format!("'\\{character}' (a word's edge) is not supported")),
        '1'..='9' | 'k' => return Err("references to groups are not supported".into()),
        _ => return Err(format!("'\\{character}' is not supported")),
    }
    Ok(rest)
}

/// A character by its number in so many hexadecimal digits.
fn code<'a>(rest: &'a str, digits: usize, text: &mut String) -> Result<&'a str, String> {
    let number = rest.get(..digits).and_then(|digits| u32::from_str_radix(digits, 16).ok());
    let character = number.and_then(char::from_u32).ok_or("it has an escape that is no character")?;
    text.push_str(&format!("\\u{{{:X}}}", u32::from(character)));
    Ok(&rest[digits..])
}

/// A group that begins with `?`. Answers what is inside.
fn group(after: &str) -> Result<&str, String> {
    if let Some(inside) = after.strip_prefix("?:") {
        return Ok(inside);
    }
    let name = after.strip_prefix("?<").filter(|name| !name.starts_with(['=', '!']));
    let end = name.and_then(|name| name.find('>').map(|end| &name[end + 1..]));
    end.ok_or_else(|| "looking ahead or behind, and flags, are not supported".into())
}

/// `{2}`, `{2,}` or `{2,3}`, of which the brace was read. Answers the rest.
fn repetition<'a>(after: &'a str, text: &mut String) -> Result<&'a str, String> {
    let malformed = || String::from("a '{' that begins no repetition is not supported; write '\\{'");
    let end = after.find('}').ok_or_else(malformed)?;
    let inside = &after[..end];
    let (least, most) = inside.split_once(',').unwrap_or((inside, inside));
    for (number, may_be_absent) in [(least, false), (most, inside.contains(','))] {
        if number.is_empty() && may_be_absent {
            continue;
        }
        let count = number.parse::<u32>().map_err(|_| malformed())?;
        if count > MOST_REPETITIONS {
            return Err(format!("it repeats {count} times, at most {MOST_REPETITIONS} are supported"));
        }
    }
    text.push('{');
    text.push_str(inside);
    text.push('}');
    Ok(&after[end + 1..])
}

#[cfg(test)]
mod tests {
    use super::translate;

    #[test]
    fn classes_mean_what_ecmascript_means() {
        assert_eq!(translate(r"^\d+[\w.-]$").unwrap(), "^[0-9]+[0-9A-Za-z_.-]$");
        assert_eq!(translate("[a[&]").unwrap(), r"[a\[\&]");
        assert_eq!(translate(r"a\/b\u0041").unwrap(), r"a\/b\u{41}");
        assert_eq!(translate("(?<year>[0-9]{4})").unwrap(), "(?:[0-9]{4})");
        assert!(translate(".").unwrap().contains("2028"));
    }

    #[test]
    fn what_is_not_regular_is_refused_with_words() {
        for pattern in
            [r"(a)\1", "(?=a)", "(?!a)", "(?<=a)b", "(?i)a", r"\bword", "a{2000}", "{", "[", "[]", "\\"]
        {
            assert!(translate(pattern).is_err(), "{pattern}");
        }
    }
}
