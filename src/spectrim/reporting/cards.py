"""Model cards: a README.md that says what was kept of a model, how to load it, and how good it was measured to be."""

import re
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from torch import nn

from spectrim.benchmark.fidelity import Fidelity
from spectrim.benchmark.scores import Score
from spectrim.core.arguments import checked
from spectrim.core.files import read_text, write_text
from spectrim.layers.factored import FactoredLayer, low_rank_layers
from spectrim.reporting import words

CARD = "README.md"
_MARK = "<!-- Written by Spectrim, and written anew whenever the model is saved here. Without this line it stays. -->"
_OF_TRANSFORMERS = "This model card has been automatically generated."


@checked
def write_model_card(
    model: nn.Module,
    folder: str | Path,
    *,
    fidelity: Fidelity | None = None,
    scores: Mapping[str, Score] | None = None,
) -> bool:
    """Write a README.md beside a model with factored layers; `save_pretrained` and `push_to_hub` do it by themselves.

    They cannot know how good the model is, and leave that out. A README.md of somebody else is left as it is; one that
    was written here is taken away where the model has no factored layers.

    Args:
        model: A model of transformers.
        folder: Where `model.save_pretrained` wrote it.
        fidelity: How near its outputs are to the dense model's: `Compressed.fidelity`.
        scores: Scores by what a reader shall know of them: {"Accuracy on SST-2, validation": score, "dense": dense}.

    Returns:
        Whether it was written.
    """
    path = Path(folder) / CARD
    before = read_text(path) if path.exists() else ""
    if before and _MARK not in before and _OF_TRANSFORMERS not in before:
        return False
    layers = low_rank_layers(model)
    if not layers:
        if _MARK in before:
            path.unlink()
        return False
    write_text(path, "\n".join([_metadata(before), _MARK, *_lines(model, layers, fidelity, scores or {})]))
    return True


def is_own_card(path: Path) -> bool:
    """Whether Spectrim wrote a README.md."""
    return _MARK in read_text(path)


def _metadata(before: str) -> str:
    """The head of the file, with what was there."""
    from huggingface_hub import ModelCard, ModelCardData

    data: Any = ModelCard(before).data if before else ModelCardData(library_name="transformers")
    data.tags = [*dict.fromkeys([*(data.tags or []), "spectrim", "low-rank"])]
    return f"---\n{data.to_yaml()}\n---"


def _lines(
    model: nn.Module, layers: Mapping[str, FactoredLayer], fidelity: Fidelity | None, scores: Mapping[str, Score]
) -> Iterator[str]:
    name = type(model).__name__
    params = sum(parameter.numel() for parameter in model.parameters())
    products = {frozenset(part.get_parameter("weight") for part in layer.chain): layer for layer in layers.values()}
    dense = sum(prod(_shape(layer)) for layer in products.values())
    factors = sum(weight.numel() for weights in products for weight in weights)
    yield f"""
# {name} with low-rank factors

{len(products)} of its weights are products of smaller ones, made by Spectrim: they have {factors:,} parameters of the
{dense:,} of the dense weights ({factors / dense:.1%}). The model has {params:,} in all.

## How to load it

```python
import spectrim  # before from_pretrained; without it these weights are refused
from transformers import {name}

model = {name}.from_pretrained("..")  # this folder, or the name of this repository
```

## What was kept

| Layers | Weight | Form | Rank |
|---|---|---|---|"""
    for pattern, alike in _alike(layers).items():
        shapes = ", ".join(dict.fromkeys(words.shape(_shape(layer)) for layer in alike))
        forms = ", ".join(dict.fromkeys(layer.form for layer in alike))
        least, most = (bound(layer.rank for layer in alike) for bound in (min, max))
        ranks = str(least) if least == most else f"{least} to {most}"
        number = f" ({len(alike)})" if len(alike) > 1 else ""
        yield f"| `{pattern}`{number} | {shapes} | {forms} | {ranks} |"
    if fidelity is not None or scores:
        yield "\n## How good it is\n"
        yield from [] if fidelity is None else [f"- {fidelity}"]
        yield from (f"- {title}: {score}" for title, score in scores.items())
    yield ""


def _alike(layers: Mapping[str, FactoredLayer]) -> dict[str, list[FactoredLayer]]:
    """Layers whose names differ in numbers only, by their name with a star for them."""
    groups: dict[str, list[FactoredLayer]] = {}
    for name, layer in layers.items():
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), []).append(layer)
    return groups


def _shape(layer: FactoredLayer) -> tuple[int, ...]:
    return tuple(layer.empty_dense().get_parameter("weight").shape)
