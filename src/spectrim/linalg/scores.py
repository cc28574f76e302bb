"""The scores of an attention: what the keys of each head are multiplied by the queries with, at a lower rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from spectrim.linalg.heads import HeadLayout, by_energy
from spectrim.linalg.problem import Decomposition, Factors, PartnerMoments, Problem, Ranks
from spectrim.linalg.spectra import FloatArray, to_float64

_FLOOR = 1e-4


@dataclass(frozen=True, eq=False)
class ScoreDecomposition(Decomposition):
    """Each head's product of queries and keys at lower ranks, nested.

    With x^T y = x^T I y, the identity is approximated: its truncated SVD between the roots of the queries' second
    moment and the keys' covariance is the best for scores that all count alike (a key that all have in common cancels
    in the softmax). Which scores count, the gradients tell: that by the keys is made of queries, that by the queries of
    keys, each as often as the softmax and the loss have it. Both moments count the same. Directions of all heads are
    taken by their energy, after the first one of each, so that a rank is the mean over the heads.

    Attributes:
        problem: What is approximated: the weight of the keys, (1, groups * size, in); with one group for each head it
            may be that of the queries, and all is the other way round.
        layout: How the heads lie: `heads` of queries, `groups` of keys.
        queries: What the queries of a group are multiplied by, (groups, size, size), rows best first.
        keys: The same of the keys; the product of both transposes is the identity.
        order: int64 (groups * size,), all directions, the first to be taken first: row `order % size` of a group.
        energies: Of these, (groups * size,); they add up to 1.
    """

    problem: Problem
    layout: HeadLayout
    queries: Tensor
    keys: Tensor
    order: Tensor
    energies: Tensor

    @staticmethod
    def full_ranks(shape: Sequence[int]) -> Ranks:
        """Of a single head."""
        return (shape[1],)

    @classmethod
    def of(cls, problem: Problem, *, near: Factors = ()) -> Self:
        """As `of_heads`, of a single head."""
        return cls.of_heads(problem, HeadLayout(1, 1, problem.weight.shape[1]))

    @classmethod
    def of_heads(cls, problem: Problem, layout: HeadLayout) -> Self:
        """Solve for every rank."""
        (W,), C = to_float64(problem.weight.flatten(2)).to(problem.device), problem.full_metric
        partner = problem.partner or PartnerMoments(torch.eye(layout.heads * layout.size).to(W))
        own = W @ C @ W.T if partner.own_mean is None else W @ C @ W.T + partner.own_mean.outer(partner.own_mean)
        queries, keys = _blocks(partner.second, layout), _blocks(own, layout)
        if problem.output is not None and partner.gradients is not None:
            queries = _shares(queries) + _shares(_blocks(problem.output[0], layout))
            keys = _shares(keys) + _shares(_blocks(partner.gradients, layout))
        (root, inverse), (key_root, key_inverse) = _roots(queries), _roots(keys)
        columns, values, rows = torch.linalg.svd(root @ key_root)
        by_query, by_key = columns.mT @ inverse, rows @ key_inverse
        # each product of the two rows is 1 / value; both are as large, since the attention may clip them
        sizes = (by_key.norm(dim=2) / by_query.norm(dim=2)).sqrt() * values.sqrt()
        by_query, by_key = by_query * sizes.unsqueeze(2), by_key * (values / sizes).unsqueeze(2)
        order = by_energy(values.square())
        energies = values.square().flatten()[order]
        return cls(problem, layout, by_query, by_key, order, energies / energies.sum())

    @property
    def tails(self) -> FloatArray:
        """At ranks 1 to the size of a head: the share of the scores' energy, of the problem's energy."""
        each = self.energies.reshape(self.layout.size, self.layout.groups).sum(dim=1)
        after = each.flip(0).cumsum(0).flip(0)
        return self.problem.total * np.append(after[1:].cpu().numpy(), 0.0)

    def tail_at(self, ranks: Ranks) -> float:
        """Energy lost at a rank."""
        return float(self.tails[ranks[0] - 1])

    def factors(self, ranks: Ranks) -> Factors:
        """F, U, W' and R: see `HeadQueryKeyForm`."""
        (rank,), layout = ranks, self.layout
        groups = self.order[: rank * layout.groups] // layout.size
        numbers = [int((groups == group).sum()) for group in range(layout.groups)]
        queries = [rows[:number] for rows, number in zip(self.queries, numbers, strict=True)]
        keys = torch.block_diag(*(rows[:number] for rows, number in zip(self.keys, numbers, strict=True)))
        by_head = [rows for rows in queries for _ in range(layout.heads // layout.groups)]
        weight = keys @ to_float64(self.problem.weight.flatten(2)).to(keys.device)[0]
        factors = torch.block_diag(*by_head), torch.block_diag(*queries).mT, weight, keys
        return tuple(part.unsqueeze(0) for part in factors)


def _blocks(matrix: Tensor, layout: HeadLayout) -> Tensor:
    """The blocks of heads (groups, size, size), the mean of those of each group."""
    size = layout.size
    each = to_float64(matrix).reshape(-1, size, len(matrix) // size, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return each.reshape(layout.groups, -1, size, size).mean(dim=1)


def _shares(blocks: Tensor) -> Tensor:
    """The same with a trace of 1 over all groups."""
    return blocks / blocks.diagonal(dim1=1, dim2=2).sum().clamp(min=torch.finfo(blocks.dtype).tiny)


def _roots(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric roots (groups, size, size), and their inverses; directions that vary little are taken to vary more.

    So are heads that hardly vary beside the others, as those do that were pruned.
    """
    values, vectors = torch.linalg.eigh((blocks + blocks.mT) / 2)
    least = _FLOOR * values.mean() if bool(values.mean() > 0) else torch.ones_like(values.mean())
    typical = values.mean(dim=1, keepdim=True).clamp(min=least)
    roots = (values.clamp(min=0) + _FLOOR * typical).sqrt().unsqueeze(1)
    return (vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT
