"""Running a user's model: what it may do, which errors name what, and that nothing is left behind."""

import random
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from cases import inputs, same_state, small_mlp, state
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_sequence

import spectrim as st
from spectrim import errors
from spectrim.core.execution import Inputs, as_inputs, call, evaluating, on_device_of, require_repeatable
from spectrim.layers.tracing import trace

X = inputs(24, 12)
Pair = namedtuple("Pair", "x more")
DATA = [inputs(32, 12, seed=seed) for seed in (2, 3)]
CPU = torch.device("cpu")


class RandomNoise(nn.Module):
    """Adds noise in every mode."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.01 * torch.randn_like(x)


class Dropping(nn.Module):
    """Functional dropout that is never switched off, after a layer and before another."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 16).double(), nn.Linear(16, 16).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(nn.functional.dropout(self.inner(x), 0.1, training=True))


class Drawing(nn.Module):
    """Scales what it adds by a number from one of several generators."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.layer, self.draw = nn.Linear(16, 16).double(), draw

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x) * self.draw()


class Counting(nn.Module):
    """Keeps state from one pass to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return x + self.passes


class Nested(nn.Module):
    """Outputs at some depth, the last of which is noisy."""

    def __init__(self, *, noisy: bool) -> None:
        super().__init__()
        self.body, self.noisy = small_mlp(), noisy

    def forward(self, x: Tensor) -> Any:
        y = self.body(x)
        deep = [torch.zeros(2, dtype=torch.long), None, (float("nan"), y / 0)]
        return {"first": y, "rest": Pair(deep, torch.rand(3) if self.noisy else y.argmax(dim=1))}


def with_module(module: nn.Module) -> nn.Sequential:
    """`small_mlp` with `module` in a block of its own."""
    model = small_mlp()
    model[1] = nn.Sequential()
    model[1].add_module("before", nn.ReLU())
    model[1].add_module("odd", module)
    return model


UNREPEATABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "noise": (lambda: with_module(RandomNoise()), r"first in '1\.odd' \(RandomNoise\); turn dropout and noise off"),
    "functional dropout": (lambda: with_module(Dropping()), r"first in '1\.odd' \(Dropping\)"),
    "torch's numbers": (lambda: with_module(Drawing(lambda: float(torch.rand(())))), r"'1\.odd' \(Drawing\)"),
    "Python's numbers": (lambda: with_module(Drawing(random.random)), r"'1\.odd' \(Drawing\)"),
    "numpy's numbers": (lambda: with_module(Drawing(np.random.random)), r"'1\.odd' \(Drawing\)"),
    "kept state": (lambda: with_module(Counting()), r"'1\.odd' \(Counting\).*no state from one pass"),
    "in the model itself": (lambda: Nested(noisy=True), "Nested is not repeatable: .*, first in its own forward"),
}


