"""Writes sentencepiece_goldens.json: small vocabularies trained by `sentencepiece`, as Llama's (a space is added in front) and
as Gemma's (none is), and the ids that it gives varied texts. Needs sentencepiece (PyPI).

Usage: make_sentencepiece_goldens.py OUTPUT.json
"""
import io
import json
import pathlib
import random
import sys

import sentencepiece

CORPUS = pathlib.Path(__file__).parents[2] / "docs" / "ARCHITECTURE.md"
HAND = [
    "", " ", "  ", "   a", "a   ", "a", " a", "the engine", "  the  engine  ", "\n", "\n\n a\n", "\t", "a\tb", "é", "日本", "😀 a", "\u00a0", "\u2581", "a\u2581b",
    "<s>", "</s>", "<unk>", "a</s>b", "<0x0A>", "<mark>", "a <mark> b", "<mark><mark>", "tokens, pages; 1234", "\x00", "e\u0301", "ﬁ", "ＡＢ",
]  # fmt: skip


def texts():
    generator = random.Random(5)
    words = CORPUS.read_text().split()
    yield from HAND
    for number in range(150):
        alphabet = ["the page of a token ", "ab <s>/mark0xA ", " \n\t\u00a0é", "日本語😀 page"][number % 4]
        yield "".join(generator.choice(alphabet) for _ in range(generator.randint(1, 30)))
        yield "".join(generator.choice(["", " ", "  "]) + generator.choice(words) for _ in range(5))


def golden(add_space):
    # Where a space is added, llama.cpp and we add one behind every such token too, as transformers did for Llama 2.
    marks = [] if add_space else ["<mark>"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.read_text().splitlines()), model_writer=model, vocab_size=600, model_type="bpe", byte_fallback=True,
        add_dummy_prefix=add_space, remove_extra_whitespaces=False, normalization_rule_name="identity", user_defined_symbols=marks,
        minloglevel=2, num_threads=1,
    )  # fmt: skip
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(len(tokenizer))
    kinds = [
        2 if tokenizer.is_unknown(id) else 3 if tokenizer.is_control(id) else 6 if tokenizer.is_byte(id)
        else 4 if tokenizer.id_to_piece(id) == "<mark>" else 1 for id in ids
    ]  # fmt: skip
    return {
        "add_space": add_space,
        "tokens": [tokenizer.id_to_piece(id) for id in ids],
        "scores": [tokenizer.get_score(id) for id in ids],
        "kinds": kinds,
        "texts": [[text, tokenizer.encode(text)] for text in texts()],
    }


goldens = [golden(add_space) for add_space in (True, False)]
pathlib.Path(sys.argv[1]).write_text(json.dumps(goldens, ensure_ascii=False, separators=(",", ":")) + "\n")
