use std::path::PathBuf;

use super::*;
use crate::answers::Manner;

/// The chat templates of published models, by name.
pub(crate) fn templates() -> Vec<(String, ChatTemplate)> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models/weights/templates");
    let files =
        std::fs::read_dir(&folder).map(|files| files.flatten().collect::<Vec<_>>()).unwrap_or_default();
    let mut found: Vec<(String, ChatTemplate)> = files
        .into_iter()
        .filter_map(|file| {
            let name = file.file_name().into_string().unwrap().strip_suffix(".jinja")?.to_owned();
            let source = std::fs::read_to_string(file.path()).unwrap();
            // Firefunction's wants variables that no conversation has.
            let usable = !name.starts_with("fireworks-ai");
            usable.then(|| (name, ChatTemplate::new(&source, "<s>", "</s>").unwrap()))
        })
        .collect();
    assert!(
        found.len() > 50,
        "{} has {} templates: run scripts/fetch_templates",
        folder.display(),
        found.len()
    );
    found.sort_by(|one, other| one.0.cmp(&other.0));
    found
}

fn chatml() -> ChatTemplate {
    ChatTemplate::chatml("", "").unwrap()
}

fn tool() -> Value {
    json!({"type": "function", "function": {"name": "weather", "description": "Tells it.", "strict": true}})
}

/// A question, an answer that calls twice, and the two results.
fn called() -> Vec<Message> {
    let call = |id: &str, city: &str| {
        json!({"id": id, "type": "function", "function": {
            "name": "weather", "arguments": json!({ "city": city }).to_string()}})
    };
    let mut answer = message("assistant", "");
    answer.insert("tool_calls".into(), json!([call("call_1", "Paris"), call("call_2", "Rome")]));
    let result = |id: &str, text: &str| {
        let mut result = message("tool", text);
        result.insert("tool_call_id".into(), id.into());
        result
    };
    vec![message("user", "How warm?"), answer, result("call_1", "sunny"), result("call_2", "rainy")]
}

fn texts(dressed: &Dressed) -> Vec<(&str, &str)> {
    dressed.messages.iter().map(|message| (role(message), content(message))).collect()
}

#[test]
fn published_templates_show_how_their_models_write_calls() {
    let expected = |name: &str| match name {
        "Bielik-11B-v3.0-Instruct"
        | "MiMo-VL"
        | "Qwen-QwQ-32B"
        | "Qwen-Qwen2.5-7B-Instruct"
        | "Qwen-Qwen3-0.6B"
        | "Reka-Edge"
        | "ibm-granite-granite-4.0"
        | "ibm-granite-granite-4.1"
        | "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use"
        | "NousResearch-Hermes-3-Llama-3.1-8B-tool_use" => (CallSyntax::Hermes, true),
        "meta-llama-Llama-3.1-8B-Instruct"
        | "meta-llama-Llama-3.2-3B-Instruct"
        | "meta-llama-Llama-3.3-70B-Instruct" => (CallSyntax::Llama3, true),
        "mistralai-Mistral-Nemo-Instruct-2407" => (CallSyntax::Mistral, true),
        "Mistral-Small-3.2-24B-Instruct-2506"
        | "mistralai-Ministral-3-14B-Reasoning-2512"
        | "unsloth-mistral-Devstral-Small-2507" => (CallSyntax::MistralArgs, true),
        "google-gemma-2-2b-it" => (CallSyntax::Gemma, false),
        _ => (CallSyntax::Generic, false),
    };
    for (name, template) in templates() {
        let manner = Manner::of(&template);
        assert_eq!((manner.syntax, manner.native), expected(&name), "{name}");
    }
}

#[test]
fn a_conversation_without_tools_stays_as_it_is() {
    let said = vec![message("user", "hi"), message("assistant", "Hello!")];
    let dressed = dress(&chatml(), said.clone(), &[], false);
    assert_eq!(dressed, Dressed { messages: said, tools: Vec::new(), places: vec![0, 1] });
}