class TestRepeatable:
    @pytest.mark.parametrize(("build", "message"), UNREPEATABLE.values(), ids=UNREPEATABLE.keys())
    def test_the_first_module_that_differs_by_itself_is_named(
        self, build: Callable[[], nn.Module], message: str
    ) -> None:
        torch.manual_seed(0)
        model = build().train()
        before = state(model)
        with untouched(model), pytest.raises(errors.ModelError, match=message) as caught:
            require_repeatable(model, as_inputs(X))
        assert "\n" not in str(caught.value)
        assert same_state(model, before)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    def test_noise_in_a_hook_is_the_noise_of_its_module(self) -> None:
        model = small_mlp()
        model[2].register_forward_pre_hook(lambda _, args: (args[0] + torch.randn_like(args[0]),))
        with pytest.raises(errors.ModelError, match=r"first in '2' \(Linear\)"):
            require_repeatable(model, as_inputs(X))

    def test_repeatable_models_pass_in_either_mode(self) -> None:
        for model in (small_mlp(), with_module(nn.Dropout(0.5)), with_module(nn.BatchNorm1d(16).double())):
            with untouched(model.train()):
                require_repeatable(model, as_inputs(X))
        require_repeatable(Nested(noisy=False), as_inputs(X))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64])
    def test_the_order_in_which_kernels_sum_is_no_difference(self, dtype: torch.dtype) -> None:
        class Wobbling(nn.Module):
            wobble = 1.0

            def forward(self, x: Tensor) -> Tensor:
                self.wobble = 1.0 + torch.rand(()).item() * (5e-5 if dtype.is_complex else torch.finfo(dtype).eps)
                return x * self.wobble + torch.tensor([torch.inf, torch.nan, 0.0]).to(dtype)

        require_repeatable(Wobbling(), as_inputs(torch.ones(2, 3).to(dtype)))

    def test_inputs_that_do_not_fit_are_named(self) -> None:
        with pytest.raises(errors.ModelError, match=r"cannot run example_inputs \(float64 \[2, 5\]\)"):
            require_repeatable(small_mlp(), as_inputs(X[:2, :5]))


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Weights, flags, random states and gradient mode are afterwards what they were."""
    before, flags = state(model), [module.training for module in model.modules()]
    numbers = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    yield
    assert same_state(model, before)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert (random.getstate(), str(np.random.get_state())) == numbers[1:]
    assert torch.is_grad_enabled()


class Writing(nn.Module):
    """Writes to its input in one of several ways; `own` makes it work on a copy."""

    def __init__(self, *, own: bool) -> None:
        super().__init__()
        self.own, self.body = own, small_mlp()
        self.body[0] = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(12, 16).double())
        self.body[1], self.body[3] = nn.ReLU(inplace=not own), nn.ReLU(inplace=not own)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone() if self.own else x
        x.mul_(2).sub_(0.1)
        return self.body(x)


def writing(*, own: bool) -> Writing:
    torch.manual_seed(0)
    return Writing(own=own)


class TestWritingToInputs:
    @pytest.mark.parametrize("reconstruct", [False, True])
    def test_the_data_stay_as_they_are_and_the_result_is_the_same(self, reconstruct: bool) -> None:
        example, batches = X.clone(), [batch.clone() for batch in DATA]
        writes, copies = (
            st.compress(
                writing(own=own), st.Ratio(0.4), example_inputs=example, data=batches, reconstruct=reconstruct
            ).model
            for own in (False, True)
        )
        assert torch.equal(example, X)
        assert all(map(torch.equal, batches, DATA))
        assert same_state(writes, state(copies))

    def test_statistics_and_accuracy_are_the_same(self) -> None:
        batches = [batch.clone() for batch in DATA]
        labelled = [(batch, torch.arange(len(batch)) % 4) for batch in batches]
        writes, copies = (st.calibrate(writing(own=own), batches).moments for own in (False, True))
        for name, moments in writes.items():
            assert torch.equal(moments.covariance, copies[name].covariance)
            assert torch.equal(moments.mean, copies[name].mean)
        assert st.accuracy(writing(own=False), labelled) == st.accuracy(writing(own=True), labelled)
        assert all(map(torch.equal, batches, DATA))

    def test_copies_are_made_at_any_depth(self) -> None:
        packed = pack_sequence([torch.ones(2), torch.ones(3)], enforce_sorted=False)
        inputs = Inputs(([X], Pair(X, {"deep": (X, "word")})), {"packed": packed})
        copy = on_device_of(nn.Linear(1, 1), inputs)
        assert copy.args[1].more["deep"][1] == "word"
        for tensor in (copy.args[0][0], copy.args[1].x, copy.args[1].more["deep"][0]):
            assert torch.equal(tensor, X)
            assert tensor is not X
            assert tensor.data_ptr() != X.data_ptr()
        assert torch.equal(copy.kwargs["packed"].data, packed.data)
        assert copy.kwargs["packed"].data.data_ptr() != packed.data.data_ptr()
        assert inputs.map(lambda tensor: tensor).args[0][0] is X

    def test_asking_for_gradients_of_the_inputs_leaves_theirs_alone(self) -> None:
        class Force(nn.Module):
            """The gradient of an energy with respect to the input, as networks for physics give it."""

            def __init__(self) -> None:
                super().__init__()
                self.body = small_mlp()

            def forward(self, x: Tensor) -> Tensor:
                with torch.enable_grad():
                    x.requires_grad_()
                    return torch.autograd.grad(self.body(x).square().sum(), x)[0]

        x = X.clone()
        require_repeatable(Force(), as_inputs(x))
        assert len(st.calibrate(Force(), [x]).moments) == 3
        assert not x.requires_grad


class TestEvaluating:
    def test_buffers_that_a_pass_writes_to_are_put_back(self) -> None:
        class Forced(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm, self.layer = nn.BatchNorm1d(12).double(), nn.Linear(12, 12).double()
                self.register_buffer("steps", torch.zeros((), dtype=torch.long))
                self.register_buffer("passes", torch.zeros(()))

            def forward(self, x: Tensor) -> Tensor:
                self.steps += 1
                self.passes = self.passes + 1
                mean, var = self.norm.running_mean, self.norm.running_var
                return self.layer(nn.functional.batch_norm(x, mean, var, training=True))

        model = Forced()
        with untouched(model):
            st.compress(model, st.Rank(2), example_inputs=X, data=DATA)
            st.measure(model, X, rounds=5)

    def test_everything_is_put_back_after_an_error(self) -> None:
        model = with_module(nn.Dropout()).train()
        fast = torch.backends.mha.get_fastpath_enabled()

        def fail() -> None:
            with evaluating(model):
                torch.rand(3), np.random.rand(3), random.random()
                raise RuntimeError("on purpose")

        with untouched(model), pytest.raises(RuntimeError, match="on purpose"):
            fail()
        assert torch.backends.mha.get_fastpath_enabled() == fast


class Hidden(nn.Linear):
    """A linear layer that does more than one."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def odd_layers() -> dict[str, tuple[nn.Module, str]]:
    """Layers of 16 to 16 that carry more than a weight and a bias, and a part of the reason."""
    hooked, called, patched, saved, masked, frozen = (nn.Linear(16, 16) for _ in range(6))
    hooked.register_forward_hook(lambda *_: None)
    called.register_full_backward_hook(lambda *_: None)
    patched.forward = lambda x: nn.functional.linear(x, patched.weight) * 2  # type: ignore[method-assign]
    saved.register_state_dict_pre_hook(lambda *_: None)
    masked.register_buffer("mask", torch.ones(16))
    frozen.register_parameter("scale", nn.Parameter(torch.ones(16)))
    return {
        "weight_norm": (parametrizations.weight_norm(nn.Linear(16, 16)), "parametrised"),
        "spectral_norm": (parametrizations.spectral_norm(nn.Linear(16, 16)), "parametrised"),
        "orthogonal": (parametrizations.orthogonal(nn.Linear(16, 16)), "parametrised"),
        "older spectral_norm": (nn.utils.spectral_norm(nn.Linear(16, 16)), "hooks"),
        "pruned": (prune.random_unstructured(nn.Linear(16, 16), "weight", 0.5), "hooks"),
        "forward hook": (hooked, "hooks"),
        "backward hook": (called, "hooks"),
        "state hook": (saved, "hooks"),
        "own forward": (patched, "forward was replaced"),
        "more buffers": (masked, "more than a weight and a bias: mask"),
        "more parameters": (frozen, "more than a weight and a bias: scale"),
        "subclass": (Hidden(16, 16), "Hidden is a subclass of nn.Linear"),
    }


