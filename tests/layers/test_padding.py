"""Padding with zeros changes no output, and the copy is a model like any other."""

import copy
from pathlib import Path

import pytest
import torch
from cases import (
    IMAGE_FORMS,
    Double,
    Residual,
    SharedModule,
    Tied,
    WordModel,
    build,
    form_names,
    inputs,
    same_state,
    small_cnn,
    small_mlp,
    state,
)
from torch import Tensor, nn

import spectrim as st
from spectrim.layers.factored import low_rank_layers
from spectrim.layers.forms import find_form
from spectrim.layers.padding import padded

LAYERS: tuple[tuple[nn.Module, tuple[int, ...]], ...] = (
    (nn.Linear(7, 9), (4, 7)),
    (nn.Linear(7, 9, bias=False), (2, 3, 7)),
    (nn.Conv1d(6, 8, 3, padding=1), (2, 6, 11)),
    (nn.Conv1d(6, 8, 1, groups=2), (2, 6, 11)),
    (nn.Conv2d(6, 8, 1), (2, 6, 9, 8)),
    (nn.Conv2d(6, 8, 3, stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 6, 9, 8)),
    (nn.Conv2d(6, 8, 3, padding="same", padding_mode="reflect", bias=False), (2, 6, 9, 8)),
    (nn.Conv2d(6, 9, (3, 2), groups=3), (2, 6, 9, 8)),
    (nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1), (2, 6, 5, 4)),
    (nn.ConvTranspose2d(6, 8, 4, stride=2, groups=2), (2, 6, 5, 4)),
)
KINDS = [(layer, form, shape) for layer, shape in LAYERS for form in form_names(layer) if find_form(form).saves_time]


def answer(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(x)
    return y


def factored(layer: nn.Module, form: str) -> nn.Sequential:
    """A network of one factored layer with random factors of rank 2, or 3 and 2."""
    factored_layer = build(
        copy.deepcopy(layer).double(), form=form, ranks=(3, 2) if form == "tucker2" else (2,), bias=True
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in factored_layer.parameters():
        parameter.data.normal_(generator=generator)
    return nn.Sequential(factored_layer)


@pytest.mark.parametrize("multiple", [1, 2, 4, 16])
@pytest.mark.parametrize(("layer", "form", "shape"), KINDS, ids=[f"{layer}-{form}" for layer, form, _ in KINDS])
def test_every_kind_and_form_keeps_its_outputs(
    layer: nn.Module, form: str, shape: tuple[int, ...], multiple: int
) -> None:
    model, x = factored(layer, form), inputs(*shape)
    wide = padded(model, multiple)
    before, after = model[0].ranks, wide[0].ranks
    assert all(new % multiple == 0 and old <= new < old + multiple for old, new in zip(before, after, strict=True))
    assert type(wide[0]) is type(model[0])
    assert wide[0].form == model[0].form
    assert wide[0].empty_dense().weight.shape == model[0].empty_dense().weight.shape
    torch.testing.assert_close(answer(wide, x), answer(model, x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(wide[0].weight, model[0].weight, rtol=1e-12, atol=1e-12)
    rebuilt = [type(part)(**sizes_of(part)) for part in wide[0].chain]  # what it says of itself is what it is
    assert [layer.weight.shape for layer in rebuilt] == [part.weight.shape for part in wide[0].chain]


def sizes_of(part: nn.Module) -> dict[str, object]:
    names = ("in_features", "out_features", "in_channels", "out_channels", "kernel_size", "groups")
    return {name: getattr(part, name) for name in names if hasattr(part, name)}


NETWORKS = (
    (small_mlp(), (5, 12)),
    (small_cnn(), (3, 3, 12, 12)),
    (Double().double(), (5, 6)),
    (Tied().double(), (5, 8)),
    (SharedModule().double(), (5, 8)),
    (Residual(), (3, 3, 10, 10)),
)


@pytest.mark.parametrize(("network", "shape"), NETWORKS, ids=[type(network).__name__ for network, _ in NETWORKS])
@pytest.mark.parametrize("form", IMAGE_FORMS)
def test_a_whole_network_keeps_its_outputs_its_ties_and_its_files(
    network: nn.Module, shape: tuple[int, ...], form: str, tmp_path: Path
) -> None:
    x = inputs(*shape)
    small = st.compress(network, st.Rank(3), example_inputs=x, forms=(form,), allow_growth=True).model
    before = state(small)
    wide = padded(small, 4)
    assert same_state(small, before)
    assert any(layer.ranks != (4,) * len(layer.ranks) for layer in low_rank_layers(small).values())
    assert all(rank % 4 == 0 for layer in low_rank_layers(wide).values() for rank in layer.ranks)
    torch.testing.assert_close(answer(wide, x), answer(small, x), rtol=1e-11, atol=1e-11)
    assert len(list(wide.parameters())) == len(list(small.parameters()))
    loaded = st.load(st.save(wide, tmp_path / "wide.safetensors"), network)
    assert torch.equal(answer(loaded, x), answer(wide, x))
    assert len(list(loaded.parameters())) == len(list(wide.parameters()))


def test_a_network_of_words_stays_tied() -> None:
    network, x = WordModel().double(), torch.tensor([[1, 2, 10]])
    small = st.compress(network, st.Rank(3), example_inputs=x, allow_growth=True).model
    wide = padded(small, 8)
    assert wide.out.weight is wide.embed.weight
    torch.testing.assert_close(answer(wide, x), answer(small, x), rtol=1e-12, atol=1e-12)


def test_a_layer_alone_its_flags_and_its_hooks() -> None:
    replacement = factored(nn.Linear(7, 9), "linear")[0].eval()
    replacement.down.weight.requires_grad_(False)
    called: list[int] = []
    replacement.register_forward_hook(lambda *_: called.append(1))
    wide = padded(replacement, 16)
    assert isinstance(wide, st.LowRankLinear)
    assert wide.rank == 16
    assert [parameter.requires_grad for parameter in wide.parameters()] == [False, True, True]
    assert not any(module.training for module in wide.modules())
    wide(inputs(1, 7))
    assert called == [1]


def test_ranks_that_fit_and_dense_networks_are_copied() -> None:
    small = st.compress(small_mlp(), st.Rank(4), example_inputs=inputs(1, 12)).model
    for model in (small, small_mlp()):
        same = padded(model, 4)
        assert same_state(same, state(model))
        assert not {id(parameter) for parameter in same.parameters()} & {
            id(parameter) for parameter in model.parameters()
        }


def test_bad_multiples_and_factors_that_are_no_parameters() -> None:
    model = factored(nn.Linear(7, 9), "linear")
    with pytest.raises(st.errors.RuleError, match="multiple=0"):
        padded(model, 0)
    torch.nn.utils.parametrizations.weight_norm(model[0].down)
    with pytest.raises(st.errors.ModelError, match="'0' are not ordinary parameters"):
        padded(model, 8)
