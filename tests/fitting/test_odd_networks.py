"""The cache and shared runs change nothing, whatever a network reads later, leaves to others or does by value."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.fitting import reconstruction

SIZE = 16
CACHES = (0, 8_000, 60_000, None)


class Block(nn.Module):
    def __init__(self, into: int = SIZE) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(into, 2 * SIZE), nn.Linear(2 * SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Skip(nn.Module):
    """A chain whose end reads its beginning in some cases only."""

    def __init__(self, joined: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.head, self.joined = nn.Embedding(50, SIZE), nn.Linear(SIZE, 4), joined
        self.first, self.second, self.third = Block(), Block(), Block()

    def forward(self, tokens: Tensor) -> Tensor:
        first = self.first(self.embed(tokens))
        return self.head(self.joined(first, self.third(self.second(first))))


SKIPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "beyond the places that were tried": lambda a, h: torch.cat([h[:, :8], h[:, 8:] + a[:, 8:]], dim=1),
    "of larger batches": lambda a, h: h + a if len(h) > 2 else h,
    "by value": lambda a, h: torch.where(h[:, :, :1] > 0.3, h + a, h),
    "with NaN as zero": lambda a, h: h + (a * (h[:, :, :1] > 0.3)).nan_to_num(),
    "in place": lambda a, h: h.add_(a) if len(h) > 2 else h,
    "as an index": lambda a, h: h[:, a.sum(dim=(0, 2)).argsort()] if len(h) > 2 else h,
}


class Writer(nn.Module):
    """Leaves what it gives in a box for others."""

    def __init__(self, box: dict[str, Tensor], into: int) -> None:
        super().__init__()
        self.inside = Block(into)
        self.__dict__["box"] = box

    def forward(self, x: Tensor) -> Tensor:
        self.box["left"] = self.inside(x)
        return self.box["left"]


class Boxed(nn.Module):
    def __init__(self, into: int) -> None:
        super().__init__()
        self.__dict__["box"] = {}
        self.embed = nn.Embedding(50, SIZE) if into == SIZE else nn.Identity()
        self.first, self.second, self.third = Writer(self.box, into), Block(), Block()
        self.head = nn.Linear(SIZE, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.third(self.second(self.first(self.embed(x)))) + self.box["left"])


class Loop(nn.Module):
    """As many calls as a batch is long."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.again, self.out = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 8)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), SIZE)
        for step in x.unbind(1):
            state = torch.tanh(self.into(step) + self.again(state))
        return self.out(state)


class Readers(nn.Module):
    """Two layers that read one tensor, but not always the same values."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.query, self.key, self.head = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 8)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        query = torch.tanh(self.query(x))
        return self.head(query * self.key(self.between(x)))


def halved(x: Tensor) -> Tensor:
    x.data.mul_(0.5)
    return x


def other_where_longer(x: Tensor) -> Tensor:
    return x if len(x) == 16 else x[:, :1] * torch.arange(SIZE) / 8


def numbers(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def tokens(*, padded: int = 0) -> list[Tensor]:
    batches = [torch.randint(1, 50, (8, 12), generator=torch.Generator().manual_seed(n)) for n in range(3)]
    for batch in batches:
        batch[:3, :padded] = 0
    return batches


def compressed(model: nn.Module, data: list[Tensor], **options: Any) -> dict[str, Tensor]:
    result = st.compress(model.eval(), st.Budget(macs=0.6), example_inputs=data[0], data=data, **options)
    return result.model.state_dict()


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model", "data"),
    [
        *((lambda joined=joined: Skip(joined), tokens()) for joined in SKIPS.values()),
        (lambda: Boxed(1), numbers(*[(16, 6, 1)] * 3)),
        (lambda: Boxed(3), numbers(*[(16, 6, 3)] * 3)),
        (lambda: Boxed(SIZE), tokens(padded=9)),
        (Loop, numbers((16, 3, SIZE), (16, 6, SIZE), (16, 5, SIZE))),
    ],
    ids=[*SKIPS, "a box, one feature", "a box, three", "a box, left padding", "a loop"],
)
def test_the_cache_saves_time_only(model: Callable[[], nn.Module], data: list[Tensor]) -> None:
    torch.manual_seed(0)
    network = model()
    first, *others = [compressed(network, data, cache=cache) for cache in CACHES]
    assert all(same(first, other) for other in others)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("joined", [SKIPS["of larger batches"], SKIPS["in place"]])
def test_a_branch_may_be_in_some_batches_only(joined: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    batches = [*tokens(), tokens()[0][:2]]
    assert all(tensor.isfinite().all() for tensor in compressed(Skip(joined), batches).values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("between", [halved, other_where_longer, lambda x: x], ids=["halved", "another", "the same"])
def test_runs_are_shared_by_what_reads_the_same_values(
    monkeypatch: pytest.MonkeyPatch, between: Callable[[Tensor], Tensor]
) -> None:
    torch.manual_seed(0)
    model, data = Readers(between), numbers((16, SIZE), (40, SIZE), (40, SIZE))
    shared = compressed(model, data)
    monkeypatch.setattr(reconstruction, "_readers", lambda *_: {})
    assert same(shared, compressed(model, data))


class Branches(nn.Module):
    """Convolutions that read one tensor, and not the same parts of it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.into = nn.Conv2d(3, SIZE, 1)
        self.first = nn.Conv2d(SIZE, SIZE, 3, padding=1)
        self.second = nn.Conv2d(SIZE, SIZE, **options)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.into(x))
        return torch.cat([self.first(x).mean((2, 3)), self.second(x).square().mean((2, 3))], dim=1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options", [{"kernel_size": 1}, {"kernel_size": 3, "padding": 2, "dilation": 2}, {"kernel_size": 3, "groups": 2}]
)
def test_runs_are_shared_by_what_reads_the_same_vectors(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model, data = Branches(**options), numbers(*[(16, 3, 6, 6)] * 3)
    shared = compressed(model, data)
    monkeypatch.setattr(reconstruction, "_readers", lambda *_: {})
    assert same(shared, compressed(model, data))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_scripted_activations_take_no_hooks_and_need_none() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, 64), torch.jit.script(nn.GELU()), nn.Linear(64, 4)).eval()
    x = torch.randn(256, SIZE)
    small = st.compress(model, st.Budget(macs=0.6), example_inputs=x[:2], data=list(x.split(32)))
    assert any(layer.is_factored for layer in small.plan)
    assert small.model(x).isfinite().all()


def test_a_network_for_batches_of_one_size_only() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.middle, self.down = nn.Linear(SIZE, 32), nn.Linear(32, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.up(x)).view(8, 32)
            return self.down(torch.relu(self.middle(y)))

    torch.manual_seed(0)
    data = list(torch.randn(64, SIZE).split(8))
    small = st.compress(Fixed().eval(), st.Budget(macs=0.6), example_inputs=data[0], data=data)
    assert small.model(data[0]).shape == (8, 4)
    assert small.measurement.macs_ratio is not None
    assert small.measurement.macs_ratio <= 0.6
