"""The interpolative form of a product: some of its rows as they are, and the others made from these."""

import torch
from torch import Tensor

_MOST = 1.5
"""The largest coefficient: what a row is made from is at most so much larger than itself."""


def interpolated(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The product of `up` (out, r) and `down` (r, n) with the identity in r of the rows of its last factor.

    The rows are those of a submatrix of nearly the largest volume, so that no coefficient is large, whatever the
    factors are (Goreinov et al., How to find a good submatrix, 2010).

    Returns:
        `order` (out,), its own inverse, whose first r are these rows: row i of the product is at place order[i] of
        [first, rest first]; `first` (r, n); and `rest`, the coefficients (out - r, r).
    """
    Q, R = torch.linalg.qr(up)
    rank, order = Q.shape[1], torch.arange(len(Q), device=Q.device)
    rows = _dominant_rows(Q)
    # rows behind the first r change places with others before: OpenVINO moves an order into the next convolution's
    # weights as if it were its own inverse
    behind, others = rows[rows >= rank], order[:rank][~torch.isin(order[:rank], rows)]
    order[others], order[behind] = behind, others
    first, last = Q[order[:rank]], Q[order[rank:]]
    rest: Tensor = torch.linalg.solve(first.T, last.T).T
    return order, first @ (R @ down), rest


def _dominant_rows(Q: Tensor) -> Tensor:
    """Rows of (out, r), as many as it has columns, in which all others have coefficients of at most `_MOST`."""
    _, swaps = torch.linalg.lu_factor(Q)
    order = list(range(len(Q)))
    for place, other in enumerate(swaps.tolist()):
        order[place], order[other - 1] = order[other - 1], order[place]
    rows = order[: Q.shape[1]]
    T = torch.linalg.solve(Q[rows].T, Q.T).T
    # every exchange multiplies the volume by what is found here, so that they come to an end
    while rows and float(T.abs().max()) > _MOST:
        row, column = divmod(int(T.abs().argmax()), len(rows))
        change = T[row].clone()
        change[column] -= 1
        T = T - torch.outer(T[:, column] / T[row, column], change)
        rows[column] = row
    return torch.tensor(sorted(rows), device=Q.device)
