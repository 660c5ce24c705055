use super::*;
use serde_json::json;

#[derive(serde::Deserialize)]
struct Golden {
    template: String,
    messages: Vec<Map<String, serde_json::Value>>,
    tools: Vec<serde_json::Value>,
    add_generation_prompt: bool,
    extra: Map<String, serde_json::Value>,
    rendered: String,
}

#[test]
fn conversations_render_as_jinja2_renders_them() {
    let goldens: Vec<Golden> =
        serde_json::from_str(include_str!("../../tests/template_goldens.json")).unwrap();
    assert!(goldens.len() >= 50);
    let mut wrong = Vec::new();
    for golden in goldens {
        let rendered = ChatTemplate::new(&golden.template, "<s>", "</s>").and_then(|template| {
            let generate = golden.add_generation_prompt;
            template.render_with(&golden.messages, &golden.tools, generate, &golden.extra)
        });
        if rendered.as_ref().ok() != Some(&golden.rendered) {
            wrong.push((golden.template, golden.rendered, rendered));
        }
    }
    assert!(wrong.is_empty(), "(template, jinja2, ours): {wrong:#?}");
}

fn user(text: &str) -> Vec<Map<String, serde_json::Value>> {
    vec![json!({"role": "user", "content": text}).as_object().unwrap().clone()]
}

fn render(source: &str) -> Result<String, ModelError> {
    ChatTemplate::new(source, "<s>", "</s>")?.render(&user("Hi"), &[], true)
}

#[test]
fn a_template_can_refuse_and_its_words_and_line_are_kept() {
    let error = render("\n\n{{ raise_exception('roles must alternate') }}").unwrap_err().to_string();
    assert!(error.contains("line 3") && error.contains("roles must alternate"), "{error}");
}

