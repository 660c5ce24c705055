"""Published models' own chat templates, rendered by `transformers` and by the code that the server renders them with.

The conversations are in conversations.py; the templates are fetched by scripts/fetch_templates.
"""

import datetime
import html
import json
import os
import subprocess
from pathlib import Path

import pytest
from conversations import CONVERSATIONS, TOOLS

# Nothing here needs a model or the network.
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"
from jinja2 import TemplateError
from transformers.utils import chat_template_utils

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = sorted((ROOT / "models/weights/templates").glob("*.jinja"))
BINARY = Path(os.environ.get("DORMOUSE_TEST_BINARY", ROOT / "target/debug/dormouse"))
RENDER = BINARY.parent / "examples/render_chat"

SPECIAL = {"bos": "<s>", "eos": "</s>"}
# All numbers have one digit, to see how each is padded.
NOW = datetime.datetime(2026, 2, 3, 4, 5, 6)
# What clients say in `chat_template_kwargs`.
EXTRAS = [
    {},
    {"enable_thinking": True, "functions": "[]", "datetime": "noon", "builtin_tools": ["web_search"], "tools_in_user_message": False},
    {"enable_thinking": False, "reasoning_effort": "low", "thinking": True, "preserve_thinking": True},
]

# Where Python gives up on a loop over None or on a generator as JSON, we go on as with an empty list or a list: such a template
# serves conversations without tools, or messages without content, where transformers serves none.
LENIENT = ["'NoneType' object is not iterable", "Object of type generator is not JSON serializable"]
# Its `"…" | safe + description` is markup to Python, which escapes what is added to it. Our engine adds texts as they are.
ESCAPES = {"meetkai-functionary-medium-v3.1"}


class StoppedClock(datetime.datetime):
    @classmethod
    def now(cls, *_):
        return NOW


def cases():
    """`(name, request)` of every rendering of one template."""
    for name, messages in CONVERSATIONS.items():
        for tools in TOOLS:
            for generate in (True, False):
                for extra in EXTRAS if generate else EXTRAS[:1]:
                    label = f"{name}, {len(tools)} tools, {'with' if generate else 'without'} generation prompt, {extra}"
                    yield label, {"messages": messages, "tools": tools, "add_generation_prompt": generate, "extra": extra}


def theirs(template, request):
    """The text, or the error as an exception."""
    special = {f"{name}_token": text for name, text in SPECIAL.items()}
    conversation, tools, generate = [request["messages"]], request["tools"] or None, request["add_generation_prompt"]
    try:
        texts, _ = chat_template_utils.render_jinja_template(
            conversation, tools, chat_template=template, add_generation_prompt=generate, **special, **request["extra"]
        )
        return texts[0]
    except Exception as error:  # a template can make Python raise anything
        return error


def ours(template, requests):
    """For each request `{"text": …}` or `{"error": …}`."""
    assert RENDER.exists(), f"no program at {RENDER}: run cargo build --package dormouse-models --examples"
    common = {"template": template, "now": NOW.isoformat() + "[UTC]", **SPECIAL}
    lines = "".join(json.dumps(common | request) + "\n" for request in requests)
    run = subprocess.run([RENDER], input=lines, stdout=subprocess.PIPE, text=True, check=True, timeout=120)
    return [json.loads(line) for line in run.stdout.split("\n")[:-1]]


def difference(expected, answer):
    """What is wrong with our answer, in words; None where it is right."""
    if not isinstance(expected, Exception):
        text = answer.get("text", "")
        same = len(os.path.commonprefix([text, expected]))
        near = f"...{expected[max(0, same - 40) : same + 40]!r}, and we ...{text[max(0, same - 40) : same + 40]!r}"
        return None if text == expected else f"transformers renders {near}{answer.get('error', '')}"
    if str(expected) in LENIENT:
        return None
    if "error" not in answer:
        return f"transformers raises {expected!r}, and we render\n{answer['text']!r}"
    # The words of raise_exception are the template's own.
    if type(expected) is TemplateError and str(expected) not in answer["error"]:
        return f"transformers raises {expected!r}, and we {answer['error']!r}"
    return None


def test_templates_are_there():
    assert len(TEMPLATES) >= 60, f"{len(TEMPLATES)} templates in models/weights/templates: run scripts/fetch_templates"


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_published_template_renders_as_transformers_renders_it(path, monkeypatch):
    monkeypatch.setattr(chat_template_utils, "datetime", StoppedClock)
    template = path.read_text()
    named = list(cases())
    answers = ours(template, [request for _, request in named])
    assert len(answers) == len(named)
    wrong, rendered = [], 0
    for (name, request), answer in zip(named, answers):
        expected = theirs(template, request)
        if path.stem in ESCAPES and isinstance(expected, str):
            expected, answer = html.unescape(expected), {key: html.unescape(text) for key, text in answer.items()}
        rendered += isinstance(expected, str)
        if problem := difference(expected, answer):
            wrong.append(f"{name}: {problem}")
    assert rendered, "every conversation is refused: nothing was compared"
    assert not wrong, f"{len(wrong)} of {len(named)} differ; the first: {wrong[0]}"
