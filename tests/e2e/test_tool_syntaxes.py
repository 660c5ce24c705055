"""Tools and reasoning under the chat templates of published models: one model speaks, in each family's syntax."""

import subprocess
import sys

import pytest

import harness
from test_tools import TOOLS, check, with_results

TEMPLATES = harness.REPOSITORY / "models/weights/templates"
# As reasoning models' templates do it: the answer begins inside the reasoning.
THINKING = """{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% if enable_thinking is defined and not enable_thinking %}
</think>

{% endif %}{% endif %}"""


@pytest.fixture
def speak(tmp_path, start):
    """A server whose model has another chat template."""

    def speak(template, renamed=()):
        model = tmp_path / "model.gguf"
        code = "from gguf.scripts.gguf_new_metadata import main; main()"
        subprocess.run([sys.executable, "-c", code, "--chat-template", template, str(harness.MODEL), str(model)],
                       check=True, capture_output=True)
        for old, new in renamed:
            contents = model.read_bytes()
            assert contents.count(old) == 1 and len(old) == len(new)
            model.write_bytes(contents.replace(old, new))
        server = start(model=model)
        client = server.openai()

        def ask(messages, **fields):
            fields = {"model": client.models.list().data[0].id, "max_tokens": 150, "temperature": 0, **fields}
            return client.chat.completions.create(messages=messages, **fields)

        return ask

    return speak


@pytest.mark.parametrize("name", [
    "Qwen-Qwen2.5-7B-Instruct", "meta-llama-Llama-3.2-3B-Instruct", "mistralai-Mistral-Nemo-Instruct-2407",
    "Mistral-Small-3.2-24B-Instruct-2506", "google-gemma-2-2b-it",
])
def test_calls_are_written_read_and_answered_in_the_syntax_of(name, speak):
    template = TEMPLATES / f"{name}.jinja"
    assert template.exists(), f"{template} is missing: run scripts/fetch_templates"
    ask = speak(template.read_text())
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    required = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    first = ask(question, **required)
    choice = first.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None, choice
    (call,) = choice.message.tool_calls
    check(call)
    streamed = ask(question, stream=True, **required)
    deltas = [delta for chunk in streamed for choice in chunk.choices for delta in choice.delta.tool_calls or []]
    assert deltas[0].function.name == call.function.name
    assert "".join(delta.function.arguments for delta in deltas) == call.function.arguments
    second = ask(with_results(first, question), tools=TOOLS, tool_choice="none", max_tokens=4)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.total_tokens - 1


def test_a_mark_that_is_a_control_token_is_seen_by_the_reader_and_by_nobody_else(speak):
    ask = speak((TEMPLATES / "Qwen-Qwen2.5-7B-Instruct.jinja").read_text(), [(b"<repo_name>", b"<tool_call>")])
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    first = ask(question, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, logprobs=True)
    (call,) = first.choices[0].message.tool_calls
    check(call)
    assert "<tool_call>" in [entry.token for entry in first.choices[0].logprobs.content]
    second = ask(with_results(first, question), tools=TOOLS, tool_choice="none", max_tokens=4)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.total_tokens - 1
    # Where nobody looks for calls it is a control token as any other, and not in the text.
    plain = ask(question, logit_bias={"3": 100}, max_tokens=3, logprobs=True).choices[0]
    assert [entry.token for entry in plain.logprobs.content] == ["<tool_call>"] * 3
    assert plain.message.content == ""


def test_reasoning_is_told_apart_in_messages_and_streams_and_may_be_dropped(speak):
    ask = speak(THINKING)
    question = [{"role": "user", "content": "What is the sea?"}]
    whole = ask(question, max_tokens=24)
    message = whole.choices[0].message
    assert message.content == "" and message.model_extra["reasoning"] == message.model_extra["reasoning_content"] != ""
    assert whole.usage.completion_tokens_details.reasoning_tokens == whole.usage.completion_tokens
    thought = ""
    for chunk in ask(question, max_tokens=24, stream=True):
        delta = chunk.choices[0].delta
        assert not delta.content
        thought += (delta.model_extra or {}).get("reasoning_content", "")
    assert thought == message.model_extra["reasoning_content"]
    kept = {"role": "assistant", "content": "", "reasoning_content": thought}
    for answer in (kept, {"role": "assistant", "content": ""}):
        follow = ask([*question, answer, {"role": "user", "content": "And a lake?"}], max_tokens=4)
        assert follow.usage.prompt_tokens_details.cached_tokens >= whole.usage.total_tokens - 1
    plain = ask(question, max_tokens=8, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert plain.choices[0].message.content and "reasoning" not in (plain.choices[0].message.model_extra or {})
    assert plain.usage.completion_tokens_details.reasoning_tokens == 0
    assert ask(question, max_tokens=8, reasoning_effort="none").choices[0].message.content