#[test]
fn a_model_that_knows_no_tools_is_told_in_words() {
    let dressed = dress(&chatml(), called(), &[tool()], false);
    let said = texts(&dressed);
    assert_eq!(
        said.iter().map(|(role, _)| *role).collect::<Vec<_>>(),
        ["system", "user", "assistant", "user"]
    );
    assert!(
        said[0].1.contains(r#"{"name":"weather","description":"Tells it.","parameters":"#),
        "{}",
        said[0].1
    );
    assert!(said[0].1.contains("<tool_call>\n{\"name\": \"NAME\", \"arguments\": "), "{}", said[0].1);
    let call = |city: &str| {
        format!(
            "<tool_call>\n{{\"name\": \"weather\", \"arguments\": {{\"city\":\"{city}\"}}}}\n</tool_call>"
        )
    };
    assert_eq!(said[2].1, format!("{}\n{}", call("Paris"), call("Rome")));
    let results = "<tool_response>\nsunny\n</tool_response>\n<tool_response>\nrainy\n</tool_response>";
    assert_eq!(said[3].1, results);
    assert_eq!((dressed.places, dressed.tools), (vec![1, 2, 3, 3], Vec::new()));
}

#[test]
fn the_words_join_a_system_message_or_the_first_question_where_that_has_no_place() {
    let said = vec![message("system", "Be brief."), message("user", "hi")];
    let dressed = dress(&chatml(), said, &[tool()], false);
    assert!(texts(&dressed)[0].1.starts_with("Be brief.\n\nYou can call functions."));
    assert_eq!(dressed.places, [0, 1]);
    let gemma = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}\
        <start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}";
    let gemma = ChatTemplate::new(gemma, "", "").unwrap();
    let dressed = dress(&gemma, vec![message("user", "hi")], &[tool()], false);
    let (role, text) = texts(&dressed)[0];
    assert!(
        role == "user" && text.ends_with("\n\nhi") && text.contains("```tool_code\n{\"name\": \"NAME\""),
        "{text}"
    );
}

#[test]
fn a_template_that_knows_tools_gets_them_in_the_shapes_that_it_expects() {
    let templates = templates();
    let named = |wanted: &str| &templates.iter().find(|(name, _)| name == wanted).unwrap().1;
    let dressed = dress(named("Qwen-Qwen2.5-7B-Instruct"), called(), &[tool()], false);
    assert_eq!(dressed.messages[1]["tool_calls"][0]["function"]["arguments"], json!({"city": "Paris"}));
    assert_eq!(dressed.messages[3]["name"], "weather");
    let parameters = json!({"type": "object", "properties": {}});
    let shaped = json!({"name": "weather", "description": "Tells it.", "parameters": parameters});
    assert_eq!(dressed.tools, [json!({"type": "function", "function": shaped})]);
    // As text where a special token is written out somewhere.
    assert!(dress(named("Qwen-Qwen2.5-7B-Instruct"), called(), &[tool()], true).tools.is_empty());
    // Mistral's ids have nine letters.
    let dressed = dress(named("mistralai-Mistral-Nemo-Instruct-2407"), called(), &[tool()], false);
    let id = dressed.messages[1]["tool_calls"][1]["id"].as_str().unwrap();
    assert!(id.len() == 9 && dressed.messages[3]["tool_call_id"] == id, "{id}");
}

#[test]
fn every_published_template_renders_calls_and_results_one_way_or_the_other() {
    for (name, template) in templates() {
        let mut said = called();
        if Manner::of(&template).syntax == CallSyntax::Llama3 {
            // These refuse more than one call.
            said[1]["tool_calls"].as_array_mut().unwrap().truncate(1);
            said.truncate(3);
        }
        let dressed = dress(&template, said, &[tool()], false);
        let text = template.render(&dressed.messages, &dressed.tools, true);
        let text = text.unwrap_or_else(|why| panic!("{name}: {why}"));
        for part in ["How warm?", "Tells it.", "Paris", "sunny"] {
            assert!(text.contains(part), "{name}: {part} is not in {text}");
        }
    }
}
