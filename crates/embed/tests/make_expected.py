#!/usr/bin/env python3
"""Writes expected.json: vectors of all-MiniLM-L6-v2 as sentence-transformers computes them.

    pip install sentence-transformers==6.2.0 && scripts/fetch_weights && crates/embed/tests/make_expected.py

Vectors are base64 of little-endian f32. `poolings` are those of the same encoder pooled in other ways, without scaling.
"""
import base64
import json
import pathlib

import numpy
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

HERE = pathlib.Path(__file__).resolve().parent
MODEL = HERE.parents[2] / "models/weights/all-MiniLM-L6-v2"
TEXTS = [
    "The dormouse sleeps for more than half of the year.",
    "A hazel dormouse hibernates from October to April.",
    "Quarterly revenue rose by 4.2 %, beating analysts' estimates!",
    "a",
    " ",
    "Ünïcödé, 日本語の文章, \U0001f42d\u200b and\ttabs\nand line breaks",
    "[CLS] special [SEP] tokens [MASK] in the text",
    "pneumonoultramicroscopicsilicovolcanoconiosis " + "x" * 150,
    "fn main() { println!(\"{:?}\", std::env::args().collect::<Vec<_>>()); }",
    "Winter came early that year, and nobody in the valley was ready for it. " * 12,
]
POOLED = TEXTS[:1] + TEXTS[5:6]
POOLINGS = ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", ["cls", "max"]]


def vectors(model, texts):
    rows = model.encode(texts, batch_size=4, convert_to_numpy=True).astype("<f4")
    return [base64.b64encode(row.tobytes()).decode() for row in rows]


def main():
    model = SentenceTransformer(str(MODEL), device="cpu")
    limit = model.max_seq_length
    tokens = [len(model.tokenizer(text)["input_ids"]) for text in TEXTS]
    assert max(tokens) <= limit, tokens
    expected = {"texts": TEXTS, "tokens": tokens, "max_tokens": limit, "vectors": vectors(model, TEXTS), "poolings": []}
    width = model.get_embedding_dimension()
    for pooling in POOLINGS:
        pooled = SentenceTransformer(modules=[model[0], Pooling(width, pooling_mode=pooling)], device="cpu")
        expected["poolings"].append({"pooling_mode": pooling, "texts": POOLED, "vectors": vectors(pooled, POOLED)})
    lengths = numpy.linalg.norm(model.encode(TEXTS), axis=1)
    assert numpy.allclose(lengths, 1), lengths
    path = HERE / "expected.json"
    path.write_text(json.dumps(expected, indent=1) + "\n")
    print(f"{path}: tokens {tokens}")


main()
