"""Outputs that the cache keeps replace running the blocks again, and change nothing else."""

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import spectrim as st
from spectrim.analysis.activation_cache import ActivationCache
from spectrim.core.execution import as_inputs


class Counting(nn.Module):
    """Counts how often it really runs."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.inside = nn.Sequential(*layers)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.inside(x)


class Net(nn.Module):
    """Three blocks, the second called twice, with steps that work in place between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = Counting(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.again = Counting(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU())
        self.last = Counting(nn.Conv2d(6, 8, 3), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y.relu_()
        z = self.again(y)
        z += y
        z = self.again(z)
        z.mul_(2)
        return self.head(self.last(z).mean(dim=(2, 3)))


def net() -> Net:
    return Net().eval()


def tried(model: Net, x: Tensor, *, free_bytes: int) -> ActivationCache:
    """A cache that knows the blocks that may be recalled; the runs that this took do not count."""
    cache = ActivationCache(model, free_bytes=free_bytes, tried_on=as_inputs(x))
    assert {"first", "again", "last"} <= cache.blocks
    model.first.runs = model.again.runs = model.last.runs = 0
    return cache


def test_a_second_pass_gives_the_same_without_running_the_kept_blocks() -> None:
    model, x = net(), torch.randn(4, 2, 8, 8)
    cache = tried(model, x, free_bytes=10**7)
    outputs = []
    for _ in range(3):
        with cache.recalling(0, at_hand=()) as stop, torch.no_grad():
            outputs.append(model(x))
            stop()
    assert model.first.runs == model.last.runs == 1
    assert model.again.runs == 2
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_comes_after_the_stop_runs_anew() -> None:
    model, x = net(), torch.randn(4, 2, 8, 8)
    cache = tried(model, x, free_bytes=10**7)
    for _ in range(2):
        with cache.recalling(0, at_hand=()) as stop, torch.no_grad():
            handle = model.again.inside[0].register_forward_hook(lambda *_, end=stop: end())
            model(x)
        handle.remove()
    assert (model.first.runs, model.again.runs, model.last.runs) == (1, 4, 2)


def test_each_batch_has_its_own_outputs_and_the_bytes_suffice() -> None:
    model = net()
    batches = torch.randn(8, 2, 8, 8).split(4)
    size = 4 * 6 * 8 * 8 * 4
    cache = tried(model, batches[0][:1], free_bytes=size)
    for _ in range(2):
        for number, x in enumerate(batches):
            with cache.recalling(number, at_hand=()) as stop, torch.no_grad():
                output = model(x)
                stop()
            torch.testing.assert_close(output, net()(x), rtol=0, atol=0)
    # the bytes are for one output: the first batch's first block is not run again, the second's is
    assert cache.free_bytes >= 0
    assert model.first.runs == 3


def test_an_own_forward_of_a_module_is_put_back() -> None:
    model, x = net(), torch.randn(4, 2, 8, 8)
    original = model.first.forward
    model.first.forward = lambda y: original(y) + 1
    patched = model.first.forward
    cache = ActivationCache(model, free_bytes=10**7, tried_on=as_inputs(x))
    outputs = []
    for _ in range(2):
        with cache.recalling(0, at_hand=()) as stop, torch.no_grad():
            outputs.append(model(x))
            stop()
    assert torch.equal(*outputs)
    assert model.first.forward is patched


@pytest.mark.parametrize("share", [0.4, 0.7])
def test_reconstruction_is_the_same_with_and_without(share: float) -> None:
    model, x = net(), torch.randn(48, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    states = []
    for cache_bytes in (0, 10**7):
        dense = copy.deepcopy(model)
        small = st.compress(dense, st.Budget(macs=share), example_inputs=x[:1], data=x.split(16), cache=cache_bytes)
        # its steps in place forbid gradients, so the loss metric cannot be had
        assert small.plan.metric == "activation"
        states.append(small.model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_the_loss_metric_of_a_network_without_gradients_raises() -> None:
    x = torch.randn(8, 2, 8, 8)
    with pytest.raises(st.errors.SpectrimError, match=r"Net cannot be differentiated: .*activation metric"):
        st.compress(net(), st.Budget(macs=0.5), example_inputs=x[:1], data=[x], metric="loss")


class Keeps(nn.Module):
    """A block that leaves what it gives to others, in one of several ways."""

    def __init__(self, how: str, store: list[Tensor]) -> None:
        super().__init__()
        self.how, self.latest = how, None
        self.__dict__["store"] = store
        self.inside = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        if how == "hook inside":
            self.inside[0].register_forward_hook(self.keep)

    def keep(self, _: nn.Module, __: object, output: Tensor) -> None:
        self.latest = output

    def forward(self, x: Tensor) -> Tensor:
        y = self.inside(x)
        if self.how == "list":
            self.store.append(y)
        elif self.how == "attribute":
            self.latest = y
        elif self.how == "input":
            x.mul_(0.5)
        return y


class Skips(nn.Module):
    """Reads later what a block has left."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.__dict__["store"] = []
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.down = Keeps(how, self.store)
        self.middle = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        y = self.middle(self.down(stem))
        skip = self.store.pop() if self.store else self.down.latest
        return self.head(torch.cat([y, stem if skip is None else skip], dim=1))


@pytest.mark.parametrize("how", ["nothing", "hook inside", "list", "attribute", "input"])
def test_a_block_that_does_more_than_give_its_output_is_run(how: str) -> None:
    model, x = Skips(how).eval(), torch.randn(32, 2, 8, 8)
    blocks = ActivationCache(model, free_bytes=10**8, tried_on=as_inputs(x)).blocks
    assert "middle" in blocks
    assert ("down" in blocks) == (how == "nothing")
    with torch.no_grad():
        expected = model(x)
    rule, data = st.Budget(macs=0.5), x.split(8)
    with_cache, without = (
        st.compress(model, rule, example_inputs=x[:1], data=data, exclude="head", cache=cache).model
        for cache in (None, 0)
    )
    with torch.no_grad():
        torch.testing.assert_close(with_cache(x), without(x), rtol=1e-5, atol=1e-6)
        assert torch.equal(model(x), expected)


class OnePathOrTheOther(nn.Module):
    """Which of two layers runs depends on the data; blocks follow."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(12, 24), nn.Linear(12, 24)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(24, 24), nn.ReLU()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x) if float(x.detach().sum()) > 0 else self.other(x)
        for block in self.blocks:
            y = block(y)
        return y


def test_batches_that_do_not_come_to_a_layer_recall_nothing_behind_it() -> None:
    torch.manual_seed(0)
    model, x = OnePathOrTheOther(), torch.randn(64, 12)
    data = [batch - batch.mean() + sign for batch, sign in zip(x.split(16), (1, -1, 1, -1), strict=True)]
    results = [
        st.compress(model, st.Budget(macs=0.5), example_inputs=data[0], data=data, cache=size).model
        for size in (0, 10**8)
    ]
    first, second = (torch.cat([network(batch) for batch in data]) for network in results)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


class Chain(nn.Module):
    """Blocks one after the other; the last one may read what the first one gave."""

    def __init__(self, *, skip: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Counting(nn.Linear(8, 8), nn.ReLU()) for _ in range(4))
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        first = y = self.blocks[0](x)
        for block in self.blocks[1:-1]:
            y = block(y)
        return self.blocks[-1](y + first if self.skip else y)


@pytest.mark.parametrize("skip", [False, True])
def test_a_chain_keeps_one_output_where_nothing_reads_those_before(skip: bool) -> None:
    model, x = Chain(skip=skip).eval(), torch.randn(64, 8)
    cache = ActivationCache(model, free_bytes=10**6, tried_on=as_inputs(x))
    assert {f"blocks.{number}" for number in range(4)} <= cache.blocks
    with torch.no_grad():
        expected = model(x)
    for block in model.blocks:
        block.runs = 0
    for number in range(1, 4):
        with cache.recalling(0, at_hand=()) as stop, torch.no_grad():
            handle = model.blocks[number].inside[0].register_forward_pre_hook(lambda *_, end=stop: end())
            assert torch.equal(model(x), expected)
        handle.remove()
        assert (10**6 - cache.free_bytes) // (64 * 8 * 4) == (number if skip else 1)
    assert [block.runs for block in model.blocks] == [1, 2, 3, 3]


def test_blocks_that_give_tuples_are_recalled() -> None:
    class Pair(Counting):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return super().forward(x), None

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = Pair(nn.Linear(4, 4)), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.first(x)[0])

    model, x = Net().eval(), torch.randn(8, 4)
    cache = ActivationCache(model, free_bytes=10**6, tried_on=as_inputs(x))
    assert "first" in cache.blocks
    model.first.runs = 0
    with torch.no_grad():
        expected = model(x)
        for _ in range(2):
            with cache.recalling(0, at_hand=()) as stop:
                assert torch.equal(model(x), expected)
                stop()
    assert model.first.runs == 2


def test_what_is_forgotten_takes_no_bytes() -> None:
    model, x = Chain(skip=False).eval(), torch.randn(64, 8)
    cache = ActivationCache(model, free_bytes=64 * 8 * 4, tried_on=as_inputs(x))  # for one output, and not a byte more
    with torch.no_grad():
        expected = model(x)
        for _ in range(2):
            with cache.recalling(0, at_hand=()) as stop:
                handle = model.blocks[3].inside[0].register_forward_pre_hook(lambda *_, end=stop: end())
                assert torch.equal(model(x), expected)
            handle.remove()


def test_what_is_kept_of_a_batch_makes_room_for_what_comes_after_it() -> None:
    model, batches = Chain(skip=False).eval(), [torch.randn(64, 8), torch.randn(64, 8)]
    cache = ActivationCache(model, free_bytes=64 * 8 * 4, tried_on=as_inputs(batches[0]))  # for one output of one batch
    assert {f"blocks.{number}" for number in range(3)} <= cache.blocks
    with torch.no_grad():
        for number in (1, 2, 3, 3):
            for block in model.blocks:
                block.runs = 0
            for position, x in enumerate(batches):
                handle = model.blocks[number].inside[0].register_forward_pre_hook(lambda *_: stop())
                with cache.recalling(position, at_hand=()) as stop:
                    model(x)
                handle.remove()
    # the second batch alone, for which no bytes are left
    assert [block.runs for block in model.blocks[:3]] == [1, 1, 1]


def test_a_block_that_is_too_large_to_keep_is_forgotten_with_the_others() -> None:
    class Wide(Chain):
        def __init__(self) -> None:
            super().__init__(skip=False)
            sizes = ((8, 8), (8, 128), (128, 8), (8, 8))
            self.blocks = nn.ModuleList(Counting(nn.Linear(*size), nn.ReLU()) for size in sizes)

    model, x = Wide().eval(), torch.randn(64, 8)
    cache = ActivationCache(model, free_bytes=64 * 128 * 4, tried_on=as_inputs(x))
    with torch.no_grad():
        expected = model(x)
        assert "blocks.1" in cache.blocks
        for number in (1, 3, 3):
            with cache.recalling(0, at_hand=()) as stop:
                handle = model.blocks[number].inside[0].register_forward_pre_hook(lambda *_, end=stop: end())
                assert torch.equal(model(x), expected)
            handle.remove()


def test_what_lies_beside_the_blocks_is_recalled_but_layers_are_not() -> None:
    class Pool(nn.MaxPool1d):
        runs = 0

        def forward(self, x: Tensor) -> Tensor:
            self.runs += 1
            return super().forward(x)

    pool = Pool(2)
    inside = nn.Sequential(nn.Linear(4, 8), pool, Counting(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    model, x = nn.Sequential(inside).eval(), torch.randn(8, 4)
    cache = ActivationCache(model, free_bytes=10**6, tried_on=as_inputs(x))
    assert cache.blocks == {"0", "0.1", "0.2", "0.2.inside"}
    with torch.no_grad():
        expected, pool.runs = model(x), 0
        for _ in range(3):
            handle = inside[3].register_forward_pre_hook(lambda *_: stop())
            with cache.recalling(0, at_hand=()) as stop:
                assert torch.equal(model(x), expected)
            handle.remove()
    assert pool.runs == 1


class Shift(nn.Module):
    """A module of someone's own."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def chain(*, inplace: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    first = (nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=inplace), nn.MaxPool2d(2))
    second = (nn.Conv2d(6, 8, 3), nn.ReLU(inplace=inplace), nn.Flatten())
    return nn.Sequential(*first, *second, nn.Linear(8 * 16, 24), nn.ReLU())


class Chained(nn.Module):
    """A chain of layers with a head after it."""

    def __init__(self, *, skips: bool = False) -> None:
        super().__init__()
        self.features, self.head = chain(), nn.Linear(24, 3)
        self.skips = skips

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        return self.head(y + x.flatten(1)[:, :24] if self.skips else y)


class Calls(TorchFunctionMode):
    """Which layers' functions are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (functional.conv2d, functional.linear):
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def stopped_at(model: nn.Module, layer: nn.Module, cache: ActivationCache, x: Tensor) -> tuple[Tensor, list[str]]:
    """The output of a pass that is final up to a layer, and what was called."""
    with cache.recalling(0, at_hand=()) as stop, torch.no_grad(), Calls() as calls:
        handle = layer.register_forward_pre_hook(lambda *_: stop())
        try:
            return model(x), calls.names
        finally:
            handle.remove()


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_pass_through_a_chain_of_layers_begins_at_the_layer_at_hand(skips: bool, inplace: bool) -> None:
    x = torch.randn(4, 2, 14, 14)
    model = Chained(skips=skips).eval()
    model.features = chain(inplace=inplace).eval()
    cache = ActivationCache(model, free_bytes=10**7, tried_on=as_inputs(x))
    expected = model(x).detach()
    for layer, first, later in (
        (model.features[4], ["conv2d", "conv2d", "linear", "linear"], ["conv2d", "linear", "linear"]),
        (model.features[7], ["conv2d", "linear", "linear"], ["linear", "linear"]),
        (model.head, ["linear", "linear"], ["linear"]),
    ):
        for calls in (first, later):
            output, called = stopped_at(model, layer, cache, x)
            assert called == calls
            assert torch.equal(output, expected)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_network_that_is_a_chain_itself_begins_at_the_layer_at_hand() -> None:
    x, model = torch.randn(4, 2, 14, 14), chain().eval()
    cache = ActivationCache(model, free_bytes=10**7, tried_on=as_inputs(x))
    for calls in (["conv2d", "conv2d", "linear"], ["linear"]):
        output, called = stopped_at(model, model[7], cache, x)
        assert called == calls
        assert torch.equal(output, model(x))


def test_what_arrives_in_a_chain_is_kept_while_the_bytes_suffice() -> None:
    x, model = torch.randn(4, 2, 14, 14), chain().eval()
    cache = ActivationCache(model, free_bytes=2048, tried_on=as_inputs(x))  # what arrives at 4 is larger
    assert stopped_at(model, model[4], cache, x)[1] == ["conv2d", "conv2d", "linear"]
    assert stopped_at(model, model[4], cache, x)[1] == ["conv2d", "conv2d", "linear"]
    assert stopped_at(model, model[7], cache, x)[1] == ["conv2d", "conv2d", "linear"]
    assert stopped_at(model, model[7], cache, x)[1] == ["linear"]


@pytest.mark.parametrize("how", ["hook", "pre-hook", "own module", "own forward", "subclass"])
def test_a_chain_that_may_do_more_than_compute_is_run_from_its_beginning(how: str) -> None:
    x, model = torch.randn(4, 2, 14, 14), chain().eval()
    if how == "hook":
        model[2].register_forward_hook(lambda *_: None)
    elif how == "pre-hook":
        model[2].register_forward_pre_hook(lambda *_: None)
    elif how == "own module":
        model[2] = Shift()
    elif how == "own forward":
        model[2].forward = torch.tanh
    else:
        model = type("Own", (nn.Sequential,), {})(*model).eval()
    cache = ActivationCache(model, free_bytes=10**7, tried_on=as_inputs(x))
    for _ in range(2):
        output, called = stopped_at(model, model[7], cache, x)
        assert called == ["conv2d", "conv2d", "linear"]
        assert torch.equal(output, model(x))


def test_a_chain_that_is_called_twice_keeps_the_calls_apart() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.twice = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.twice(self.twice(x) + 1)

    x, model = torch.randn(4, 6), Twice().eval()
    cache = ActivationCache(model, free_bytes=10**7, tried_on=as_inputs(x))
    for end in (1, 2, 3, 2, 1, 3):
        seen: list[Tensor] = []

        def stop_at(*_: object, seen: list[Tensor] = seen, end: int = end) -> None:
            seen.append(x)
            if len(seen) == end:
                stop()

        handle = model.twice[2].register_forward_pre_hook(stop_at)
        with cache.recalling(0, at_hand=()) as stop, torch.no_grad():
            output = model(x)
        handle.remove()
        assert torch.equal(output, model(x))


@pytest.mark.parametrize("make", [chain, Chained])
def test_chains_are_compressed_as_without_a_cache(make: Callable[[], nn.Module]) -> None:
    x = torch.randn(48, 2, 14, 14, generator=torch.Generator().manual_seed(1))
    outputs = []
    for cache in (0, 3 * 10**4, None):
        small = st.compress(make().eval(), st.Budget(macs=0.6), example_inputs=x[:1], data=x.split(16), cache=cache)
        outputs.append(small.model(x).detach())
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)
    assert torch.allclose(outputs[0], outputs[2], atol=1e-5)


def test_narrowed_neurons_in_a_chain_are_as_without_a_cache() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 48), nn.GELU(), nn.Linear(48, 12), nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 5)
    )
    x, outputs = torch.randn(256, 12, generator=torch.Generator().manual_seed(1)), []
    for cache in (0, None):
        budget = st.Budget(macs=0.5)
        small = st.compress(model, budget, example_inputs=x[:1], data=x.split(64), forms=["width"], cache=cache)
        assert any(layer.form == "width" for layer in small.plan)
        outputs.append(small.model(x).detach())
    assert torch.allclose(*outputs, atol=1e-5)


def convolution(into: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(into, out, 3, padding=1)


class SharedActivation(nn.Module):
    """One module at several places of a chain, and a child of the network."""

    def __init__(self, activation: nn.Module, *widths: int) -> None:
        super().__init__()
        self.activation = activation
        parts = [part for pair in pairwise((3, *widths)) for part in (convolution(*pair), activation)]
        self.net = nn.Sequential(*parts, nn.Conv2d(widths[-1], 8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class InOtherBlocks(nn.Module):
    """A chain that is called by a block as well."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Sequential(convolution(3, 16), nn.ReLU(), convolution(16, 3))
        self.block = Counting(self.q, nn.ReLU())
        self.g, self.h = convolution(3, 16), convolution(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.g(self.q(self.q(self.block(x)))))


class OrderOfData(nn.Module):
    """The order of its parts depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = nn.Sequential(convolution(3, 16), nn.ReLU(), convolution(16, 3))
        self.layer, self.head = convolution(3, 3), convolution(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max() < 10:
            return self.head(self.layer(self.chain(x)))
        return self.head(self.chain(self.layer(x / 10)))


class OrderOfBlocks(nn.Module):
    """The order of two blocks, or how often the first one is called, depends on the data."""

    def __init__(self, block: Callable[..., nn.Module], *, inverted: bool) -> None:
        super().__init__()
        self.inverted = inverted
        self.a = block(convolution(3, 16), nn.ReLU(), convolution(16, 16), nn.ReLU(), convolution(16, 3))
        self.b = block(convolution(3, 16), nn.ReLU(), convolution(16, 3))
        self.head = convolution(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        is_small = x.abs().max() < 10
        if self.inverted:
            return self.head(self.b(self.a(x)) if is_small else self.a(self.b(x / 10)))
        return self.head(self.a(self.b(self.a(x) if is_small else x)))


class LaterLayerFirst(nn.Module):
    """A layer of a chain is called before the chain, as the data say; or has a name outside of its block as well."""

    def __init__(self, *, alias: bool) -> None:
        super().__init__()
        if alias:
            self.alias = convolution(3, 3)
        layer = self.alias if alias else convolution(3, 3)
        self.f = nn.Sequential(convolution(3, 3), nn.ReLU(), layer, nn.ReLU())
        self.g, self.head = nn.Sequential(convolution(3, 16), nn.ReLU(), convolution(16, 3)), convolution(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max() < 10:
            return self.head(self.g(self.f(self.f[2](x))))
        return self.head(self.f(self.g(x / 10)))


class NamedAlike(nn.Module):
    """A block whose name is what a place in a chain might be called."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.f = name, nn.Sequential(convolution(3, 3), nn.ReLU(), convolution(3, 3))
        self.add_module(name, nn.Sequential(convolution(3, 3), nn.BatchNorm2d(3), nn.ReLU()))
        self.head = convolution(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.f(self.get_submodule(self.name)(x)))


@pytest.mark.parametrize(
    "make",
    [
        partial(SharedActivation, nn.ReLU(), 16, 32, 16),
        partial(SharedActivation, nn.ReLU(), 16, 16, 16),
        partial(SharedActivation, nn.Softmax(1), 16, 16, 16),
        InOtherBlocks,
        OrderOfData,
        partial(OrderOfBlocks, Counting, inverted=True),
        partial(OrderOfBlocks, Counting, inverted=False),
        partial(OrderOfBlocks, nn.Sequential, inverted=True),
        partial(OrderOfBlocks, nn.Sequential, inverted=False),
        partial(LaterLayerFirst, alias=False),
        partial(LaterLayerFirst, alias=True),
        partial(NamedAlike, "f:x"),
        partial(NamedAlike, "f:1"),
    ],
)
def test_compressed_as_without_a_cache_whatever_calls_the_parts(make: Callable[[], nn.Module]) -> None:
    draw = torch.Generator().manual_seed(1)
    data = [torch.randn(8, 3, 8, 8, generator=draw) * (1 + number % 2 * 10) for number in range(6)]
    outputs = []
    for cache in (0, None):
        torch.manual_seed(0)
        small = st.compress(make().eval(), st.Budget(macs=0.6), example_inputs=data[0][:1], data=data, cache=cache)
        outputs.append(small.model(data[0]).detach())
    assert torch.allclose(*outputs, atol=1e-5)
