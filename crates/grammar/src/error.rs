//! Why an answer cannot be constrained as asked.

/// A form of answer that cannot be promised.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct GrammarError {
    /// The request field: `response_format.json_schema.schema`, `tools[0].function.parameters`…
    pub param: String,
    /// The keyword of the schema, where it is about one.
    pub keyword: Option<String>,
    /// What was asked, why it cannot be promised, and what can be done; begins with `param`.
    pub message: String,
    /// Where in the schema the keyword stands, as a JSON pointer.
    pub(crate) pointer: Option<String>,
}

impl GrammarError {
    pub(crate) fn new(param: &str, what: impl std::fmt::Display) -> GrammarError {
        GrammarError {
            param: param.to_owned(),
            keyword: None,
            message: format!("{param}: {what}"),
            pointer: None,
        }
    }

    /// About a keyword at a JSON pointer into the schema.
    pub(crate) fn keyword(
        param: &str,
        pointer: &str,
        keyword: &str,
        what: impl std::fmt::Display,
    ) -> GrammarError {
        let place = if pointer.is_empty() { "the top level" } else { pointer };
        GrammarError {
            param: param.to_owned(),
            keyword: Some(keyword.to_owned()),
            message: format!("{param}: \"{keyword}\" at {place}: {what}"),
            pointer: Some(pointer.to_owned()),
        }
    }
}

/// A constraint that broke while its answer was generated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the grammar of the answer failed: {0}; ask without it, or simplify the schema")]
pub struct ConstraintError(pub(crate) String);
