"""Writes split_goldens.json: how `tokenizers` cuts varied texts into words by the expressions that published tokenizer.json
files name, look-ahead included. Pieces are given by their lengths in characters.

Needs tokenizers (PyPI). Usage: make_split_goldens.py OUTPUT.json
"""
import json
import pathlib
import random
import sys

from tokenizers import Regex, pre_tokenizers

END = r"\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|" + END)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORDS = [rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"]
REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|" + END
CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
EXPRESSIONS = {
    "llama-bpe": LLAMA3,
    "qwen2": LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),
    "tekken": "|".join([*WORDS, r"\p{N}", REST]),
    "gpt-4o": "|".join([word + CONTRACTION for word in WORDS] + [r"\p{N}{1,3}", REST]),
}


def split(expression):
    return pre_tokenizers.Split(Regex(expression), behavior="isolated")


# GPT-2's own expression is built into the library.
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
RULES = {name: split(expression) for name, expression in EXPRESSIONS.items()} | {
    "gpt-2": GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
}
HAND = [
    " ", "   ", "\n\n", "\n \n", " \n", "\t\t x", "\r\n", "a\r\n\r\nb", "x  ", "  x", "\u00a0x\u00a0", "\u3000日本", "Hello, world!",
    "It's they're I'M we'Ll don't 'sup it''s 's's", "3.14159 1234567890 1,000,000", "x²+y³=½", "٣٤٥ ४५६ Ⅷ", "日本語のテキスト123",
    "Привет, мир!", "مرحبا بالعالم", "हिन्दी में पाठ", "naïve café e\u0301 a\u0308", "😀 👩‍👩‍👧‍👦 family 🇩🇪", "\u200b\u200czero\u200dwidth\ufeff",
    "\x00\x01\x7f", "\u0085next \u2028 line", "ﬁ ligature ǅ ʰ", "def f(x):\n    return x  # comment\n", "for (int i = 0;\n\ti < n; ++i) {\n\t}\n\n",
    "https://example.com/a?b=c&d=%20#e //x///\n\n/y", "C:\\Windows\\System32", "camelCase PascalCase HTTPServer iPhone XMLHttpRequest2",
    "snake_case __init__ kebab-case", "!?!?...---***\n\n\nx", "mixed \t \n \r\n end \n", "a  \n  b   \n\n   c", "ſ K \u0130",
]
ALPHABETS = ["abc ABC.,'sS", "0123456789 .,-+e", " \t\n\r\u00a0\u3000x", "日本한 。、\u0301a", "(){}[]|;:=+-*/\nx_ ", "'streRElvmDd \n2", "aB/\n \u0308Z'"]


def texts():
    generator = random.Random(12)
    yield from HAND
    for number in range(140):
        alphabet = ALPHABETS[number % len(ALPHABETS)]
        yield "".join(generator.choice(alphabet) for _ in range(generator.randint(2, 40)))


def lengths(rule, text):
    return [end - start for _, (start, end) in rule.pre_tokenize_str(text)]


lines = [json.dumps({"text": text, "lengths": {name: lengths(rule, text) for name, rule in RULES.items()}},
                    ensure_ascii=False, separators=(",", ":")) for text in texts()]
pathlib.Path(sys.argv[1]).write_text("[\n" + ",\n".join(lines) + "\n]\n")
