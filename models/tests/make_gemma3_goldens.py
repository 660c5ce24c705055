"""Writes gemma3_goldens.json: what llama.cpp answers greedily on the real Gemma 3 270M file, with log-probabilities; then, for
the same tokens, the log-probabilities that `transformers` computes in f32 from the same file.

`answers` needs xllamacpp, `exact` torch, transformers, accelerate and gguf (PyPI).
Usage: make_gemma3_goldens.py answers|exact MODEL.gguf GOLDENS.json
"""
import json
import pathlib
import sys
import urllib.request

LICENCE = (pathlib.Path(__file__).parents[2] / "LICENSE").read_text()
# The last one is longer than the sliding window of 512 tokens.
PROMPTS = ["The capital of France is", "1, 2, 3, 4, 5,", "def fibonacci(n):\n    ", "Die Katze sitzt auf dem", "こんにちは、", LICENCE[:4000]]
STEPS = 32


def answers(model, output):
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.n_ctx = 2048
    parameters.n_parallel = 1
    parameters.port = 18097
    parameters.warmup = False
    server = xllamacpp.Server(parameters)

    def post(path, body):
        request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request))

    goldens = []
    for text in PROMPTS:
        ids = post("/tokenize", {"content": text, "add_special": True, "parse_special": False})["tokens"]
        answer = post("/completion", {"prompt": ids, "n_predict": STEPS, "temperature": 0, "n_probs": 2, "cache_prompt": False,
                                      "ignore_eos": True})
        steps = [{"id": step["id"], "logprob": round(step["logprob"], 4),
                  "margin": round(step["top_logprobs"][0]["logprob"] - step["top_logprobs"][1]["logprob"], 4)}
                 for step in answer["completion_probabilities"]]
        goldens.append({"text": text, "ids": ids, "steps": steps})
    write(goldens, output)


def exact(model, output):
    import torch
    from transformers import AutoModelForCausalLM

    path = pathlib.Path(model)
    decoder = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32,
                                                   attn_implementation="eager")
    goldens = json.loads(pathlib.Path(output).read_text())
    for golden in goldens:
        ids = golden["ids"] + [step["id"] for step in golden["steps"]]
        with torch.no_grad():
            logprobs = decoder(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
        for step, row in zip(golden["steps"], logprobs[len(golden["ids"]) - 1:]):
            step["exact"] = round(float(row[step["id"]]), 4)
    write(goldens, output)


def write(goldens, output):
    lines = [json.dumps(golden, ensure_ascii=False, separators=(",", ":")) for golden in goldens]
    pathlib.Path(output).write_text("[\n" + ",\n".join(lines) + "\n]\n")


{"answers": answers, "exact": exact}[sys.argv[1]](*sys.argv[2:])