/// The error of a template that cannot be used, in words.
fn refusal(source: &str) -> String {
    match render(source) {
        Ok(text) => panic!("rendered {} bytes: {:.80}", text.len(), text),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_template_that_includes_itself_ends_in_an_error() {
    for source in [
        "{% include 'default' %}",
        "{% include 'default' ignore missing %}",
        "{% extends 'default' %}",
        "{% import 'default' as c %}{{ c }}",
        "{% from 'default' import m %}{{ m() }}",
        "{% block a %}{{ self.a() }}{% endblock %}",
    ] {
        let error = refusal(source);
        assert!(error.contains("line 1") && error.len() < 20_000, "{source}: {error}");
    }
}

#[test]
fn a_template_without_end_ends_in_an_error() {
    let error =
        refusal("{% for a in range(10000) %}{% for b in range(10000) %}{{ a }}{% endfor %}{% endfor %}");
    assert!(error.contains("fuel"), "{error}");
    for source in [
        "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}",
        "{% macro m() %}{{ caller() }}{% endmacro %}{% macro n() %}{% call m() %}{{ n() }}{% endcall %}{% endmacro %}{{ n() }}",
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    ] {
        assert!(refusal(source).contains("recursion limit"), "{source}");
    }
}

#[test]
fn what_one_step_can_multiply_is_bounded() {
    for source in [
        "{{ 'x' * 10**9 }}",
        "{{ 'x' * 10**8 }}",
        "{{ range(10**9) }}",
        "{{ 10 ** 1000000000 }}",
        "{{ 'a\nb' | indent(1000000000) }}",
        "{{ [1] | batch(1000000000, 1) | list | length }}",
        "{{ [1] | slice(1000000000) | list | length }}",
        "{% set a = 'x' * 100000 %}{{ a | replace('x', a) | length }}",
        "{% set a = 'x' * 100000 %}{{ a.replace('x', a) | length }}",
        "{% set a = 'x' * 100000 %}{{ ([a] * 1000000) | join | length }}",
        "{% set a = 'x' * 100000 %}{{ a.join([1] * 1000000) | length }}",
        "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
        "{% set ns = namespace() %}{% set ns.a = [ns] %}{{ ns | tojson }}",
        "{% set ns = namespace(l=[1]) %}{% for i in range(100) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l | string }}",
    ] {
        refusal(source);
    }
}

#[test]
fn long_chains_and_deep_nesting_overflow_no_stack() {
    let refused = |begin: &str, link: &str, end: &str, bytes: usize| {
        let source = format!("{begin}{}{end}", link.repeat(bytes / link.len()));
        // Most are errors and some are prompts: what counts is that there is an answer.
        render(&source).err().map(|error| error.to_string())
    };
    for (begin, link, end) in [
        ("{{ ", "(", " }}"),
        ("{{ ", "[", " }}"),
        ("{{ ", "not ", "1 }}"),
        ("{{ ", "-", "1 }}"),
        ("{{ 1", "|abs", " }}"),
        ("{{ a", ".a", " }}"),
        ("{{ a", "[0]", " }}"),
        ("{{ a", "()", " }}"),
        ("{{ x", "+x", " }}"),
        ("{{ x", "~x", " }}"),
        ("{{ 1", "**1", " }}"),
        ("{{ 1", " and 1", " }}"),
        ("{{ ", "1 if 1 else ", "1 }}"),
    ] {
        refused(begin, link, end, 15_000);
        let error = refused(begin, link, end, 20_000).unwrap();
        assert!(error.contains("line 1: a tag is longer"), "{link}: {error}");
    }
    refused("{% if 0 %}", "{% elif 0 %}", "{% endif %}", 250_000);
    assert!(refused("", "{% if 1 %}", "", 250_000).unwrap().contains("recursion limits"));
}

#[test]
fn a_template_that_the_engine_panics_on_is_an_error() {
    assert!(refusal("{% for x in [1] %}{{ loop.cycle() }}{% endfor %}").contains("engine fails"));
}

#[test]
fn an_overlong_template_is_refused_before_it_is_read() {
    assert!(refusal(&"x".repeat(10_000_000)).contains("262144 bytes"));
    assert!(render(&"x".repeat(SOURCE_LIMIT)).is_ok());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("chat_template.jinja");
    std::fs::write(&path, " ".repeat(10_000_000)).unwrap();
    assert_eq!(read(&path).unwrap().unwrap().len(), SOURCE_LIMIT + 1);
    std::fs::write(&path, "é".repeat(SOURCE_LIMIT)).unwrap();
    assert!(read(&path).unwrap().unwrap().len() > SOURCE_LIMIT);
    std::fs::write(&path, [0xff]).unwrap();
    assert!(read(&path).unwrap_err().to_string().contains("not text"));
    assert!(read(&folder.path().join("no.jinja")).unwrap().is_none());
}

#[test]
fn a_syntax_error_names_its_line() {
    for source in ["\n{% for %}", "\n{{ 'a }}", "\n{% unknown %}", "\n{{ 1 + }}", "\n{% endif %}"] {
        assert!(refusal(source).contains("line 2"), "{source}: {}", refusal(source));
    }
}

#[test]
fn json_is_written_as_python_writes_it() {
    let value = "{'b': [1, {}, 1e-7, 2.0], 'a': 'é😀\x7f\n'}";
    let dumped = |keywords: &str| render(&format!("{{{{ {value} | tojson({keywords}) }}}}")).unwrap();
    assert_eq!(dumped(""), "{\"b\": [1, {}, 1e-07, 2.0], \"a\": \"é😀\u{7f}\\n\"}");
    assert_eq!(
        dumped("ensure_ascii=true, sort_keys=true"),
        r#"{"a": "\u00e9\ud83d\ude00\u007f\n", "b": [1, {}, 1e-07, 2.0]}"#
    );
    assert_eq!(dumped("separators=(',', ':')"), "{\"b\":[1,{},1e-07,2.0],\"a\":\"é😀\u{7f}\\n\"}");
    assert_eq!(
        dumped("indent=1, ensure_ascii=True"),
        "{\n \"b\": [\n  1,\n  {},\n  1e-07,\n  2.0\n ],\n \"a\": \"\\u00e9\\ud83d\\ude00\\u007f\\n\"\n}"
    );
}

#[test]
fn text_is_indented_as_jinja_indents_it() {
    let shown = render(
        "{{ '{\\n' | indent(4, first=true) }}|{{ 'a\\n\\nb\\r\\nc' | indent(2) }}|{{ 'a\\n\\nb' | indent(width='>', blank=true) }}|\
         {{ '' | indent }}",
    );
    assert_eq!(shown.unwrap(), "    {\n|a\n\n  b\n  c|a\n>\n>b|");
}

#[test]
fn floats_are_written_as_python_writes_them() {
    let shown = render(
        "{{ 1e-5 }} {{ 1e16 }} {{ 0.0001 }} {{ 1e15 }} {{ [1e-7, 'q'] }} {{ {'a': (1e22,)} }} {{ 1e-7 | string }}",
    );
    assert_eq!(shown.unwrap(), "1e-05 1e+16 0.0001 1000000000000000.0 [1e-07, 'q'] {'a': (1e+22,)} 1e-07");
}

#[test]
fn reasoning_is_read_under_every_name_that_clients_give_it() {
    let template =
        ChatTemplate::new("{{ messages[0].reasoning_content }}|{{ messages[0].thinking }}", "", "").unwrap();
    for name in REASONING {
        let message = json!({"role": "assistant", "content": "", name: "hm"}).as_object().unwrap().clone();
        assert_eq!(template.render(&[message], &[], false).unwrap(), "hm|hm", "{name}");
    }
    assert_eq!(template.render(&user("Hi"), &[], false).unwrap(), "|");
}

#[test]
fn the_date_is_formatted_and_generation_marks_vanish() {
    assert_eq!(render("{{ strftime_now('%Y') }}").unwrap().len(), 4);
    assert!(render("{{ strftime_now('%!') }}").is_err());
    let then = "2026-02-03T04:05:06[UTC]".parse().unwrap();
    let template = ChatTemplate::new("{{ strftime_now('%d %b %Y, %-d %B') }}", "", "").unwrap().at(then);
    assert_eq!(template.render(&user("Hi"), &[], true).unwrap(), "03 Feb 2026, 3 February");
    assert_eq!(render("a {%- generation %} b {% endgeneration %} c").unwrap(), "a b  c");
}

#[test]
fn chatml_stands_in_for_a_missing_template_and_says_so() {
    let template = ChatTemplate::chatml("", "<|im_end|>").unwrap();
    assert!(template.is_default());
    let rendered = template.render(&user("Hi"), &[], true).unwrap();
    assert_eq!(rendered, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
}

#[test]
fn the_real_model_brings_its_own_template() {
    let file = GgufFile::open(crate::test_model()).unwrap();
    let template = ChatTemplate::from_gguf(&file, &Tokenizer::from_gguf(&file).unwrap()).unwrap();
    assert!(!template.is_default() && template.source().contains("SmolLM"));
}

#[test]
fn of_several_named_templates_the_one_for_tools_is_taken_where_there_are_tools() {
    let named = json!([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]);
    let tokenizer = Tokenizer::from_gguf(&GgufFile::open(crate::test_model()).unwrap()).unwrap();
    let template = ChatTemplate::or_chatml(&Sources::from_json(&named), &tokenizer).unwrap();
    assert_eq!(template.render(&user("Hi"), &[], true).unwrap(), "d");
    assert_eq!(template.render(&user("Hi"), &[json!({"type": "function"})], true).unwrap(), "t");
    let single = ChatTemplate::or_chatml(&Sources::from_json(&json!("s")), &tokenizer).unwrap();
    assert_eq!(single.render(&user("Hi"), &[json!({})], true).unwrap(), "s");
}
