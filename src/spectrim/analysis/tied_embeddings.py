"""What to approximate where an embedding and an output layer share a weight E (entries, size), which stays shared."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from spectrim.analysis.moments import Moments, output_grads, pooled
from spectrim.core.names import Metric
from spectrim.linalg import DiagonalCovariance, Problem, add_outer, matrix_of, shrunk, to_float64

_SWEEPS = 50


def tied_problems(kernels: Tensor, moments: Sequence[Moments], *, outputs: int) -> dict[Metric, Problem]:
    """What there is to approximate in the data metrics; the last so many statistics are those of output layers."""
    number = len(moments) - outputs
    lookups, others = moments[:number], moments[number:]
    metrics: dict[Metric, bool] = {"activation": False}
    if output_grads(lookups) is not None:
        metrics["loss"] = True
    return {metric: tied_problem(kernels, lookups, others, loss=loss) for metric, loss in metrics.items()}


def tied_problem(kernels: Tensor, lookups: Sequence[Moments], outputs: Sequence[Moments], *, loss: bool) -> Problem:
    """Make the errors of both uses small together, each as a share of what it gives.

    A row e of the error E - Q costs e (a f I + b C) e^T: f is how often the row is looked up, C the second moment of
    the output layer's inputs (around zero, since its bias stays as it is), and a and b are one over the energies of the
    two uses. With a metric for each row there is no closed solution. So f and C are separated: p M, the nearest product
    of a number for each row and one matrix (Van Loan & Pitsianis 1993), takes the place of a f I + b C.

    Args:
        kernels: E^T as the embedding's matrix, (1, size, entries).
        lookups: Statistics of the embeddings.
        outputs: Statistics of the output layers.
        loss: The second moment of the gradients at the embeddings takes the place of I.
    """
    W = to_float64(kernels)[0]
    entries, size = W.shape[1], W.shape[0]
    rows = pooled(lookups, name="the embedding", width=entries)
    frequencies = shrunk(rows.covariance, rows.shrinkage)
    assert isinstance(frequencies, DiagonalCovariance)
    f = frequencies.variances[0].to(W.device)
    inputs = [replace(seen, compact=add_outer(seen.compact, seen.mean)) for seen in outputs]
    columns = pooled(inputs, name="the output layer", width=size)
    C = matrix_of(shrunk(columns.covariance, columns.shrinkage))[0].to(W.device)
    gradients = output_grads(lookups) if loss else None
    G = torch.eye(size).to(W) if gradients is None else gradients[0].to(W.device)
    energies = float((G @ (W * f) * W).sum()), float((C @ W * W).sum())
    a, b = (1 / energy if energy > 0 else 0.0 for energy in energies)
    p, M = _nearest_product((a * f, torch.full_like(f, b)), (G, C))
    return Problem(kernels, DiagonalCovariance(p.unsqueeze(0)), output=M.unsqueeze(0))


def _nearest_product(rows: Sequence[Tensor], matrices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """p and M for which the outer product p M is nearest to the sum of those of two `rows` and two `matrices`.

    By turns each is the best one for the other. As no inner product is negative, p is positive, and M semi-definite.
    """
    inner = [[[float((x * y).sum()) for y in vectors] for x in vectors] for vectors in (rows, matrices)]
    grams = [torch.tensor(each, dtype=torch.float64) for each in inner]
    parts = torch.ones(len(matrices), dtype=torch.float64)
    for _ in range(_SWEEPS):
        shares = _normalised(grams[1] @ parts)
        parts = _normalised(grams[0] @ shares)
    p = float(shares[0]) * rows[0] + float(shares[1]) * rows[1]
    return p, float(parts[0]) * matrices[0] + float(parts[1]) * matrices[1]


def _normalised(numbers: Tensor) -> Tensor:
    norm: Tensor = numbers.norm().clamp(min=torch.finfo(numbers.dtype).tiny)
    return numbers / norm
