"""Frobenius decay equals the decay of the dense weight, in every form; spectral initialisation is the plain SVD."""

import pytest
import torch
from cases import SharedModule, inputs, same_state, small_cnn, small_mlp, state
from torch import nn

import spectrim as st
from spectrim import errors
from spectrim.training import frobenius_decay, spectral

FORMS = {
    "linear": (lambda: nn.Linear(12, 9), "channel", (7, 12)),
    "1x1": (lambda: nn.Conv2d(6, 8, 1), "channel", (2, 6, 5, 5)),
    "1d": (lambda: nn.Conv1d(6, 8, 3, groups=2), "channel", (2, 6, 9)),
    "channel": (lambda: nn.Conv2d(6, 8, 3), "channel", (2, 6, 7, 7)),
    "channel, groups": (lambda: nn.Conv2d(6, 8, 3, groups=2), "channel", (2, 6, 7, 7)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 8, 3), "channel", (2, 6, 5, 5)),
    "transposed, groups": (lambda: nn.ConvTranspose2d(6, 8, (3, 2), groups=2), "channel", (2, 6, 5, 5)),
    "spatial": (lambda: nn.Conv2d(6, 8, (3, 5)), "spatial", (2, 6, 7, 7)),
    "spatial, groups": (lambda: nn.Conv2d(6, 8, 3, groups=2), "spatial", (2, 6, 7, 7)),
    "tucker2": (lambda: nn.Conv2d(6, 8, 3), "tucker2", (2, 6, 7, 7)),
    "tucker2, groups": (lambda: nn.Conv2d(6, 8, (3, 2), groups=2), "tucker2", (2, 6, 7, 7)),
}


@pytest.mark.parametrize("kind", FORMS)
def test_it_is_the_decay_of_the_dense_weight_with_its_gradients(kind: str) -> None:
    make, form, shape = FORMS[kind]
    torch.manual_seed(0)
    dense = nn.Sequential(make()).double()
    compressed = st.compress(dense, st.Rank(3), example_inputs=inputs(*shape), forms=(form,), allow_growth=True)
    layer = compressed.model[0]
    assert compressed.plan["0"].form == ("linear" if kind in ("linear", "1x1") else form)
    parts = [part.weight for part in layer.chain]
    with torch.no_grad():
        for seed, part in enumerate(parts):
            part += 0.1 * inputs(*part.shape, seed=seed)
    expected = layer.weight.square().sum() / 2
    penalty = frobenius_decay(compressed.model)
    torch.testing.assert_close(penalty, expected)
    torch.testing.assert_close(penalty, st.merge(compressed.model)[0].weight.square().sum() / 2)
    gradients = (torch.autograd.grad(value, parts) for value in (penalty, expected))
    torch.testing.assert_close(*gradients)


def test_it_sums_over_the_layers_and_counts_shared_factors_once() -> None:
    torch.manual_seed(0)
    model = st.compress(SharedModule(), st.Rank(3), example_inputs=inputs(2, 8, dtype=torch.float32)).model
    expected = model.one.weight.square().sum() / 2 + model.last.weight.square().sum() / 2 * hasattr(model.last, "chain")
    torch.testing.assert_close(frobenius_decay(model), expected)
    deep = spectral(small_cnn(), st.Ratio(0.3)).model
    layers = [module for module in deep.modules() if hasattr(module, "chain")]
    assert len(layers) > 3
    torch.testing.assert_close(frobenius_decay(deep), sum(layer.weight.square().sum() for layer in layers) / 2)


def test_it_is_taken_in_full_precision() -> None:
    model = spectral(small_mlp(dtype=torch.float32), st.Rank(3)).model
    exact = frobenius_decay(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        penalty = frobenius_decay(model)
    assert torch.equal(penalty, exact)
    half = frobenius_decay(model.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.02, atol=0.0)
    half.backward()
    assert model[0].chain[0].weight.grad.isfinite().all()


def test_only_the_decay_pulls_the_products_to_zero_as_in_a_dense_layer() -> None:
    start = spectral(small_mlp(), st.Rank(3), decay=0.1)
    before = [layer.weight.detach().clone() for layer in (start.model[0], start.model[2])]
    optimiser = torch.optim.SGD(start.model.parameters(), lr=1e-3)
    start.penalty().backward()
    optimiser.step()
    for layer, W in zip((start.model[0], start.model[2]), before, strict=True):
        # each factor moves by lr decay W times the other; with both at sqrt(S), S falls by 2 lr decay S^2
        lost = (W - layer.weight) / (1e-3 * 0.1)
        U, S, Vh = torch.linalg.svd(W)
        expected = (U[:, :3] * (2 * S[:3] ** 2)) @ Vh[:3]
        torch.testing.assert_close(lost.detach(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [small_mlp, small_cnn])
def test_spectral_initialisation_is_what_compress_makes_of_the_initial_weights(make: type[nn.Module]) -> None:
    model = make()
    x = inputs(3, 12) if make is small_mlp else inputs(2, 3, 12, 12)
    before = state(model)
    start = spectral(model, st.Rank(4), keep_last=True)
    assert same_state(model, before)
    other = st.compress(model, st.Rank(4), example_inputs=x, keep_last=True, allow_growth=True).model
    torch.testing.assert_close(start.model(x), other(x))
    last = list(model.named_children())[-1][0]
    assert type(start.model.get_submodule(last)) is nn.Linear
    W = model[0].weight.detach().flatten(1)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    down, up = (part.weight.detach().flatten(1) for part in start.model[0].chain)
    torch.testing.assert_close(up @ down, (U[:, :4] * S[:4]) @ Vh[:4])
    torch.testing.assert_close(down @ down.T, torch.diag(S[:4]))
    torch.testing.assert_close(up.T @ up, torch.diag(S[:4]))


def test_ranks_by_name() -> None:
    factored = spectral(small_mlp(), {"2": 5}).model
    assert factored[2].rank == 5
    assert type(factored[0]) is nn.Linear


def test_errors() -> None:
    with pytest.raises(errors.ModelError, match="no factored layer"):
        frobenius_decay(small_mlp())
    for decay in (-1.0, float("nan"), True):
        with pytest.raises(errors.TrainingError, match="decay="):
            spectral(small_mlp(), st.Rank(3), decay=decay)
    with pytest.raises(errors.RuleError, match="full rank"):
        spectral(small_mlp(), st.Rank(5))