class TestLayersThatStay:
    @pytest.mark.parametrize("name", odd_layers().keys())
    @pytest.mark.parametrize("reconstruct", [False, True])
    def test_the_plan_gives_the_reason_and_they_stay_as_they_are(self, name: str, reconstruct: bool) -> None:
        torch.manual_seed(0)
        layer, reason = odd_layers()[name]
        model = with_module(layer.double()).eval()
        with untouched(model):
            compressed = st.compress(model, st.Rank(2), example_inputs=X, data=DATA, reconstruct=reconstruct)
        assert compressed.plan["1.odd"].form == "dense"
        assert reason in compressed.plan["1.odd"].reason
        assert {layer.name for layer in compressed.plan.factored} == {"0", "2", "4"}
        copied = compressed.model.get_submodule("1.odd")
        assert type(copied) is type(layer)
        assert same_state(copied, state(layer))

    def test_in_place_they_are_the_very_same_modules(self) -> None:
        for layer, _ in odd_layers().values():
            model = with_module(layer.double()).eval()
            st.compress(model, st.Rank(2), example_inputs=X, data=DATA, reconstruct=True, inplace=True)
            assert isinstance(model[0], st.LowRankLinear)
            assert model[1].odd is layer

    @pytest.mark.parametrize("reconstruct", [False, True])
    def test_hooks_fire_afterwards(self, reconstruct: bool) -> None:
        model, fired = small_mlp(), []
        model[2].register_forward_hook(lambda *_: fired.append("layer"))
        model.register_forward_hook(lambda *_: fired.append("model"))
        compressed = st.compress(model, st.Rank(2), example_inputs=X, data=DATA, reconstruct=reconstruct)
        assert "hooks" in compressed.plan["2"].reason
        for network in (model, compressed.model):
            fired.clear()
            network(X)
            assert fired == ["layer", "model"]

    def test_a_weight_of_whole_numbers(self) -> None:
        class Whole(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                numbers = torch.randint(-127, 127, (16, 16), dtype=torch.int8)
                self.weight = nn.Parameter(numbers, requires_grad=False)

            def forward(self, x: Tensor) -> Tensor:
                return nn.functional.linear(x, self.weight.to(x.dtype) / 127)

        class Body(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body, self.unused = with_module(Whole()), nn.Linear(16, 16)
                self.unused.weight = nn.Parameter(torch.ones(16, 16, dtype=torch.int8), requires_grad=False)

            def forward(self, x: Tensor) -> Tensor:
                return self.body(x)

        model = Body()
        compressed = st.compress(model, st.Rank(2), example_inputs=X, data=DATA)
        assert compressed.plan["body.1.odd"].reason == "Whole layers are not factored"
        reason = compressed.plan["unused"].reason
        assert "weight is not an ordinary floating-point parameter (Parameter int8 on cpu)" in reason
        assert compressed.model.body[1].odd.weight.dtype == torch.int8

    def test_a_tensor_of_another_kind(self) -> None:
        class Marked(Tensor):
            pass

        model = small_mlp()
        model[2].weight = nn.Parameter(model[2].weight.detach().as_subclass(Marked))
        plan = st.plan(st.analyze(model, X), st.Rank(2))
        assert "(Marked float64 on cpu)" in plan["2"].reason
        assert len(plan.factored) == 2


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_a_quantised_layer_is_refused_and_named() -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    if not {"fbgemm", "x86", "qnnpack"} & set(torch.backends.quantized.supported_engines):
        pytest.skip("this torch has no quantised kernels")
    model = quantization.quantize_dynamic(small_mlp(dtype=torch.float32), {"2"})
    for run in (
        lambda: st.analyze(model, X.float()),
        lambda: st.compress(model, st.Rank(2), example_inputs=X.float()),
    ):
        with pytest.raises(errors.ModelError, match=r"'2\._packed_params.*quantise it afterwards"):
            run()


class TestWithoutValues:
    @pytest.mark.parametrize(
        "run",
        {
            "analyze": lambda m: st.analyze(m, X),
            "compress": lambda m: st.compress(m, st.Budget(macs=0.6), example_inputs=X, data=DATA),
            "compress on meta": lambda m: st.compress(m, st.Rank(2), example_inputs=X.to("meta")),
            "calibrate": lambda m: st.calibrate(m, DATA),
            "require_repeatable": lambda m: require_repeatable(m, as_inputs(X)),
        }.items(),
        ids=lambda case: case[0],
    )
    def test_a_model_on_the_meta_device_is_to_be_loaded_first(self, run: Any) -> None:
        model = small_mlp().to("meta")
        with pytest.raises(errors.ModelError, match=r"6 of the 6 tensors of Sequential.*'0\.weight'; load the weights"):
            run[1](model)
        assert all(parameter.is_meta for parameter in model.parameters())

    def test_one_layer_on_the_meta_device_is_named(self) -> None:
        model = small_mlp()
        model[2].to("meta")
        with pytest.raises(errors.ModelError, match=r"2 of the 6 tensors.*first '2\.weight'"):
            st.compress(model, st.Rank(2), example_inputs=X)

    def test_costs_can_be_counted_all_the_same(self) -> None:
        measured = st.measure(small_mlp().to("meta"), X, latency=False)
        assert measured.macs == st.measure(small_mlp(), X, latency=False).macs

    def test_a_lazy_model_stays_lazy(self) -> None:
        model = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(4)).double()
        with pytest.raises(errors.ModelError, match=r"0\.weight of Sequential has no shape yet; run the model once"):
            st.compress(model, st.Rank(2), example_inputs=X)
        assert isinstance(model[0], nn.LazyLinear)


def compiled_in_place(model: nn.Module) -> nn.Module:
    model[2].compile(backend="eager")
    return model


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (
            nn.DataParallel,
            r"of class DataParallel; give what it wraps, model\.module, and wrap that again",
        ),
        (
            lambda model: nn.Sequential(nn.DataParallel(model)),
            r"model's '0' is of class DataParallel.*model\.0\.module",
        ),
        (lambda model: torch.compile(model, backend="eager"), r"OptimizedModule.*model\._orig_mod, and compile"),
        (compiled_in_place, r"'2' is compiled.*set model\.2\._compiled_call_impl = None"),
        (lambda model: torch.jit.trace(model, X), "the model is TorchScript.*give the module it was made from"),
    ],
    ids=["wrapped", "wrapped inside", "compiled", "compiled in place", "TorchScript"],
)
@pytest.mark.parametrize(
    "run",
    [
        lambda model: st.compress(model, st.Rank(2), example_inputs=X),
        lambda model: st.compress(model, st.Budget(macs=0.5), example_inputs=X, data=[X]),
        lambda model: st.analyze(model, X),
        lambda model: st.calibrate(model, [X]),
        lambda model: st.compress(model, st.Rank(2), example_inputs=X, inplace=True),
    ],
    ids=["compress", "with data", "analyze", "calibrate", "in place"],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_wrapped_and_compiled_models_are_refused(wrap: Any, message: str, run: Any) -> None:
    model = wrap(small_mlp().eval())
    before = state(model)
    with pytest.raises(errors.ModelError, match=message):
        run(model)
    assert same_state(model, before)


class OneSize(nn.Module):
    """Runs batches of 24 only."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small_mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).reshape(24, 4)


class TestData:
    @pytest.mark.parametrize("reconstruct", [False, True])
    def test_a_batch_of_a_size_that_the_model_cannot_run(self, reconstruct: bool) -> None:
        model, data = OneSize(), [X, X[:7]]
        message = r"cannot run batch 1 \(float64 \[7, 12\]\): shape"
        with untouched(model), pytest.raises(errors.DataError, match=message):
            st.compress(model, st.Rank(2), example_inputs=X, data=data, reconstruct=reconstruct)

    def test_batches_on_another_device_are_moved_and_those_without_values_are_named(self) -> None:
        with pytest.raises(errors.DataError, match=r"batch 0 \(float64 \[24, 12\]\): .*meta"):
            st.compress(small_mlp(), st.Rank(2), example_inputs=X, data=[X.to("meta")])
        with pytest.raises(errors.ModelError, match=r"example_inputs.*meta"):
            st.compress(small_mlp(), st.Rank(2), example_inputs=X.to("meta"))

    @pytest.mark.parametrize("reconstruct", [False, True])
    def test_a_layer_that_the_data_do_not_reach(self, reconstruct: bool) -> None:
        class Forked(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body, self.small = small_mlp(), nn.Linear(4, 4).double()

            def forward(self, x: Tensor) -> Tensor:
                y = self.body(x)
                return self.small(y) if len(x) < 30 else y

        model = Forked()
        compressed = st.compress(model, st.Rank(1), example_inputs=X, data=DATA, reconstruct=reconstruct)
        assert compressed.plan["small"].reason.startswith("the calibration data did not reach it")
        assert same_state(compressed.model.small, state(model.small))

    @pytest.mark.filterwarnings("ignore:the compressed network multiplies")  # more rows than the dense one
    @pytest.mark.parametrize("reconstruct", [False, True])
    def test_layers_that_see_rows_chosen_by_value(self, reconstruct: bool) -> None:
        """The compressed network chooses other rows than the dense one."""

        class Expert(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body, self.expert = small_mlp(), nn.Linear(4, 4).double()

            def forward(self, x: Tensor) -> Tensor:
                y = self.body(x)
                chosen = y[:, 0] > 0
                y[chosen] = self.expert(y[chosen])
                return y

        compressed = st.compress(Expert(), st.Rank(1), example_inputs=X, data=DATA, reconstruct=reconstruct)
        assert compressed.plan["expert"].form == "linear"
        assert compressed.model(X).isfinite().all()


class Odd(nn.Module):
    """Consults the gradient mode, calls layers by keyword, and has parts that give None or are never called."""

    class Nothing(nn.Module):
        def forward(self, _: Tensor) -> None:
            return None

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(12, 12).double() for _ in range(3))
        self.nothing, self.unused = self.Nothing(), nn.Linear(12, 12).double()
        self.conv, self.up = nn.Conv1d(1, 6, 3, padding=1).double(), nn.ConvTranspose2d(6, 6, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        assert self.nothing(x) is None
        y = torch.relu(self.second(input=self.first(x)))
        y = y if torch.is_grad_enabled() else y.detach()
        y = self.conv(input=y.unsqueeze(1)).unsqueeze(-1)
        y = self.up(y, output_size=(13, 2))[:, 0, :12, 0]
        return self.last(y)


@pytest.mark.parametrize("reconstruct", [False, True])
def test_unusual_ways_to_call_layers(reconstruct: bool) -> None:
    torch.manual_seed(0)
    model = Odd()
    with untouched(model):
        compressed = st.compress(model, st.Rank(2), example_inputs=X, data=DATA, reconstruct=reconstruct)
    assert compressed.plan["unused"].reason == "unused is not called by the model"
    assert {layer.name for layer in compressed.plan.factored} >= {"first", "second", "last", "up"}
    assert compressed.model(X).shape == (24, 12)
    assert trace(model, as_inputs(X)).calls == dict.fromkeys(("first", "second", "conv", "up", "last"), 1)


@pytest.mark.parametrize("reconstruct", [False, True])
def test_a_forward_pass_in_inference_mode(reconstruct: bool) -> None:
    class Served(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small_mlp()

        @torch.inference_mode()
        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    compressed = st.compress(Served(), st.Rank(2), example_inputs=X, data=DATA, reconstruct=reconstruct)
    assert compressed.model(X).isfinite().all()
    assert not any(parameter.is_inference() for parameter in compressed.model.parameters())


@pytest.mark.parametrize("rule", [st.Rank(2), st.Budget(macs=0.7)], ids=str)
def test_a_network_that_was_made_in_inference_mode(rule: st.Rank | st.Budget) -> None:
    with torch.inference_mode():
        model = small_mlp()
    compressed = st.compress(model, rule, example_inputs=X, data=DATA)
    assert compressed.model(X).isfinite().all()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_error_inside_the_model_is_one_line_that_names_the_inputs() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
            raise KeyError("two\nlines")

    with pytest.raises(errors.ModelError, match=r"Failing cannot run batch 3 \(float64 \[24, 12\], scale=") as caught:
        call(Failing(), Inputs((X,), {"scale": X}), what="batch 3")
    assert "\n" not in str(caught.value)


SAMPLES = {
    "a table, then images": ((torch.zeros(9), torch.zeros(4, 3, 8, 8)), 4),
    "a scalar, then images": ((torch.tensor(1.0), torch.zeros(4, 3, 8, 8)), 4),
    "a mask, then texts": ((torch.zeros(9, 9), torch.zeros(4, 9)), 4),
    "texts, then a mask": ((torch.zeros(4, 9), torch.zeros(9, 9)), 4),
    "one text, then a mask": ((torch.zeros(1, 9), torch.zeros(9, 9)), 1),
    "positions, then texts": ((torch.zeros(1, 9), torch.zeros(4, 9), torch.zeros(4, 9)), 4),
    "edges, then nodes": ((torch.zeros(2, 30), torch.zeros(9, 5)), 2),
    "texts with lengths": ((torch.zeros(4, 9), torch.zeros(4)), 4),
    "two vectors": ((torch.zeros(4), torch.zeros(4)), 4),
    "a square batch": ((torch.zeros(4, 4),), 4),
    "no boxes": ((torch.zeros(0, 4), torch.zeros(4, 3, 8, 8)), 4),
    "no samples": ((torch.zeros(0, 4),), 0),
    "no tensors": ((1.0,), 1),
    "jagged texts": ((torch.nested.nested_tensor([torch.zeros(5, 3), torch.zeros(2, 3)], layout=torch.jagged),), 2),
    "packed texts": ((pack_sequence([torch.zeros(5, 3), torch.zeros(2, 3)]),), 2),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_lie_along_the_dimension_that_tensors_share(name: str) -> None:
    inputs, number = SAMPLES[name]
    assert as_inputs(inputs).samples == number


def test_vectors_of_one_image_are_not_taken_for_samples() -> None:
    """A mask of places comes before the texts."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

        def forward(self, mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(mask, dim=1) @ self.down(torch.relu(self.up(x)))

    example = (torch.zeros(200, 200), torch.randn(1, 200, 16))
    with pytest.warns(UserWarning, match="the calibration data are one sample"):
        st.compress(Masked(), st.Rank(4), example_inputs=example, data=[example])
