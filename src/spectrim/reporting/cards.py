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
from spectrim.layers.factored import FactoredLayer
from spectrim.layers.heads import AroundHeads
from spectrim.layers.replacement import NARROWED_FROM, compressed_layers
from spectrim.reporting import words

CARD = "README.md"
_MARK = "<!-- Written by Spectrim, and written anew whenever the model is saved here. Without this line it stays. -->"
_OF_TRANSFORMERS = "This model card has been automatically generated."


@checked
def write_model_card(
    model: nn.Module, folder: str | Path, *, fidelity: Fidelity | None = None, scores: Mapping[str, Score] | None = None
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
    layers = compressed_layers(model)
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
    model: nn.Module, layers: Mapping[str, nn.Module], fidelity: Fidelity | None, scores: Mapping[str, Score]
) -> Iterator[str]:
    name = type(model).__name__
    params = sum(parameter.numel() for parameter in model.parameters())
    weights = {frozenset(_weights(layer)): layer for layer in layers.values()}
    dense = sum(prod(_shape(layer)) for layer in weights.values())
    stored = sum(weight.numel() for weight in {weight for own in weights for weight in own})
    yield f"""
# {name}, compressed

{len(weights)} of its weights are smaller, or products of smaller ones: they have {stored:,} parameters of the
{dense:,} of the dense weights ({stored / dense:.1%}). The model has {params:,} in all.

## How to load it

```python
import spectrim  # before from_pretrained; without it these weights are refused
from transformers import {name}

model = {name}.from_pretrained("..")  # this folder, or the name of this repository
```

## What was kept

| Layers | Weight | Form | Rank |
|---|---|---|---|"""
    # layers whose names differ in numbers only, by their name with a star for them
    groups = words.group_by(layers, lambda name: re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name))
    for pattern, names in groups.items():
        alike = [layers[name] for name in names]
        shapes = ", ".join(dict.fromkeys(words.shape(_shape(layer)) for layer in alike))
        forms = ", ".join(dict.fromkeys(_form(layer) for layer in alike))
        least, most = (bound(_rank(layer) for layer in alike) for bound in (min, max))
        ranks = str(least) if least == most else f"{least} to {most}"
        number = f" ({len(alike)})" if len(alike) > 1 else ""
        yield f"| `{pattern}`{number} | {shapes} | {forms} | {ranks} |"
    if fidelity is not None or scores:
        yield "\n## How good it is\n"
        yield from [] if fidelity is None else [f"- {fidelity}"]
        yield from (f"- {title}: {score}" for title, score in scores.items())
    yield ""


def _weights(layer: nn.Module) -> list[nn.Parameter]:
    parts = layer.chain if isinstance(layer, FactoredLayer) else (layer,)
    return [weight for part in parts if isinstance(weight := part.weight, nn.Parameter)]


def _form(layer: nn.Module) -> str:
    """What is in the place of the dense weight."""
    if isinstance(layer, FactoredLayer):
        return layer.form
    return "narrowed heads" if isinstance(layer, AroundHeads) else "narrowed"


def _rank(layer: nn.Module) -> int:
    """Singular values; of a narrowed layer the outputs or inputs that are left, of heads their mean."""
    if isinstance(layer, FactoredLayer):
        return layer.rank
    (weight,) = _weights(layer)
    least = min(zip(weight.shape, _shape(layer), strict=True), key=lambda pair: pair[0] / pair[1])[0]
    return least // (layer.heads if isinstance(layer, AroundHeads) else 1)


def _shape(layer: nn.Module) -> tuple[int, ...]:
    if isinstance(layer, FactoredLayer):
        return tuple(layer.empty_dense().get_parameter("weight").shape)
    shape: tuple[int, ...] = getattr(layer, NARROWED_FROM)
    return shape
