//! Functions that a model may call: the request fields `tools`, `tool_choice` and `parallel_tool_calls`.

use dormouse_answer::ToolChoice;
use dormouse_session::Generation;
use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::fields::Fields;

const MOST_TOOLS: usize = 128;
/// Of all tools together, as JSON. It is OpenAI's bound.
const MOST_TOOLS_BYTES: usize = 3 << 20;
const MOST_NAME_CHARACTERS: usize = 64;
/// Of `chat_template_kwargs`, as JSON.
const MOST_TEMPLATE_BYTES: usize = 16 << 10;

/// Parses `tools`, in the shape of chat completions. None where the request has no such field.
pub fn parse(fields: &Fields<'_>) -> Result<Option<Vec<Value>>, ApiError> {
    let Some(list) = fields.list("tools")? else { return Ok(None) };
    let field = fields.name("tools");
    check_count(list, &field)?;
    let mut tools: Vec<Value> = Vec::with_capacity(list.len());
    for (index, tool) in list.iter().enumerate() {
        let place = format!("{field}[{index}].");
        let tool = tool.as_object().ok_or_else(|| {
            let found = crate::fields::describe(tool);
            ApiError::invalid(
                &place[..place.len() - 1],
                format!("{field}[{index}]: expected a tool object, found {found}"),
            )
        })?;
        let tool = Fields::inside(tool, &place);
        check_type(&tool)?;
        let function = tool.object("function")?.ok_or_else(|| tool.expected("function", "an object"))?;
        let function = parse_function(function, &format!("{place}function."))?;
        add(&mut tools, function, &place)?;
    }
    Ok(Some(tools))
}

/// Refuses a list with too many tools, or too long ones.
pub fn check_count(list: &[Value], field: &str) -> Result<(), ApiError> {
    if list.len() > MOST_TOOLS {
        return Err(ApiError::invalid(
            field,
            format!("{field}: at most {MOST_TOOLS} tools, found {}", list.len()),
        ));
    }
    let bytes: usize = list.iter().map(|tool| tool.to_string().len()).sum();
    if bytes > MOST_TOOLS_BYTES {
        let text = format!("{field}: at most {MOST_TOOLS_BYTES} bytes of JSON, found {bytes}");
        return Err(ApiError::invalid(field, text));
    }
    Ok(())
}

/// Refuses tools that are not functions.
pub fn check_type(tool: &Fields<'_>) -> Result<(), ApiError> {
    match tool.string("type")? {
        Some("function") => Ok(()),
        Some(other) => {
            let name = tool.name("type");
            let text = format!(
                "{name}: tools of type {other:?} are not supported; use functions, which the client calls"
            );
            Err(ApiError::unsupported(name, text))
        }
        None => Err(tool.expected("type", "the string \"function\"")),
    }
}

/// Reads the description of a function, and answers the tool in the shape of chat completions. `place` ends with a dot.
pub fn parse_function(function: &Map<String, Value>, place: &str) -> Result<Value, ApiError> {
    let fields = Fields::inside(function, place);
    let name = fields.string("name")?.filter(|name| is_name(name)).ok_or_else(|| {
        let expected = format!("1 to {MOST_NAME_CHARACTERS} letters, digits, underscores, dashes or dots");
        fields.expected("name", &expected)
    })?;
    let mut parsed = Map::new();
    parsed.insert("name".into(), name.into());
    if let Some(description) = fields.string("description")? {
        parsed.insert("description".into(), description.into());
    }
    if let Some(parameters) = fields.object("parameters")? {
        parsed.insert("parameters".into(), Value::Object(parameters.clone()));
    }
    if let Some(strict) = fields.boolean("strict")? {
        parsed.insert("strict".into(), strict.into());
    }
    Ok(json!({ "type": "function", "function": parsed }))
}

/// Adds a tool; two functions of one name could not be told apart. `place` ends with a dot.
pub fn add(tools: &mut Vec<Value>, tool: Value, place: &str) -> Result<(), ApiError> {
    let name = |tool: &Value| tool["function"]["name"].as_str().unwrap_or_default().to_owned();
    if tools.iter().any(|other| name(other) == name(&tool)) {
        let text = format!("{place}function.name: there is another function {:?}", name(&tool));
        return Err(ApiError::invalid(format!("{place}function.name"), text));
    }
    tools.push(tool);
    Ok(())
}

fn is_name(name: &str) -> bool {
    let is_clean = name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.'));
    (1..=MOST_NAME_CHARACTERS).contains(&name.len()) && is_clean
}

/// Reads what a request says of how tools are to be used, and what its chat template is to know besides.
pub fn choose(fields: &Fields<'_>, generation: &mut Generation) -> Result<(), ApiError> {
    if let Some(choice) = fields.get("tool_choice") {
        generation.tool_choice = parse_choice(fields, choice)?;
    }
    generation.parallel_tool_calls = fields.boolean("parallel_tool_calls")?.unwrap_or(true);
    if let Some(variables) = fields.object("chat_template_kwargs")? {
        let bytes = Value::Object(variables.clone()).to_string().len();
        if bytes > MOST_TEMPLATE_BYTES {
            let text =
                format!("chat_template_kwargs: at most {MOST_TEMPLATE_BYTES} bytes of JSON, found {bytes}");
            return Err(ApiError::invalid("chat_template_kwargs", text));
        }
        generation.template.clone_from(variables);
    }
    if let Some(effort) = fields.string("reasoning_effort")? {
        set_effort(effort, generation);
    }
    Ok(())
}

/// What templates call the effort of reasoning; models that can only think or not take "none" for not.
fn set_effort(effort: &str, generation: &mut Generation) {
    let variables = &mut generation.template;
    variables.entry("reasoning_effort").or_insert_with(|| effort.into());
    if effort == "none" {
        variables.entry("enable_thinking").or_insert_with(|| false.into());
    }
}

