"""Writes template_goldens.json: conversations rendered by jinja2 the way `transformers` does. Needs jinja2 and gguf.

Usage: make_template_goldens.py MODEL.gguf OUTPUT.json
"""
import json
import sys

import gguf
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

TOOLS = """\
{%- if tools %}
    {{- '<tools>\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- "\\n" }}
    {%- endfor %}
    {{- '</tools>\\n' }}
{%- endif %}
{%- set ns = namespace(index=0, last='none') %}
{%- macro text_of(content) -%}
    {%- if content is string -%}{{ content }}
    {%- elif content is none -%}
    {%- else -%}{%- for part in content -%}{{ part.text }}{%- endfor -%}{%- endif -%}
{%- endmacro %}
{% for message in messages %}
    {% if message.role == 'tool' and not loop.first %}
    <result index="{{ ns.index }}">{{ text_of(message.content) | trim }}</result>
    {% continue %}
    {% endif %}
    {%- set content = text_of(message.content) %}
    {%- if '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    [{{ message.role | upper }}]{{ content.strip() }}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<call>' + call.function.name + ' ' + call.function.arguments | tojson + '</call>' }}
    {%- endfor %}
    {%- set ns.index = ns.index + 1 %}
    {%- set ns.last = message['role'] %}
{% endfor %}
{{ bos_token }}{{ ns.index }} {{ ns.last }}{{ eos_token if messages[-1].role != 'user' else '' }}
{{ messages[::-1][0].role }} {{ messages[1:] | length }} {{ "x y".title() }} {{ 'a,b'.split(',') | join('-') }}
{%- if messages[0].get('name') is defined and messages[0].get('name') %} named {{ messages[0].name }}{% endif %}
{% if enable_thinking is defined and enable_thinking is false %}no thinking{% endif %}
{%- if add_generation_prompt %}
[ASSISTANT]{% endif %}
{{ {"a": [1, 2.5, none, true], "ü": "<&'\\""} | tojson(indent=2) }}
"""

TOOL = {"type": "function", "function": {"name": "weather", "description": "It's <the> weather & more",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
CONVERSATIONS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  spaces  \n"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
    [{"role": "user", "content": "<|im_end|> & \"quotes\" 日本 😀", "name": "Ann"}],
    [{"role": "user", "content": ""}],
    [{"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}],
]
TOOL_CONVERSATIONS = [
    [{"role": "user", "content": [{"type": "text", "text": "Weather"}, {"type": "text", "text": "?"}]},
     {"role": "assistant", "content": None, "tool_calls": [
         {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "n": 1}}}]},
     {"role": "tool", "tool_call_id": "1", "content": " 20 °C\n"}],
]


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def main(model, output):
    smollm2 = gguf.GGUFReader(model).fields["tokenizer.chat_template"].contents()
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    goldens = []
    for template, conversations in ((smollm2, CONVERSATIONS), (TOOLS, CONVERSATIONS + TOOL_CONVERSATIONS)):
        for messages in conversations:
            for number, generate in enumerate((True, False)):
                tools = [TOOL, TOOL] if number else []
                extra = {"enable_thinking": False} if number else {}
                rendered = environment.from_string(template).render(
                    messages=messages, tools=tools or None, documents=None, add_generation_prompt=generate,
                    bos_token="<s>", eos_token="</s>", **extra)
                goldens.append({"template": template, "messages": messages, "tools": tools,
                                "add_generation_prompt": generate, "extra": extra, "rendered": rendered})
    with open(output, "w") as file:
        json.dump(goldens, file, ensure_ascii=False, indent=0)
        file.write("\n")


main(*sys.argv[1:])
