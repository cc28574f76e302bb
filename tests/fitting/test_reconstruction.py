"""Sequential reconstruction: outputs get better, layers that are left out stay, order does not matter."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import IMAGE_FORMS, Double, Residual, SharedModule, Tied, inputs, same_state, small_cnn, small_mlp, state
from torch import Tensor, nn

import spectrim as st

Batch = tuple[Tensor, ...]


class TwoInputs(nn.Module):
    """Two branches, the second one left out where its input is not given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.main, self.side = nn.Linear(10, 16), nn.Linear(6, 16)
        self.deep, self.last = nn.Linear(16, 16), nn.Linear(16, 4)
        self.double()

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        y = torch.relu(self.main(x))
        if z is not None:
            y = y + torch.relu(self.side(z))
        return self.last(torch.relu(self.deep(y)) + y)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().double().eval()


def singles(x: Tensor) -> list[Batch]:
    return [(part,) for part in x.split(16)]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[Batch]]] = {
    "mlp": (small_mlp, singles(inputs(96, 12))),
    "mlp without biases": (lambda: small_mlp(bias=False), singles(inputs(96, 12))),
    "cnn": (small_cnn, singles(inputs(48, 3, 12, 12))),
    "cnn without biases": (lambda: small_cnn(bias=False), singles(inputs(48, 3, 12, 12))),
    "residual": (Residual, singles(inputs(48, 3, 10, 10))),
    "called twice": (lambda: seeded(Double), singles(inputs(96, 6))),
    "tied": (lambda: seeded(Tied), singles(inputs(96, 8))),
    "two names": (lambda: seeded(SharedModule), singles(inputs(96, 8))),
    "two inputs": (TwoInputs, list(zip(inputs(96, 10).split(16), inputs(96, 6, seed=2).split(16), strict=True))),
}
EVERY = pytest.mark.parametrize(("build", "data"), NETWORKS.values(), ids=NETWORKS.keys())


def output_of(model: nn.Module, *args: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(*args)
    return y


def outputs_on(model: nn.Module, data: list[Batch]) -> Tensor:
    return torch.cat([output_of(model, *batch) for batch in data])


def compress(
    model: nn.Module, data: list[Batch], *, again: bool = True, share: float = 0.35, cache: int | None = None
) -> st.Compressed:
    forms = ("spatial", "channel")
    rule = st.Ratio(share)
    return st.compress(model, rule, example_inputs=data[0], data=data, reconstruct=again, forms=forms, cache=cache)


@EVERY
def test_the_outputs_are_nearer_to_the_dense_ones(build: Callable[[], nn.Module], data: list[Batch]) -> None:
    model = build()
    before, flags = state(model), [module.training for module in model.modules()]
    random = torch.get_rng_state()
    expected = outputs_on(model, data)
    errors = {}
    for again in (False, True):
        small = compress(model, data, again=again)
        assert small.plan.factored
        got = outputs_on(small.model, data)
        assert got.isfinite().all()
        errors[again] = float((got - expected).square().mean())
    assert errors[True] < errors[False]
    assert same_state(model, before)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in small.model.modules())


