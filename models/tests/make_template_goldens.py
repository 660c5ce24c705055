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

# One construct each that templates of published models use, on the conversation with tools.
CONSTRUCTS = [
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ messages | rejectattr('role', 'equalto', 'tool') | list | length }}",
    "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}{% for m in messages %}{{ m == users[-1] }} {% endfor %}",
    "{% for m in messages %}{{ m.content is string }} {{ m.content is iterable }} {{ m.content is mapping }} {{ m.content is none }} {% endfor %}",
    "{{ messages[-1].content is iterable }} {{ 'abc' is iterable }} {{ 3 is iterable }} {{ tools is sequence }} {{ 'x' is sequence }}",
    "{{ none is iterable }} {{ none is sequence }} {{ nothing is iterable }} {{ {} is iterable }} {{ {} is sequence }} {{ 1 is sequence }} {{ 'x' is iterable }}",
    "{% for key, value in tools[0].function.items() if key != 'return' %}{{ key }}={{ value | tojson if value is not string else value }};{% endfor %}",
    "{% for key, value in tools[0].function | items %}{{ loop.index }}{{ key }}{{ ',' if not loop.last }}{% endfor %}",
    "{% for key, value in tools[0].function.parameters.properties | dictsort %}{{ key }}{% endfor %} {{ tools[0].function.parameters.keys() | list }}",
    "{% set out = tools[0] | tojson %}{{ out[:-1] }}, \"id\": 1}} {{ out[1:9] }} {{ 'hello'[::-1] }}",
    "{{ messages[-1]['content'] | trim }}|{{ '  x '.strip() }}|{{ 'xxay'.lstrip('x') }}|{{ 'a\n\n'.rstrip('\n') }}|{{ 'xaxx'.strip('x') }}",
    "{{ '<think>r</think>a'.split('</think>')[0].split('<think>')[-1] }} {{ 'a b c'.split(' ', 1) | last }} {{ 'a  b'.split() | join('+') }}",
    "{{ 'abc'.startswith('ab') }} {{ 'abc'.endswith('bc') }} {{ 'b' in 'abc' }} {{ 'role' in messages[0] }} {{ 'x' not in messages[0] }}",
    "{{ 'aXbX' | replace('X', '-') }} {{ 'aXbX'.replace('X', '-', 1) }} {{ 'abc' | upper }} {{ 'ABC'.lower() }} {{ 'a b' | title }} {{ 'abc'.capitalize() }}",
    "{{ 'Today ' ~ 3 ~ ' of ' ~ messages | length }} {{ 7 // 2 }} {{ 7 % 4 }} {{ 2 ** 3 }} {{ -7 // 2 }} {{ 7 / 2 }}",
    "{% for m in messages %}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.previtem.role if loop.previtem is defined }}{{ loop.nextitem.role if not loop.last }} {% endfor %}",
    "{% set ns = namespace(found=false) %}{% for m in messages | reverse %}{% if m.role == 'tool' and not ns.found %}{% set ns.found = true %}{{ loop.index0 }}{% endif %}{% endfor %}{{ ns.found }}",
    "{% macro show(x, prefix='- ') %}{{ prefix ~ x }}\n{% endmacro %}{{ show('a') }}{{ show('b', prefix='* ') }}{% for m in messages %}{{ show(m.role) }}{% endfor %}",
    "{% set x %}block {{ messages | length }}{% endset %}[{{ x }}]{% set a, b = 1, 2 %}{{ a + b }}",
    "{% if tools is defined and tools %}yes{% endif %}{% if nothing is not defined %}no{% endif %}{{ nothing | default('d') }}{{ none | default('e', true) }}{{ nothing.x if nothing }}",
    "{{ messages[1].tool_calls[0].function.arguments | tojson }} {{ messages[1].tool_calls[0]['function']['name'] }} {{ messages[1].get('x', 'y') }} {{ messages[1].get('x') }}",
    "{{ messages | map(attribute='role') | join(', ') }} {{ messages | map(attribute='role') | unique | list | tojson }} {{ [3, 1, 2] | sort | tojson }} {{ [1, 2] | sum }}",
    "{{ tools | tojson(indent=4) }}|{{ {'b': 1, 'a': [true, none, 1.5, 'é\"']} | tojson }}|{{ [] | tojson(indent=2) }}{{ {} | tojson(indent=2) }}",
    "{{ 'a' if false else 'b' }} {{ ('x', 'y') | list | tojson }} {{ [1, 2] + [3] }} {{ {'a': 1} }} {{ true }} {{ none }} {{ 1.0 }} {{ 'q' | string }}",
    "{{ '%s is %d' | format('x', 3) }} {{ 'abc' | first }} {{ [1, 2, 3] | last }} {{ range(3) | list }} {{ '5' | int + 1 }} {{ 'a,b' | length }}",
    "{%- for m in messages -%}\n  {%- if m.role == 'system' %}\n s\n  {%- elif m.role == 'user' -%}\n u\n  {%- else -%}\n {# a note #}x\n  {%- endif %}\n{%- endfor %}\n end",
    "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.role }}{% else %}none{% endfor %}",
    "{{ messages[0].content[0].type }} {{ messages[0]['content'][0]['text'] | length }} {% for part in messages[0].content if part.type == 'text' %}{{ part.text }}{% endfor %}",
    "{{ not messages[1].content }} {{ messages[1].content or 'empty' }} {{ messages[1].content == none }} {{ (messages[1].tool_calls or []) | length }} {{ 1 if '' else 0 }}",
    "{{ tools[0].function.parameters.required | join(' ') }} {{ 'city' in tools[0].function.parameters.required }} {{ tools[0].function.description | safe | e if false else 'raw' }}",
    "{%- set roles = ['a', 'b'] -%}{%- for r in roles -%}{{ loop.cycle('odd', 'even') }} {% endfor %}{{ loop is defined }}",
    "{% filter upper %}up {{ 'x' }}{% endfilter %} {% raw %}{{ raw }}{% endraw %} {% with y = 2 %}{{ y }}{% endwith %} {{ 'it\\'s' }} {{ \"tab\\t\" }}",
]

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
    for template in CONSTRUCTS:
        messages = TOOL_CONVERSATIONS[0]
        rendered = environment.from_string(template).render(
            messages=messages, tools=[TOOL], documents=None, add_generation_prompt=True, bos_token="<s>", eos_token="</s>")
        goldens.append({"template": template, "messages": messages, "tools": [TOOL], "add_generation_prompt": True,
                        "extra": {}, "rendered": rendered})
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
