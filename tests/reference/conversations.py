"""Conversations that chat templates are rendered with. Shapes are those of the Chat Completions API, but that the arguments of
tool calls are objects, as templates expect them."""

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "It's the weather of a <city> & its surroundings",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Name of the city, e.g. Zürich"},
                "days": {"type": "integer", "description": "How many days", "default": 1, "minimum": 1},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "description": "Of the temperature"},
            },
            "required": ["city"],
        },
    },
}
ROUTE = {
    "type": "function",
    "function": {
        "name": "find_route",
        "description": 'Finds a route.\nBoth ends are "places".',
        "parameters": {
            "type": "object",
            "properties": {
                "stops": {"type": "array", "items": {"type": "string"}, "description": "In their order"},
                "options": {
                    "type": "object",
                    "description": "",
                    "properties": {"avoid_tolls": {"type": "boolean"}, "speed": {"type": ["number", "null"]}},
                    "required": [],
                },
            },
            "required": ["stops", "options"],
        },
        "strict": True,
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time", "parameters": {"type": "object", "properties": {}}}}
# None, such as every template knows how to write, and such as JSON schema allows.
TOOLS = [[], [WEATHER, CLOCK], [WEATHER, ROUTE, CLOCK]]


def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(number, name, **arguments):
    return {"id": f"call0000{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def result(number, name, content):
    return {"role": "tool", "tool_call_id": f"call0000{number}", "name": name, "content": content}


def text(words):
    return {"type": "text", "text": words}


LONDON = call(1, "get_weather", city="London")
ZURICH = call(2, "get_weather", city='Zürich "ZH"', days=3, unit="celsius")
TOUR = call(3, "find_route", stops=["a", "b"], options={"avoid_tolls": True, "speed": 1e-7, "via": None, "length": 12.5})

CONVERSATIONS = {
    "one message": [user("Hello, who are you?")],
    "a system message": [system("Answer in rhymes."), user("What is rain?")],
    "several turns": [user("a"), assistant("b"), user("c"), assistant("d"), user("e")],
    "several turns with a system message": [system("Be brief."), user("Hi"), assistant("Hello!"), user("Bye")],
    "an answer at the end": [user("Say yes."), assistant("yes")],
    "white space": [system("  indented\n"), user("\n\n x \t\n"), assistant("  y  "), user(" ")],
    "other alphabets": [system("日本語で。"), user("naïve café 😀 👩‍👩‍👧 \u00a0 e\u0301 <b>&amp;</b> 'q' \"r\" \\n {{ x }} {% y %}")],
    "content in parts": [user([text("What is "), text("this?")]), assistant([text("A list.")]), user([text("Oh")])],
    "an empty answer": [user("Hi"), assistant(""), user("Anybody there?")],
    "no content": [user("Hi"), assistant(None), user("Anybody there?")],
    "a call and its result": [
        user("Weather in London?"), assistant("", tool_calls=[LONDON]), result(1, "get_weather", '{"temperature": 11}'),
    ],
    "a call, its result, an answer": [
        system("Use tools."), user("Weather in London?"), assistant(None, tool_calls=[LONDON]),
        result(1, "get_weather", "11 °C"), assistant("It has 11 °C."), user("Thank you."),
    ],
    "several calls at once": [
        user("Weather in both?"), assistant("I ask.", tool_calls=[LONDON, ZURICH]), result(1, "get_weather", "11"),
        result(2, "get_weather", "7\n"), assistant("11 and 7."), user("And a tour?"), assistant("", tool_calls=[TOUR]),
        result(3, "find_route", [text("left, "), text("right")]),
    ],
    "calls one after the other": [
        user("First this, then that."), assistant("", tool_calls=[LONDON]), result(1, "get_weather", "11"),
        assistant("", tool_calls=[TOUR]), result(3, "find_route", ""), assistant("Done."),
    ],
    "a call without arguments": [user("Time?"), assistant("", tool_calls=[call(4, "clock")]), result(4, "clock", "noon")],
    "reasoning": [
        user("17 + 25?"), assistant("42", reasoning_content="7 + 5 is 12, carry 1.\n"), user("Twice that?"),
    ],
    "reasoning before a call": [
        user("Weather?"), assistant("", reasoning_content="They want London.", tool_calls=[LONDON]),
        result(1, "get_weather", "11"), assistant("11", reasoning_content="Simple."),
    ],
    "reasoning within the text": [user("Hm?"), assistant("<think>\nhm\n</think>\n\nHm!"), user("Hm."), assistant("<think>a</think>b")],
    "two user messages in a row": [user("a"), user("b")],
    "an assistant message first": [assistant("a"), user("b")],
    "a system message in the middle": [user("a"), assistant("b"), system("c"), user("d")],
    "a developer message": [{"role": "developer", "content": "Be brief."}, user("Hi")],
    "an unknown role": [user("a"), {"role": "narrator", "content": "b"}],
    "arguments as text": [
        user("Weather?"), assistant("", tool_calls=[LONDON | {"function": {"name": "get_weather", "arguments": '{"city": "Bonn"}'}}]),
        result(1, "get_weather", "11"),
    ],
}  # fmt: skip
