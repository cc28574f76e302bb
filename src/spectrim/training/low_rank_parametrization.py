"""The best low-rank approximation of one weight, updated while the weight is trained."""

from dataclasses import replace
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectrim.core.errors import ModelError, TrainingError
from spectrim.layers.units import SingleWeight
from spectrim.linalg import Factors, Truncated, to_float64, truncate, truncate_exactly


class LowRankParametrization(nn.Module):
    """Maps W to W_D, its best approximation of rank D, which is computed once for every value of W.

    `rank` is D, an integer (). `basis`, (groups, min(out, in), a quarter of that), is the subspace from which the next
    approximation starts: as many columns as the rank needs, then zeros, so that the shape does not depend on the rank.
    Only training changes it. Both are part of the state, so that a resumed run computes the same.
    """

    basis: Tensor
    rank: Tensor

    def __init__(
        self, unit: SingleWeight, weight: nn.Parameter, *, rank: int, exact: bool, residual_decay: float
    ) -> None:
        super().__init__()
        self.unit, self._exact, self._decay = unit, exact, residual_decay
        side = unit.geometry.full_rank
        self.register_buffer("rank", torch.tensor(rank, device=weight.device))
        self.register_buffer("basis", weight.new_zeros(unit.geometry.groups, side, side // 4).detach())
        # plain numbers, with the versions of the buffers that they were read from
        self._rank_read = (rank, _version(self.rank))
        self._columns_read = (0, _version(self.basis))
        self._parts: list[Truncated] = []
        self._product = weight.new_empty(0).detach()
        if not self.is_identity:
            self._approximate(weight, None)
            self._set_basis(_bases(self._parts))
        # None until registered: registration counts as a write to the weight, and computes W_D
        self._key: tuple[object, ...] | None = None
        self._bits: Tensor | None = None
        self._decay_due = False

    def extra_repr(self) -> str:
        """The rank, and how it is made."""
        return f"rank={self.present_rank()}, exact={self._exact}, residual_decay={self._decay:g}"

    def present_rank(self) -> int:
        """D as a plain number, read again only after the buffer was written to, such as by loading a state."""
        if self._rank_read[1] != (version := _version(self.rank)):
            self._rank_read = (int(self.rank), version)
        return self._rank_read[0]

    @property
    def is_identity(self) -> bool:
        """Whether W_D is W."""
        return self.present_rank() == self.unit.geometry.full_rank

    def mark_current(self, weight: Tensor) -> None:
        """Take the cached W_D as that of the present weight."""
        self._key, self._bits, self._decay_due = self._key_of(weight), None, False

    def note_backward(self, weight: Tensor) -> None:
        """After a backward pass an optimiser may write to the weight without raising its version."""
        if self._bits is None:
            self._bits = _sum_of_bits(weight)

    def forward(self, weight: Tensor) -> Tensor:
        """W_D, (out, in, ..), with the gradient passed to W unchanged."""
        if self.is_identity:
            return weight
        self._update(weight)
        if self.training and self._decay_due:
            # not in evaluation mode, so that evaluating has no effect on training
            with torch.inference_mode(mode=False), torch.no_grad():
                self._set_basis(_bases(self._parts))
                if self._decay > 0:
                    weight.lerp_(self._product, self._decay)
            self.mark_current(weight)
        return cast(Tensor, _StraightThrough.apply(weight, self._product, self))

    def factors(self, weight: Tensor) -> Factors:
        """(down, up) in float64, (groups, rank, in, *kernel) and (groups, out, rank)."""
        self._update(weight)
        up = torch.stack([to_float64(part.left_factor) for part in self._parts])
        down = torch.stack([to_float64(part.right_factor).mT for part in self._parts])
        return down.reshape(*down.shape[:2], *self.unit.geometry.shape[2:]), up

    def basis_for(self, weight: Tensor, rank: int) -> Tensor:
        """The basis (groups, side, n) from which another rank starts: a part of the present one if that is enough."""
        columns = self._columns()
        if rank == self.unit.geometry.full_rank:
            return self.basis[..., :0].clone()
        if columns and rank <= self.present_rank():
            return self.basis[..., : columns - self.present_rank() + rank].clone()
        return _bases(self._decompose(weight, rank, None, exact=self._exact))

    def set_rank(self, rank: int, basis: Tensor) -> None:
        """Truncate at another rank from now on, starting from a basis of `basis_for`."""
        with torch.inference_mode(mode=False), torch.no_grad():
            self.rank.fill_(rank)
            self._set_basis(basis)

    def softened(self, weight: Tensor, amount: float) -> tuple[Tensor, int]:
        """W_D with its singular values lowered by an amount, shaped as the weight, and how many are above 0."""
        exact = self._exact or self.is_identity
        parts = self._decompose(weight, self.present_rank(), None if exact else self._used_basis(), exact=exact)
        with torch.inference_mode(mode=False), torch.no_grad():
            lowered, most = [], 1
            for part in parts:
                # one of the two has orthonormal columns, the other orthogonal ones as long as the singular values
                both = (part.left_factor, part.right_factor)
                values = prod(torch.linalg.vector_norm(factor.double(), dim=0) for factor in both)
                shares = (1 - amount / cast(Tensor, values).clamp(min=1e-300)).clamp(min=0)
                most = max(most, int((shares > 0).sum()))
                lowered.append(replace(part, left_factor=part.left_factor * shares.to(part.left_factor.dtype)))
            return self._multiplied(lowered).to(weight.dtype), most

    def _key_of(self, weight: Tensor) -> tuple[object, ...]:
        return *_version(weight), weight.dtype, weight.device, self.present_rank()

    def _update(self, weight: Tensor) -> None:
        same = self._key in (None, self._key_of(weight))
        if same and (self._bits is None or torch.equal(self._bits, _sum_of_bits(weight))):
            return
        self._approximate(weight, self._used_basis())
        self._key, self._bits, self._decay_due = self._key_of(weight), None, True

    def _approximate(self, weight: Tensor, basis: Tensor | None) -> None:
        self._parts = self._decompose(weight, self.present_rank(), basis, exact=self._exact)
        self._product = self._multiplied(self._parts).to(weight.dtype)

    def _columns(self) -> int:
        """How many columns of the basis are in use."""
        if self._columns_read[1] != (version := _version(self.basis)):
            self._columns_read = (int((self.basis[:1] != 0).any(dim=1).sum()), version)
        return self._columns_read[0]

    def _used_basis(self) -> Tensor:
        return self.basis[..., : self._columns()]

    def _set_basis(self, basis: Tensor) -> None:
        columns = basis.shape[2]
        if columns != self._columns():
            self.basis.zero_()
        self.basis[..., :columns] = basis
        self._columns_read = (columns, _version(self.basis))

    def _decompose(self, weight: Tensor, rank: int, basis: Tensor | None, *, exact: bool) -> list[Truncated]:
        """W_D of every group; by a full decomposition if `exact`, else from a basis if there is one."""
        # in float32 at least, and not as tensors of inference mode, which nothing can be trained with
        with torch.inference_mode(mode=False), torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
            groups = self.unit.matrices(weight.detach()).to(dtype)
            starts = [None] * len(groups) if basis is None else list(basis.to(dtype))
            try:
                if exact:
                    return [truncate_exactly(W, rank) for W in groups]
                return [truncate(W, rank, basis=V) for W, V in zip(groups, starts, strict=True)]
            except ModelError as error:
                raise TrainingError(f"{self.unit.name}: {error}; lower the learning rate or check the data") from error

    def _multiplied(self, parts: list[Truncated]) -> Tensor:
        """W_D as the layer stores its weight."""
        off = torch.autocast(parts[0].left_factor.device.type, enabled=False)
        with torch.inference_mode(mode=False), torch.no_grad(), off:
            # a single matrix needs no copy
            matrices = parts[0].matrix.unsqueeze(0) if len(parts) == 1 else torch.stack([part.matrix for part in parts])
            return self.unit.to_weight(matrices)


def _sum_of_bits(weight: Tensor) -> Tensor:
    """A number that a training step changes, but for one chance in millions."""
    size = weight.element_size()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    # overflow does no harm, and a wider sum takes twenty times as long
    return weight.detach().view(integer).sum(dtype=torch.int64 if size == 8 else torch.int32)


def _version(tensor: Tensor) -> tuple[int, int]:
    """Changes whenever the tensor is written to or another takes its place."""
    return tensor._version, tensor.data_ptr()


def _bases(parts: list[Truncated]) -> Tensor:
    return torch.stack([part.basis for part in parts])


class _StraightThrough(torch.autograd.Function):
    """The second argument, with the gradient given to the first."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, low_rank: Tensor, parametrization: LowRankParametrization) -> Tensor:
        ctx.weight, ctx.parametrization = weight, parametrization
        return low_rank.view_as(low_rank)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.parametrization.note_backward(ctx.weight)
        return gradients[0], None, None
