"""Transformers without labels: Spectrim beside the methods of one layer at a time, all in one harness.

    python benchmarks/transformers_zero_shot.py --recipe minilm-stsb --model MINILM --data PAIRS
    .. --recipe smollm2-wikitext --model SMOLLM2 --data TEXTS --samples 16 --scored 8

Models and data are those of the recipes (`spectrim recipe show minilm-stsb`). Methods:

- `plain`: truncated SVD, every layer at the same share of its cost.
- `uncentred`: the same in the metric of the inputs' second moments, without biases and shrinkage (as SVD-LLM does).
- `whitened`: the same in the metric of the inputs' covariances, with mean correction.
- `joint`: every MLP at the same share of its neurons and every head at the same share of its numbers, the other layers
  as in `whitened` (like MoDeGPT).
- `spectrim`: one `st.compress` under the budget.
- `distilled`: the same network, then `st.distill` on the same samples.

Scores are means over calibration seeds with their standard deviation, on held-out data, or with `--test` on test data.
`distance` is the mean squared distance of embeddings to the dense network's on 256 calibration sentences that were not
used; of a model that writes text it is the logarithm of the perplexity less the dense one's. Seconds are processor time
of one compression, one thread.
"""

import argparse
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import spectrim as st
from spectrim.core.execution import as_inputs, device_of
from spectrim.core.memory import peak_gb
from spectrim.linalg.covariance import add_outer
from spectrim.models.folders import load_pretrained
from spectrim.planning.decisions import PlanOptions, dense, factored, narrowed
from spectrim.planning.pipeline import decide
from spectrim.recipes.files import find_study
from spectrim.recipes.texts import Texts, TextStudy

METHODS = ("plain", "whitened", "joint", "spectrim", "distilled")
OTHERS = 256


def uniform(analysis: st.Analysis, rule: st.Budget, share: float, *, method: str) -> st.Plan:
    """Every layer that can shrink at the same share of its cost, in the forms of a method."""
    metric: Any = "plain" if method == "plain" else "activation"
    layers: dict[str, st.LayerPlan] = {}
    for layer in analysis:
        if not layer.forms or layer.is_lookup or layer.skip_reason:
            layers[layer.name] = dense(layer, reason="not of the body", metric=metric)
            continue
        costs = layer.rank_costs("linear", metric)
        below = [int(rank) for rank in costs.ranks[costs.macs <= share * layer.dense.macs, 0]] or [1]
        layers[layer.name] = factored(layer, "linear", (below[-1],), metric=metric, reason="uniform")
    for last in analysis if method == "joint" else ():
        if last.joint_forms:
            (form,), (full,) = last.joint_forms, last.full_ranks(last.joint_forms[0])
            members = [*(analysis[feeder.name] for feeder in last.feeders), last]
            ranks = (max(1, int(share * full)),)
            layers |= {own.name: own for own in narrowed(members, form, ranks, metric=metric, reason="uniform")}
    return st.Plan(rule=rule, metric=metric, layers=tuple(layers[layer.name] for layer in analysis))


class Scores:
    """Of one network against the dense one."""

    def __init__(self, study: TextStudy, network: nn.Module, texts: Texts, *, test: bool) -> None:
        self.study, self.network, self.texts = study, network, texts
        self.batches = texts.test if test else texts.held_out
        self.dense = self.score(network)

    def score(self, network: nn.Module) -> float:
        """Spearman correlation in per cent, or perplexity."""
        value = st.evaluate(network, self.batches, self.study.score).value
        return 100 * value if self.study.score == "spearman" else value

    def distance(self, network: nn.Module, others: Sequence[Any], score: float) -> float:
        """See the top."""
        if self.study.score == "perplexity":
            return math.log(score / self.dense)
        squares = []
        with torch.inference_mode():
            for batch in others:
                there = {name: tensor.to(device_of(network)) for name, tensor in batch.items()}
                squares.append((network(**there) - self.network(**there)).square().sum(dim=1))
        return float(torch.cat(squares).mean())


def others(study: TextStudy, texts: Texts, *, seed: int) -> list[Any]:
    """Batches of calibration samples that the seed does not choose."""
    if study.score == "perplexity":
        return []
    order = torch.randperm(len(texts.samples), generator=torch.Generator().manual_seed(seed))
    places = order[study.samples : study.samples + OTHERS].split(study.batch)
    return [texts.encode([texts.samples[place] for place in part]) for part in places]


def analysed(study: TextStudy, network: nn.Module, data: Sequence[Any], *, methods: Sequence[str]) -> st.Analysis:
    """Spectra in the metrics that the methods need; sensitivities only for Spectrim's."""
    if not {"spectrim", "distilled"} & set(methods):
        return st.analyze(network, data[0], calibration=st.calibrate(network, data))
    rule, options = study.rule(study.shares[0]), PlanOptions(metric=study.metric)
    return decide(network, rule, example_inputs=as_inputs(data[0]), data=data, options=options).analysis


def without_means(calibration: st.Calibration) -> st.Calibration:
    """Second moments around zero, as they are, in the place of means and covariances."""
    changed = {
        name: replace(seen, mean=0 * seen.mean, compact=add_outer(seen.compact, seen.mean), shrinkage=0.0)
        for name, seen in calibration.moments.items()
        if isinstance(seen.compact, torch.Tensor)  # not of embeddings, which stay dense
    }
    return replace(calibration, moments={**calibration.moments, **changed})


def rows(arguments: argparse.Namespace, study: TextStudy) -> Iterator[tuple[str, float, float, float, float]]:
    """Method, share, score, distance and seconds, seed by seed; the dense model first."""
    source, data_folder = study.require_folders(arguments.data)
    texts = study.texts(source, data_folder)
    network = study.network(load_pretrained(source), source).eval().to(arguments.device)
    scores = Scores(study, network, texts, test=arguments.test)
    yield "dense", 1.0, scores.dense, 0.0, 0.0
    for seed in arguments.seeds:
        data, unseen = texts.calibration(study.samples, batch=study.batch, seed=seed), others(study, texts, seed=seed)
        begin = time.process_time()
        analysis = analysed(study, network, data, methods=arguments.methods)
        learning = time.process_time() - begin
        around_zero = analysis
        if "uncentred" in arguments.methods:
            around_zero = st.analyze(network, data[0], calibration=without_means(st.calibrate(network, data)))
        for share in study.shares:
            zero_shot: tuple[nn.Module, float] | None = None
            for method in arguments.methods:
                begin, rule = time.process_time(), study.rule(share)
                allocated = method in ("spectrim", "distilled")
                if method == "distilled" and zero_shot:
                    small, before = zero_shot
                else:
                    spectra = around_zero if method == "uncentred" else analysis
                    plan = st.plan(spectra, rule) if allocated else uniform(spectra, rule, share, method=method)
                    fitted: Any = "auto" if allocated else False
                    small = st.compress(
                        network, plan, example_inputs=data[0], data=data, analysis=spectra, reconstruct=fitted
                    ).model
                    before = learning if allocated else 0.0
                if method == "distilled":
                    small = st.distill(small, network, data=data, seed=seed).model
                seconds = time.process_time() - begin + before
                zero_shot = (small, seconds) if method == "spectrim" else zero_shot
                score = scores.score(small)
                yield method, share, score, scores.distance(small, unseen, score), seconds


def main() -> None:
    """Print a line for every network as it comes, and then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, choices=("minilm-stsb", "smollm2-wikitext"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--methods", default=METHODS, type=lambda text: text.split(","))
    parser.add_argument("--shares", type=lambda text: tuple(map(float, text.split(","))))
    parser.add_argument("--seeds", default=(0, 1, 2), type=lambda text: tuple(map(int, text.split(","))))
    parser.add_argument("--samples", type=int)
    parser.add_argument("--batch", type=int, help="samples at a time")
    parser.add_argument("--scored", help="examples to score, at most, or all")
    parser.add_argument("--device", default="cpu", help="where the networks are run, such as cuda")
    parser.add_argument("--test", action="store_true", help="score test data instead of held-out data")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    study = find_study(arguments.recipe)
    assert isinstance(study, TextStudy)
    chosen = {name: getattr(arguments, name) for name in ("model", "shares", "samples", "batch")}
    update: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    if arguments.scored:
        update["scored"] = None if arguments.scored == "all" else int(arguments.scored)
    study = study.model_copy(update=update)
    by_network: dict[tuple[str, float], list[tuple[float, float, float]]] = {}
    for method, share, *numbers in rows(arguments, study):
        by_network.setdefault((method, share), []).append((numbers[0], numbers[1], numbers[2]))
        print(
            f"{method:9} {share:.2f}  {study.score} {numbers[0]:.2f}  {numbers[1]:.4f}  {numbers[2]:.0f} s", flush=True
        )
    table = Table("method", "kept", study.score, "sd", "distance", "sd", "seconds")
    for (method, share), seeds in by_network.items():
        score, distance, seconds = zip(*seeds, strict=True)
        spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in (score, distance)]
        mean = [statistics.mean(values) for values in (score, distance, seconds)]
        cells = (f"{mean[0]:.2f}", f"{spread[0]:.2f}", f"{mean[1]:.4f}", f"{spread[1]:.4f}", f"{mean[2]:.0f}")
        table.add_row(method, f"{share:g}", *cells)
    Console(width=100).print(table)
    print(f"peak {peak_gb():.2f} GB")


if __name__ == "__main__":
    main()
