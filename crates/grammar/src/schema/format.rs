//! `format`: texts that satisfy each of the specification's formats, in every reading of it. They are chosen so that
//! a text which matches is one; not every text which is one matches.

const DATE: &str = "(?:[1-9][0-9]{3}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))|[1-9][0-9](?:0[48]|[2468][048]|[13579][26])-02-29)";
const TIME: &str =
    "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])";
const HOST: &str = "(?:[A-Za-z0-9]{1,20}(?:-[A-Za-z0-9]{1,20})?\\.){0,3}[A-Za-z]{2,20}";
const IPV4: &str =
    "(?:(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])\\.){3}(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])";
const IPV6: &str = "(?:[0-9a-fA-F]{1,4}:){7}[0-9a-fA-F]{1,4}|(?:[0-9a-fA-F]{1,4}(?::[0-9a-fA-F]{1,4}){0,3})?::(?:[0-9a-fA-F]{1,4}(?::[0-9a-fA-F]{1,4}){0,2})?";
const UUID: &str = "[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}";
/// Characters of a URI's path, query and fragment.
const URI_CHARACTER: &str = "(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-F]{2})";
const CLOCK: &str = "(?:[0-9]{1,5}H(?:[0-9]{1,5}M(?:[0-9]{1,5}S)?)?|[0-9]{1,5}M(?:[0-9]{1,5}S)?|[0-9]{1,5}S)";
const POINTER: &str = "(?:/(?:[^~/\\x00-\\x1F\\x7F]|~[01])*)*";

/// Expressions that libraries write beside a format, which look ahead and which the texts of the format match here: Zod's for
/// addresses.
const IMPLIED: [(&str, &str); 1] = [(
    "email",
    r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$",
)];

/// Whether every text that is written for the format matches this pattern.
pub fn implies(format: &str, pattern: &str) -> bool {
    IMPLIED.contains(&(format, pattern))
}

/// An expression for whole texts of this format. None: it is none of the specification's, so it is an annotation.
pub fn expression(format: &str) -> Option<String> {
    let uri = || {
        let rest =
            format!("(?:/{URI_CHARACTER}*)*(?:\\?(?:{URI_CHARACTER}|[/?])*)?(?:#(?:{URI_CHARACTER}|[/?])*)?");
        let path = "(?:urn:[a-z0-9]{2,20}|mailto|tel):[A-Za-z0-9._+@-]{1,60}";
        (format!("[a-zA-Z][a-zA-Z0-9+.-]{{1,15}}://{HOST}(?::[1-9][0-9]{{0,3}})?{rest}|{path}"), rest)
    };
    let body = match format {
        "date" => DATE.into(),
        "time" => TIME.into(),
        "date-time" => format!("{DATE}T{TIME}"),
        "duration" => format!(
            "P(?:(?:[0-9]{{1,5}}Y(?:[0-9]{{1,5}}M(?:[0-9]{{1,5}}D)?)?|[0-9]{{1,5}}M(?:[0-9]{{1,5}}D)?|[0-9]{{1,5}}D)(?:T{CLOCK})?|T{CLOCK}|[0-9]{{1,5}}W)"
        ),
        "email" | "idn-email" => {
            format!("[A-Za-z0-9_+-]{{1,30}}(?:\\.[A-Za-z0-9_+-]{{1,15}}){{0,2}}@[A-Za-z0-9]{{1,20}}\\.{HOST}")
        }
        "hostname" | "idn-hostname" => HOST.into(),
        "ipv4" => IPV4.into(),
        "ipv6" => IPV6.into(),
        "uuid" => UUID.into(),
        "uri" | "iri" => uri().0,
        "uri-reference" | "iri-reference" | "uri-template" => {
            let (whole, rest) = uri();
            format!("{whole}|{rest}")
        }
        "json-pointer" => POINTER.into(),
        "relative-json-pointer" => format!("(?:0|[1-9][0-9]{{0,5}})(?:#|{POINTER})"),
        "regex" => "[A-Za-z0-9 _]*".into(),
        _ => return None,
    };
    Some(format!("^(?:{body})$"))
}
