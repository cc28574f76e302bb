"""The best low-rank approximation of one weight, kept up to date while the weight is trained."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.core.errors import ModelError, TrainingError
from spectrim.layers.registry import Geometry, as_kernels, as_stored, geometry
from spectrim.linalg import Factors, Truncated, algebra, truncate, truncate_exactly


class Cut(nn.Module):
    """W to W_D, computed once for every value that W takes.

    Attributes:
        sizes: Of the weight.
        basis: (groups, min(out, in), a quarter of that), where the next subspace starts; as many columns as the rank
            asks for, then zeros, so that its shape says nothing of the rank. Part of the state, so that a resumed run
            computes what an uninterrupted one would. Only training changes it.
        rank: D, a whole number (); part of the state.
    """

    basis: Tensor
    rank: Tensor

    def __init__(self, name: str, layer: nn.Module, *, rank: int, exact: bool, shrink: float) -> None:
        super().__init__()
        self._name, self.sizes = name, geometry(layer)
        self._exact, self._shrink = exact, shrink
        weight = layer.get_parameter("weight")
        side = min(self.sizes.out, self.sizes.width)
        self.register_buffer("rank", torch.tensor(rank, device=weight.device))
        self.register_buffer("basis", weight.new_zeros(self.sizes.groups, side, side // 4).detach())
        self._read = (rank, _version(self.rank))
        self._filled = (0, _version(self.basis))
        self._parts: list[Truncated] = []
        self._kept = weight.new_empty(0).detach()
        if not self.whole:
            self._take(self._decomposed(weight, rank, None), weight)
            self._remember(_bases(self._parts))
        # None until registered: registration counts as a write to the weight, and asks for W_D
        self._key: tuple[object, ...] | None = None
        self._bits: Tensor | None = None
        self._unsettled = False

    def extra_repr(self) -> str:
        """The rank, and how it is made."""
        return f"rank={self.present_rank()}, exact={self._exact}, shrink={self._shrink:g}"

    def present_rank(self) -> int:
        """D as a plain number, read again only when the buffer was written to, as by loading a state."""
        if self._read[1] != (now := _version(self.rank)):
            self._read = (int(self.rank), now)
        return self._read[0]

    @property
    def whole(self) -> bool:
        """Whether W_D is W."""
        return self.present_rank() == self.sizes.full_rank

    def seen(self, weight: Tensor) -> None:
        """Take what is cached as that of the weight as it now is."""
        self._key, self._bits, self._unsettled = self._key_of(weight), None, False

    def felt(self, weight: Tensor) -> None:
        """Take note of a backward pass: an optimiser may write to the weight now without counting it."""
        if self._bits is None:
            self._bits = _sum_of_bits(weight)

    def forward(self, weight: Tensor) -> Tensor:
        """W_D, (out, in, ..), with the gradient passed to W unchanged."""
        if self.whole:
            return weight
        self._update(weight)
        if self.training and self._unsettled:
            # in eval mode the weight is left alone, and the basis too, so that evaluating has no effect on training
            with torch.inference_mode(mode=False), torch.no_grad():
                self._remember(_bases(self._parts))
                if self._shrink > 0:
                    weight.lerp_(self._kept, self._shrink)
            self.seen(weight)
        kept: Tensor = _StraightThrough.apply(weight, self._kept, self)
        return kept

    def factors(self, weight: Tensor) -> Factors:
        """(down, up) in float64, (groups, rank, in, *kernel) and (groups, out, rank)."""
        self._update(weight)
        up = torch.stack([algebra(part.left) for part in self._parts])
        down = torch.stack([algebra(part.right).mT for part in self._parts])
        return down.reshape(*down.shape[:2], self.sizes.into, *self.sizes.kernel), up

    def start_at(self, weight: Tensor, rank: int) -> Tensor:
        """The basis (groups, side, n) to start from at another rank: a part of the one there is, if that will do."""
        columns = self._columns()
        if rank == self.sizes.full_rank:
            return self.basis[..., :0].clone()
        if columns and rank <= self.present_rank():
            return self.basis[..., : columns - self.present_rank() + rank].clone()
        return _bases(self._decomposed(weight, rank, None))

    def move(self, rank: int, start: Tensor) -> None:
        """Truncate at another rank from now on."""
        with torch.inference_mode(mode=False), torch.no_grad():
            self.rank.fill_(rank)
            self._remember(start)

    def softened(self, weight: Tensor, amount: float) -> tuple[Tensor, int]:
        """W_D with its singular values lowered, like the weight, and how many are left."""
        rank = self.present_rank()
        parts = self._exactly(weight, rank) if self.whole else self._decomposed(weight, rank, self._basis())
        with torch.inference_mode(mode=False), torch.no_grad():
            lowered, most = [], 1
            for part in parts:
                # one of the two has orthonormal columns, the other orthogonal ones as long as the singular values
                values = torch.linalg.vector_norm(part.left.double(), dim=0) * torch.linalg.vector_norm(
                    part.right.double(), dim=0
                )
                left = (1 - amount / values.clamp(min=1e-300)).clamp(min=0)
                most = max(most, int((left > 0).sum()))
                lowered.append(replace(part, left=part.left * left.to(part.left.dtype)))
            return _product(lowered, self.sizes).to(weight.dtype), most

    def _key_of(self, weight: Tensor) -> tuple[object, ...]:
        return *_version(weight), weight.dtype, weight.device, self.present_rank()

    def _update(self, weight: Tensor) -> None:
        same = self._key in (None, self._key_of(weight))
        if same and (self._bits is None or torch.equal(self._bits, _sum_of_bits(weight))):
            return
        self._take(self._decomposed(weight, self.present_rank(), self._basis()), weight)
        self._key, self._bits, self._unsettled = self._key_of(weight), None, True

    def _take(self, parts: list[Truncated], weight: Tensor) -> None:
        self._parts, self._kept = parts, _product(parts, self.sizes).to(weight.dtype)

    def _columns(self) -> int:
        """How many columns of the basis are in use."""
        if self._filled[1] != (now := _version(self.basis)):
            self._filled = (int((self.basis[:1] != 0).any(dim=1).sum()), now)
        return self._filled[0]

    def _basis(self) -> Tensor:
        return self.basis[..., : self._columns()]

    def _remember(self, start: Tensor) -> None:
        columns = start.shape[2]
        if columns != self._columns():
            self.basis.zero_()
        self.basis[..., :columns] = start
        self._filled = (columns, _version(self.basis))

    def _exactly(self, weight: Tensor, rank: int) -> list[Truncated]:
        return self._checked(weight, lambda groups: [truncate_exactly(W, rank) for W in groups])

    def _decomposed(self, weight: Tensor, rank: int, basis: Tensor | None) -> list[Truncated]:
        if self._exact:
            return self._exactly(weight, rank)
        starts = [None] * self.sizes.groups if basis is None else list(basis)

        def from_basis(groups: Tensor) -> list[Truncated]:
            return [
                truncate(W, rank, basis=None if V is None else V.to(W.dtype))
                for W, V in zip(groups, starts, strict=True)
            ]

        return self._checked(weight, from_basis)

    def _checked(self, weight: Tensor, decompose: Callable[[Tensor], list[Truncated]]) -> list[Truncated]:
        # mixed precision would take the products in half of it, and what inference mode makes cannot be trained with
        off = torch.autocast(weight.device.type, enabled=False)
        with torch.inference_mode(mode=False), torch.no_grad(), off:
            kind = weight.dtype if weight.dtype == torch.float64 else torch.float32
            groups = as_kernels(weight.detach(), self.sizes).flatten(2).to(kind)
            try:
                return decompose(groups)
            except ModelError as error:
                raise TrainingError(f"{self._name}: {error}; lower the learning rate or check the data") from error


def _sum_of_bits(weight: Tensor) -> Tensor:
    """Another number whenever a training step has changed the weight, but for one chance in millions."""
    size = weight.element_size()
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    # overflow does no harm, and a wider sum takes twenty times as long
    return weight.detach().view(whole).sum(dtype=torch.int64 if size == 8 else torch.int32)


def _version(tensor: Tensor) -> tuple[int, int]:
    """Changes whenever the tensor is written to or another takes its place."""
    return tensor._version, tensor.data_ptr()


def _bases(parts: list[Truncated]) -> Tensor:
    return torch.stack([part.basis for part in parts])


def _product(parts: list[Truncated], sizes: Geometry) -> Tensor:
    """W_D as the layer stores its weight."""
    with torch.inference_mode(mode=False), torch.no_grad(), torch.autocast(parts[0].left.device.type, enabled=False):
        whole = parts[0].matrix.unsqueeze(0) if len(parts) == 1 else torch.stack([part.matrix for part in parts])
        return as_stored(whole.reshape(sizes.groups, sizes.out, sizes.into, *sizes.kernel), sizes)


class _StraightThrough(torch.autograd.Function):
    """The second argument, with the gradient given to the first."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, kept: Tensor, cut: Cut) -> Tensor:
        ctx.weight, ctx.cut = weight, cut
        return kept.view_as(kept)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.cut.felt(ctx.weight)
        return gradients[0], None, None
