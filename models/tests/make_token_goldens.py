"""Writes smollm2_token_goldens.json or gemma3_token_goldens.json: token ids that llama.cpp gives for varied texts. Needs
xllamacpp (PyPI).

Usage: make_token_goldens.py MODEL.gguf OUTPUT.json
"""
import json
import random
import sys
import urllib.request

import xllamacpp

HAND = [
    "", " ", "  ", "   ", "\n", "\n\n", "\n \n", " \n", "\t", "\t\t x", "\r\n", "a\r\n\r\nb", "x  ", "  x", "\u00a0x\u00a0",
    "\u3000日本", "Hello, world!", "hello world", "HELLO WORLD", "It's they're I'M we'Ll don't 'sup", "3.14159", "1234567890",
    "2024-11-21T03:26:13Z", "1,000,000", "x²+y³=½", "٣٤٥ ४५६ Ⅷ", "日本語のテキスト", "中文分词测试，没有空格。", "한국어 문장입니다",
    "Привет, мир!", "Ελληνικά", "مرحبا بالعالم", "שלום עולם", "हिन्दी में पाठ", "ไทยไม่มีช่องว่าง", "naïve café Zoë", "e\u0301 a\u0308 n\u0303",
    "😀", "👩‍👩‍👧‍👦 family", "🇩🇪🇫🇷", "👍🏽", "a😀b", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "\u200b\u200czero\u200dwidth\ufeff", "\x00\x01\x7f", "\u0085next", "ﬁ ligature",
    "def f(x):\n    return x  # comment\n", "for (int i = 0; i < n; ++i) {\n\tsum += a[i];\n}\n", "SELECT * FROM t WHERE a='b';",
    "<html><body class=\"x\">&nbsp;</body></html>", "{\"key\": [1, 2.5, null, true], \"k\": \"v\\n\"}", "https://example.com/a?b=c&d=%20#e",
    "user@example.org", "C:\\Windows\\System32", "/usr/local/bin", "snake_case camelCase PascalCase kebab-case", "__init__", "a" * 200, " " * 100,
    "\n" * 50, "=" * 80, "ab " * 60, "!?!?...---***", "$100 €50 £20 ¥1000", "#hashtag @mention", "`code` **bold** _it_", "| a | b |\n|---|---|\n",
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "x<|im_end|>y", " <|im_end|> ", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_start|>", "<|im_end", "|im_end|>", "<|im_<|im_end|>end|>", "<repo_name>x<file_sep>y", "<jupyter_start>", "<empty_output>",
    "<|IM_END|>", "<s></s>", "[INST] hi [/INST]", "<unk>", "it''s", "'s's's", " 's", "a 's", "0x1F", "1e-9", "v1.2.3-rc4", "αβγ123", "x1y2z3", "١", "mixed \t \n \r\n end ",
]
ALPHABETS = [
    "abcdefgh ABC.,'", "0123456789 .,-+e", " \t\n\r\u00a0\u3000x", "日本語中文한국 。、", "😀👍🏽\u200d👩🇩🇪 a", "абвгд ΑΒΓ éèñ", "(){}[]<>|;:=+-*/&^%$#@! \nx_",
    "<|im_end|>start ", "हिन्दी ไทย עבר عرب", "'stredlvm \n2",
]


def texts():
    generator = random.Random(11)
    yield from HAND
    for number in range(250):
        alphabet = ALPHABETS[number % len(ALPHABETS)]
        yield "".join(generator.choice(alphabet) for _ in range(generator.randint(1, 32)))


def main(model, output):
    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.n_ctx = 256
    parameters.port = 18098
    parameters.warmup = False
    server = xllamacpp.Server(parameters)

    def tokenize(text, parse):
        body = json.dumps({"content": text, "add_special": False, "parse_special": parse}).encode()
        request = urllib.request.Request(server.listening_address + "/tokenize", body, {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request))["tokens"]

    lines = [json.dumps({"text": text, "literal": tokenize(text, False), "parsed": tokenize(text, True)},
                        separators=(",", ":")) for text in texts()]
    with open(output, "w") as file:
        file.write("[\n" + ",\n".join(lines) + "\n]\n")


main(*sys.argv[1:])
