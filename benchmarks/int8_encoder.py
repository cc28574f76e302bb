"""An encoder of sentences dense, dense + int8, low rank, low rank + int8, as files: size, score and time.

    python benchmarks/int8_encoder.py --model MINILM --data PAIRS --share 0.5 --budget macs
    python benchmarks/int8_encoder.py --model MINILM --data PAIRS --share 0.5 --budget params --test

Model and data are those of `spectrim recipe show minilm-stsb`. A share of the MACs leaves the embeddings as they are,
half of MiniLM's parameters; a share of the parameters is one of all of them. Every file is run by ONNX Runtime on the
pairs of sentences, held-out ones or with `--test` those of the test: the rank correlation in per cent. A seed chooses
the 1024 calibration sentences. Times are of one sentence of `--tokens` tokens, one thread, in interleaved rounds.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import spectrim as st
from spectrim.models.folders import load_pretrained
from spectrim.quantization import Scheme, compare_quantized
from spectrim.recipes.files import find_study
from spectrim.runtimes.engines import load_engine

SCHEMES: tuple[Scheme, ...] = ("int8-weights", "int8-dynamic")


def padded(batch: dict[str, Tensor], *, tokens: int) -> dict[str, Tensor]:
    """Sentences of exactly so many tokens: padding that the mask leaves out, or without their ends."""
    cut = {name: value[:, :tokens] for name, value in batch.items()}
    return {name: torch.nn.functional.pad(value, [0, tokens - value.shape[1]]) for name, value in cut.items()}


class OfFile(nn.Module):
    """Embeddings that ONNX Runtime computes from a file."""

    def __init__(self, path: Path, *, tokens: int) -> None:
        super().__init__()
        self.run, self.tokens = load_engine(path, runtime="onnxruntime", threads=1), tokens

    def forward(self, **batch: Tensor) -> Tensor:
        """(batch, size)."""
        arrays = {name: value.numpy() for name, value in padded(batch, tokens=self.tokens).items()}
        return torch.from_numpy(self.run(arrays)[0])


def main() -> None:
    """Print a line for each file of each seed, then the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--budget", choices=("macs", "params"), default="macs")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seeds", default=(0, 1, 2), type=lambda text: tuple(map(int, text.split(","))))
    parser.add_argument("--test", action="store_true")
    parser.add_argument("--latency", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    study: Any = find_study("minilm-stsb").model_copy(update={"model": options.model})
    source, folder = study.require_folders(options.data)
    network, texts = study.network(load_pretrained(source), source).eval(), study.texts(source, folder)
    pairs = texts.test if options.test else texts.held_out
    rule = study.rule(options.share) if options.budget == "macs" else st.Budget(params=options.share)
    scores: dict[str, list[float]] = {}
    sizes: dict[str, list[int]] = {}
    speeds: dict[str, list[float]] = {}
    for seed in options.seeds:
        data = texts.calibration(study.samples, batch=study.batch, seed=seed)
        small = st.compress(network, rule, example_inputs=data[0], data=data, metric=study.metric).model
        example = padded({name: value[:1] for name, value in data[0].items()}, tokens=options.tokens)
        with tempfile.TemporaryDirectory() as files:
            table = compare_quantized(
                network, small, example, folder=files, schemes=SCHEMES, latency=options.latency and seed == 0
            )
            for row in table.rows:
                score = 100 * st.evaluate(OfFile(row.path, tokens=options.tokens), pairs, "spearman").value
                scores.setdefault(row.name, []).append(score)
                sizes.setdefault(row.name, []).append(row.bytes)
                speeds.setdefault(row.name, []).extend([row.speedup.value] if row.speedup else [])
                print(f"seed {seed}, {row.name}: {row.bytes:,} bytes, {score:.2f}", flush=True)
    report(scores, sizes, speeds)


def report(scores: dict[str, list[float]], sizes: dict[str, list[int]], speeds: dict[str, list[float]]) -> None:
    """Means over seeds: what int8 costs the network that it is done to, and what the ranks save on top of it."""
    heads = ("network", "bytes", "smaller", "than its int8", "Spearman", "sd", "int8 costs", "faster")
    printed = Table(*heads, box=None, pad_edge=False)
    size, score = ({name: statistics.mean(own) for name, own in figures.items()} for figures in (sizes, scores))
    for name, own in scores.items():
        base, _, scheme = name.partition(" + ")
        alone = size[f"dense + {scheme}"] / size[name] if scheme and base != "dense" else None
        printed.add_row(
            name,
            f"{size[name]:,.0f}",
            f"{size['dense'] / size[name]:.2f}x",
            f"{alone:.2f}x" if alone else "",
            f"{score[name]:.2f}",
            f"{statistics.stdev(own):.2f}" if len(own) > 1 else "",
            f"{score[base] - score[name]:+.2f}" if scheme else "",
            f"{speeds[name][0]:.2f}x" if speeds[name] else "",
        )
    Console(width=110).print(printed)


if __name__ == "__main__":
    main()