fn parse_choice(fields: &Fields<'_>, choice: &Value) -> Result<ToolChoice, ApiError> {
    let wrong = || {
        let expected = "\"none\", \"auto\", \"required\", {\"type\": \"function\", \"function\": {\"name\": …}} or \
                        {\"type\": \"allowed_tools\", \"allowed_tools\": {\"mode\": …, \"tools\": […]}}";
        fields.expected("tool_choice", expected)
    };
    match choice {
        Value::String(word) => match word.as_str() {
            "none" => Ok(ToolChoice::None),
            "auto" => Ok(ToolChoice::Auto),
            "required" => Ok(ToolChoice::Required),
            _ => Err(wrong()),
        },
        Value::Object(choice) => match choice.get("type").and_then(Value::as_str) {
            Some("function") => Ok(ToolChoice::Function(name_of(choice).ok_or_else(wrong)?)),
            Some("allowed_tools") => {
                let allowed = choice.get("allowed_tools").and_then(Value::as_object).ok_or_else(wrong)?;
                allowed_tools(allowed).ok_or_else(wrong)
            }
            _ => Err(wrong()),
        },
        _ => Err(wrong()),
    }
}

/// `{"mode": "auto" | "required", "tools": […]}`.
fn allowed_tools(allowed: &Map<String, Value>) -> Option<ToolChoice> {
    let required = match allowed.get("mode").and_then(Value::as_str)? {
        "auto" => false,
        "required" => true,
        _ => return None,
    };
    let tools = allowed.get("tools")?.as_array()?;
    let names: Option<Vec<String>> = tools.iter().map(|tool| name_of(tool.as_object()?)).collect();
    Some(ToolChoice::Allowed { names: names?, required })
}

fn name_of(tool: &Map<String, Value>) -> Option<String> {
    tool.get("function")?.get("name")?.as_str().map(String::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tool(name: &str) -> Value {
        json!({"type": "function", "function": {"name": name}})
    }

    fn parsed(tools: Value) -> Result<Option<Vec<Value>>, ApiError> {
        parse(&Fields::new(json!({ "tools": tools }).as_object().unwrap()))
    }

    fn chosen(request: Value) -> Result<Generation, ApiError> {
        let mut generation = Generation::default();
        choose(&Fields::new(request.as_object().unwrap()), &mut generation).map(|()| generation)
    }

    #[test]
    fn tools_keep_what_models_and_grammars_read() {
        let tools = parsed(json!([{"type": "function", "more": 1, "function": {
            "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": true, "other": null}}]));
        let expected = json!({"type": "function", "function": {
            "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": true}});
        assert_eq!(tools.unwrap(), Some(vec![expected]));
        assert_eq!(parsed(json!([])).unwrap(), Some(Vec::new()));
        assert_eq!(parsed(Value::Null).unwrap(), None);
    }

    #[test]
    fn a_wrong_tool_is_named_by_its_place() {
        for (tools, param) in [
            (json!("f"), "tools"),
            (json!([1]), "tools[0]"),
            (json!([{"function": {"name": "f"}}]), "tools[0].type"),
            (json!([tool("f"), {"type": "web_search"}]), "tools[1].type"),
            (json!([{"type": "function"}]), "tools[0].function"),
            (json!([tool("")]), "tools[0].function.name"),
            (json!([tool("two words")]), "tools[0].function.name"),
            (json!([tool(&"n".repeat(65))]), "tools[0].function.name"),
            (json!([tool("f"), tool("f")]), "tools[1].function.name"),
            (
                json!([{"type": "function", "function": {"name": "f", "parameters": []}}]),
                "tools[0].function.parameters",
            ),
            (json!(vec![tool("f"); 129]), "tools"),
        ] {
            assert_eq!(parsed(tools.clone()).unwrap_err().param.as_deref(), Some(param), "{tools}");
        }
    }

    #[test]
    fn every_form_of_the_choice_is_understood() {
        let named = json!({"type": "function", "function": {"name": "f"}});
        let allowed =
            json!({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}});
        for (choice, expected) in [
            (json!("none"), ToolChoice::None),
            (json!("auto"), ToolChoice::Auto),
            (json!("required"), ToolChoice::Required),
            (Value::Null, ToolChoice::Auto),
            (named, ToolChoice::Function("f".into())),
            (allowed, ToolChoice::Allowed { names: vec!["f".into()], required: true }),
        ] {
            assert_eq!(chosen(json!({ "tool_choice": choice })).unwrap().tool_choice, expected);
        }
        for wrong in [json!("maybe"), json!(1), json!({"type": "custom"}), json!({"type": "function"})] {
            assert_eq!(
                chosen(json!({ "tool_choice": wrong })).unwrap_err().param.as_deref(),
                Some("tool_choice")
            );
        }
        assert!(!chosen(json!({"parallel_tool_calls": false})).unwrap().parallel_tool_calls);
    }

    #[test]
    fn the_template_learns_of_the_effort_unless_it_is_told_otherwise() {
        let generation = chosen(json!({"reasoning_effort": "none"})).unwrap();
        assert_eq!(
            Value::Object(generation.template),
            json!({"reasoning_effort": "none", "enable_thinking": false})
        );
        let told = json!({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": true}});
        assert_eq!(chosen(told).unwrap().template["enable_thinking"], true);
        let long = json!({"chat_template_kwargs": {"x": "y".repeat(MOST_TEMPLATE_BYTES)}});
        assert_eq!(chosen(long).unwrap_err().param.as_deref(), Some("chat_template_kwargs"));
    }
}