@EVERY
def test_at_full_rank_nothing_changes(build: Callable[[], nn.Module], data: list[Batch]) -> None:
    model = build()
    small = st.compress(
        model, st.Ratio(1.0), example_inputs=data[0], data=data, reconstruct=True, allow_growth=True
    ).model
    expected = outputs_on(model, data)
    assert float((outputs_on(small, data) - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


@pytest.mark.parametrize("form", IMAGE_FORMS)
@pytest.mark.parametrize("rank", [1, 3])
def test_a_single_layer_is_as_good_as_its_own_fit(form: str, rank: int) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(5, 8, 3, stride=2, padding=1), nn.Identity()).double(), inputs(40, 5, 9, 9)
    expected = output_of(model, x)
    errors = []
    for again in (False, True):
        small = st.compress(
            model, st.Rank(rank), example_inputs=x, data=x.split(8), forms=(form,), reconstruct=again, allow_growth=True
        )
        assert small.plan["0"].form == form
        errors.append(float((output_of(small.model, x) - expected).square().mean()))
    assert errors[1] <= (1 + 1e-6) * errors[0]


@pytest.mark.parametrize("name", ["cnn", "residual", "tied", "two inputs"])
def test_the_order_of_the_batches_changes_next_to_nothing(name: str) -> None:
    """Only around which point the samples are compared, which hardly moves their sampling error."""
    build, data = NETWORKS[name]
    model = build()
    forward, backward = (compress(model, order).model for order in (data, data[::-1]))
    expected = outputs_on(forward, data)
    torch.testing.assert_close(outputs_on(backward, data), expected, rtol=0, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["cnn", "residual", "called twice", "tied", "two inputs"])
def test_little_memory_gives_the_same_model(name: str) -> None:
    build, data = NETWORKS[name]
    model = build()
    expected = compress(model, data).model
    uncached = state(compress(model, data, cache=0).model)
    for key, tensor in state(expected).items():
        torch.testing.assert_close(uncached[key], tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", [st.Ratio(0.3), st.Budget(macs=0.8)], ids=str)
def test_layers_that_are_left_out_stay_bit_identical(rule: st.Ratio | st.Budget) -> None:
    model, x = small_cnn(), inputs(32, 3, 12, 12)
    small = st.compress(
        model, rule, example_inputs=x, data=x.split(8), exclude=["2", "8"], keep_last=True, reconstruct=True
    )
    for name in ("2", "8", "12"):
        assert same_state(small.model.get_submodule(name), state(model.get_submodule(name)))
    assert small.plan.factored


def test_a_plan_keeps_what_was_left_out(tmp_path: Path) -> None:
    model, x = small_cnn(), inputs(32, 3, 12, 12)
    first = st.compress(
        model, st.Budget(macs=0.8), example_inputs=x, data=x.split(8), exclude=["2", "8"], keep_last=True
    )
    plan = st.Plan.load(first.plan.save(tmp_path / "plan.json"))
    again = st.compress(model, plan, example_inputs=x, data=x.split(8))
    for name in ("2", "8", "12"):
        assert same_state(again.model.get_submodule(name), state(model.get_submodule(name)))
    assert same_state(again.model, state(first.model))


def test_a_layer_that_the_data_do_not_reach_stays_as_it_is() -> None:
    model = TwoInputs()
    x, z = inputs(64, 10), inputs(64, 6, seed=2)
    small = st.compress(
        model, st.Ratio(0.3), example_inputs=(x, z), data=[{"x": part} for part in x.split(16)], reconstruct=True
    )
    assert "deep" in {layer.name for layer in small.plan.factored}
    assert output_of(small.model, x).isfinite().all()
    assert output_of(small.model, x, z).isfinite().all()
    assert same_state(small.model.side, state(model.side))


def test_in_place_is_the_same_model() -> None:
    build, data = NETWORKS["residual"]
    expected = compress(build(), data).model
    model = build()
    small = st.compress(
        model,
        st.Ratio(0.35),
        example_inputs=data[0],
        data=data,
        reconstruct=True,
        forms=("spatial", "channel"),
        inplace=True,
    )
    assert small.model is model
    assert same_state(model, state(expected))


@EVERY
def test_a_reconstructed_model_survives_its_file(
    build: Callable[[], nn.Module], data: list[Batch], tmp_path: Path
) -> None:
    small = compress(build(), data, share=0.3).model
    loaded = st.load(st.save(small, tmp_path), build())
    assert same_state(loaded, state(small))
    assert torch.equal(outputs_on(loaded, data), outputs_on(small, data))
    merged = st.merge(small)
    torch.testing.assert_close(outputs_on(merged, data), outputs_on(small, data))


@pytest.mark.parametrize("bias", [True, False])
def test_dense_layers_are_fitted_anew_and_keep_their_build(bias: bool) -> None:
    model, x = small_cnn(bias=bias), inputs(32, 3, 12, 12)
    plan = st.plan(st.analyze(model, x, calibration=st.calibrate(model, [x]), include=["0", "2", "6"]), st.Ratio(0.3))
    small = st.compress(model, plan, example_inputs=x, data=x.split(8), reconstruct=True)
    dense = [layer.name for layer in small.plan if layer.form == "dense"]
    assert dense
    for name in dense:
        old, new = model.get_submodule(name), small.model.get_submodule(name)
        assert (new.extra_repr(), new.state_dict().keys()) == (old.extra_repr(), old.state_dict().keys())
    assert small.plan.kept_cost.params == small.measurement.params


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_number_types_stay(dtype: torch.dtype) -> None:
    x = inputs(48, 3, 12, 12, dtype=dtype) / 4
    model = small_cnn(dtype=dtype)
    small = st.compress(model, st.Ratio(0.4), example_inputs=x[:2], data=x.split(12), reconstruct=True).model
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}
    got, expected = output_of(small, x).float(), output_of(model, x).float()
    assert float((got - expected).square().mean()) < 0.05 * float(expected.square().mean())


@pytest.mark.parametrize(
    "x",
    {
        "one sample": inputs(1, 12),
        "constant": torch.ones(30, 12).double(),
        "zeros": torch.zeros(30, 12).double(),
        "fewer samples than inputs": inputs(4, 12),
    }.items(),
    ids=lambda case: case[0],
)
def test_poor_data_give_finite_outputs(x: tuple[str, Tensor]) -> None:
    model = small_mlp()
    small = st.compress(model, st.Rank(2), example_inputs=x[1], data=[x[1]], reconstruct=True).model
    assert output_of(small, x[1]).isfinite().all()
    assert output_of(small, inputs(9, 12)).isfinite().all()
    if not torch.equal(x[1], x[1][:1].expand_as(x[1])):  # else it is as without data
        torch.testing.assert_close(output_of(small, x[1]).mean(dim=0), output_of(model, x[1]).mean(dim=0))


class DeadBranch(nn.Module):
    """A branch beside the main one whose weights decay has driven to almost nothing; float32."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.main, self.branch = nn.Linear(64, 96), nn.Linear(64, 96)
        self.deep, self.beside, self.head = nn.Linear(96, 96), nn.Linear(96, 96), nn.Linear(96, 10)
        for parameter in self.branch.parameters():
            parameter.data *= scale

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.deep(torch.relu(self.main(x)))) + self.beside(torch.relu(self.branch(x))))


@pytest.mark.parametrize("scale", [1e-12, 1e-20, 1e-21, 3e-22, 1e-22, 3e-23, 1e-30, 0.0])
def test_a_branch_that_is_nearly_dead_does_no_harm(scale: float) -> None:
    model, x = DeadBranch(scale).eval(), inputs(64, 64, dtype=torch.float32)
    small = st.compress(model, st.Budget(macs=0.5), example_inputs=x[:1], data=x.split(16))
    dense, smaller = output_of(model, x), output_of(small.model, x)
    assert float((dense - smaller).norm() / (dense - dense.mean(dim=0)).norm()) < 0.3


def test_a_part_of_a_network_is_fitted_to_what_arrives_from_the_part_before() -> None:
    from spectrim.core.execution import Inputs
    from spectrim.fitting.reconstruction import reconstruct
    from spectrim.layers.replacement import duplicate

    part = seeded(lambda: small_mlp(bias=True))
    x = inputs(256, 12)
    arriving = x @ (torch.eye(12) + 0.3 * inputs(12, 12)).double()
    batches, others = ([Inputs((rows,), {}) for rows in own.split(64)] for own in (x, arriving))
    analysis = st.analyze(part, x[:1], calibration=st.calibrate(part, batches))
    plan = st.plan(analysis, st.Rank(3))
    alone = reconstruct(part, duplicate(part), plan, analysis=analysis, batches=batches)
    paired = reconstruct(part, duplicate(part), plan, analysis=analysis, batches=batches, small_batches=others)
    with torch.no_grad():
        errors = [float((part(x) - small(arriving)).square().mean()) for small in (alone, paired)]
    assert errors[1] < 0.7 * errors[0]
