"""How much the output of one block changes with an error in each of its layers, without a decomposition of weights."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from spectrim.analysis.sensitivities import subset
from spectrim.analysis.spectra import Analysis
from spectrim.core.execution import Inputs, call, evaluating, temporary
from spectrim.layers.tokens import TokenMasks, output_rows
from spectrim.layers.types import layer_type_of
from spectrim.linalg import to_float64

_SAMPLES, _TOKENS = 4, 1024
_LOST = 0.1
_ROWS = 512


def block_sensitivity(block: nn.Module, analysis: Analysis, batches: Sequence[Inputs]) -> dict[str, dict[str, float]]:
    """Squared change of each token's hidden state, as a share of its square, for each share of energy a layer loses.

    Each layer by itself gives only the principal components of its outputs, so many that about a tenth of their energy
    is lost: what its factors would lose that are best for these inputs. Changes are shares of a token's own square,
    since blocks of transformers normalise each token before they use it, and a few tokens are much larger than others.

    Args:
        block: Gives one tensor, (batch, .., size).
        analysis: Of the block.
        batches: Its inputs; a few samples are used.
    """
    few = list(_few(subset(block, batches, samples=_SAMPLES)))
    layers = [layer for layer in analysis if layer.problems and not layer.is_lookup]
    rows: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    modules = {name: block.get_submodule(name) for name in rows}
    sensitivities: dict[str, dict[str, float]] = {}
    with evaluating(block):
        masks = [TokenMasks.of(block, batch) for batch in few]
        dense = []
        for batch, own in zip(few, masks, strict=True):
            hooks = (layer.register_forward_hook(partial(_collect, rows[name], own)) for name, layer in modules.items())
            with temporary(hooks):
                dense.append(call(block, batch))
        for name, layer in modules.items():
            mean, basis, lost = _losing_components(torch.cat(rows.pop(name), dim=1))
            if not lost:
                sensitivities[name] = {analysis[name].forms[0]: 0.0}
                continue
            changes = []
            with temporary([layer.register_forward_hook(partial(_project, mean, basis))]):
                for batch, own, before in zip(few, masks, dense, strict=True):
                    changes.append(relative_squares(before, call(block, batch), own))
            sensitivities[name] = {analysis[name].forms[0]: float(torch.cat(changes).mean()) / lost}
    return sensitivities


def first_samples(inputs: Inputs, number: int) -> Inputs:
    """The first samples; tensors that are not one row a sample stay as they are."""
    samples = inputs.samples
    cropped = inputs.map(lambda tensor: tensor[:number] if tensor.ndim and len(tensor) == samples else tensor)
    return replace(cropped, mask=inputs.mask[:number] if isinstance(inputs.mask, Tensor) else inputs.mask)


def _few(batches: Sequence[Inputs]) -> Iterator[Inputs]:
    """The first samples of each batch, no more than are looked at."""
    samples, tokens = _SAMPLES, _TOKENS
    for batch in batches:
        length = max(1, batch.args[0][0].numel() // batch.args[0].shape[-1])
        number = max(1, min(batch.samples, samples, tokens // length))
        yield first_samples(batch, number)
        samples, tokens = samples - number, tokens - number * length
        if samples <= 0 or tokens <= 0:
            return


def _collect(rows: list[Tensor], masks: TokenMasks, layer: nn.Module, _: object, output: Tensor) -> None:
    rows.append(output_rows(layer, output, positions=None, masks=masks).clone())


def _losing_components(rows: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean (groups, 1, out) and principal components (groups, out, k) of rows (groups, n, out), and the share lost."""
    sampled = to_float64(rows[:, :: max(1, rows.shape[1] // _ROWS)])
    mean = sampled.mean(dim=1, keepdim=True)
    centred = sampled - mean
    tall = centred.shape[1] >= centred.shape[2]
    values, vectors = torch.linalg.eigh(centred.mT @ centred if tall else centred @ centred.mT)
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    energy = values.sum(dim=0)
    total = float(energy.sum())
    if not total:
        return mean, vectors, 0.0
    number = int((energy.cumsum(dim=0) < (1 - _LOST) * total).sum()) or 1
    basis = vectors[..., :number]
    if not tall:
        basis = centred.mT @ basis / values[:, None, :number].sqrt().clamp(min=1e-30)
    rows = to_float64(rows) - mean
    lost = rows - (rows @ basis) @ basis.mT
    return mean, basis, float(lost.square().sum() / rows.square().sum())


def _project(mean: Tensor, basis: Tensor, layer: nn.Module, _: object, output: Tensor) -> Tensor:
    """A layer's output with only these components around the mean."""
    dim = layer_type_of(layer).feature_dim(layer)
    rows = output.movedim(dim, -1).unflatten(-1, (len(basis), -1)).movedim(-2, 0)
    flat = rows.reshape(len(basis), -1, rows.shape[-1])
    mean, basis = mean.to(flat), basis.to(flat)
    low: Tensor = ((flat - mean) @ basis) @ basis.mT + mean
    return low.reshape(rows.shape).movedim(0, -2).flatten(-2).movedim(-1, dim)


def relative_squares(before: Tensor, after: Tensor, masks: TokenMasks) -> Tensor:
    """Squared change of each token's vector as a share of its square, (n,)."""
    places = masks.places(before.shape)
    first, second = ((x if places is None else places.take(x)).double() for x in (before, after))
    square: Tensor = first.square().sum(dim=-1)
    change: Tensor = (second - first).square().sum(dim=-1)
    shares: Tensor = change / square.clamp(min=1e-30)
    return shares.flatten()
