"""Distillation without labels: what it may use, what it leaves alone, and that it never ends worse."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import inputs
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spectrim as st
from spectrim import errors
from spectrim.training import distillation

X = inputs(160, 12, dtype=torch.float32)
DATA = list(X.split(16))
ASIDE = [inputs(64, 12, dtype=torch.float32).flip(1)]
FROZEN = nn.Linear(12, 4).requires_grad_(requires_grad=False)


def dense() -> nn.Sequential:
    """Two hidden layers, a norm with statistics, dropout, a head."""
    torch.manual_seed(0)
    hidden = [nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 16), nn.ReLU()]
    model = nn.Sequential(*hidden, nn.Linear(16, 4))
    model(X)
    return model.eval()


def small(model: nn.Module, *, exclude: str = "6") -> nn.Module:
    return st.compress(model, st.Rank(3), example_inputs=X[:2], exclude=[exclude]).model


def same(model: nn.Module, other: nn.Module) -> bool:
    state = other.state_dict()
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def error(model: nn.Module, batches: list[Tensor] = ASIDE) -> float:
    teacher = dense()
    with torch.no_grad():
        return float(torch.stack([(model(x) - teacher(x)).square().mean() for x in batches]).mean())


class Tokens(nn.Module):
    """Unit embeddings: the mean over what the mask calls tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.first, self.last = nn.Embedding(20, 8), nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.last(torch.relu(self.first(self.embed(ids))))
        weights = attention_mask.unsqueeze(-1).to(states)
        return nn.functional.normalize((states * weights).sum(dim=1) / weights.sum(dim=1), dim=1)


def texts(*, padding: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(20, (32, 6), generator=generator)
    mask = (torch.arange(6) < torch.randint(2, 7, (32, 1), generator=generator)).long()
    filled = torch.where(mask.bool(), ids, padding)
    return [{"ids": a, "attention_mask": b} for a, b in zip(filled.split(8), mask.split(8), strict=True)]


def test_the_network_comes_nearer_and_nothing_else_changes() -> None:
    teacher = dense()
    model = small(teacher).train()
    before, states = copy.deepcopy(model), torch.get_rng_state()
    told: list[tuple[str, int, int]] = []
    result = st.distill(model, teacher, data=DATA, held_out=ASIDE, lr=1e-2, on_progress=lambda *a: told.append(a))
    assert error(result.model.eval()) < 0.9 * error(before.eval())
    assert same(model, before)
    assert same(teacher, dense())
    assert model.training
    assert not teacher.training
    assert torch.equal(torch.get_rng_state(), states)
    assert result.history.measured_by == "loss"
    assert told[-1][1:] == (50, 50)
    assert torch.equal(result.model[1].running_mean, teacher[1].running_mean)
    assert not any(module._forward_hooks for network in (teacher, result.model) for module in network.modules())


@pytest.mark.filterwarnings("ignore:the loss on inputs kept aside", "ignore:distillation made nothing better")
@pytest.mark.parametrize("lr", [1e-3, 3e-2, 1.0])
def test_it_never_ends_worse_on_what_is_kept_aside(lr: float) -> None:
    teacher = dense()
    model = small(teacher).eval()
    result = st.distill(model, teacher, data=DATA, held_out=ASIDE, lr=lr, hidden=False, epochs=2)
    assert error(result.model.eval()) <= error(model)
    assert (result.history.weights_of is None) == same(result.model, model) == (lr == 1)


def test_a_rate_that_undoes_the_fit_is_warned_of() -> None:
    teacher = dense()
    close = st.distill(small(teacher), teacher, data=DATA, held_out=ASIDE, lr=1e-2, epochs=6).model
    with pytest.warns(UserWarning, match=r"nothing better \(.*from .* to .* in the first epoch.*smaller lr= than 0.1"):
        assert same(st.distill(close, teacher, data=DATA, held_out=ASIDE, lr=0.1, epochs=1).model, close)
    with pytest.warns(UserWarning, match=r"in the first epoch: lr=0.05 undid what"):
        result = st.distill(close, teacher, data=DATA, held_out=ASIDE, lr=0.05, epochs=6)
    assert error(result.model) < error(close)


def test_labels_are_not_used_and_loaders_are_read() -> None:
    teacher = dense()
    model = small(teacher)
    labels = torch.randint(4, (160,)).split(16)
    alone = st.distill(model, teacher, data=DATA, epochs=1).model
    assert same(st.distill(model, teacher, data=list(zip(DATA, labels, strict=True)), epochs=1).model, alone)
    assert same(st.distill(model, teacher, data=[X[:0], *DATA], epochs=1).model, alone)
    loader = DataLoader(TensorDataset(X), batch_size=16)
    assert same(st.distill(model, teacher, data=loader, epochs=1).model, alone)
    streamed = st.distill(model, teacher, data=loader, held_out=ASIDE, epochs=2)
    assert len(streamed.history) == 2


def test_the_dense_network_is_run_once_on_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, calls = dense(), []
    model = small(teacher)
    teacher.register_forward_hook(lambda *_: calls.append(1))
    result = st.distill(model, teacher, data=DATA, lr=1e-2)
    assert len(calls) == 1 + len(DATA)  # one to find the hidden state
    monkeypatch.setattr(distillation, "free_bytes", lambda _: 1)
    assert same(st.distill(model, teacher, data=DATA, lr=1e-2).model, result.model)
    assert len(calls) == 1 + len(DATA) + 2 + 5 * len(DATA)


def test_inputs_that_differ_in_more_than_tensors_are_other_ones() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor, scale: float = 1.0, shift: Tensor | None = None) -> Tensor:  # type: ignore[override]
            return super().forward(x) * scale + (0 if shift is None else shift)

    teacher, calls = Scaled(12, 4), []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    data = [{"x": X, "scale": 2.0}, {"x": X, "scale": 3.0}, {"x": X}]
    st.distill(Scaled(12, 4), teacher, data=data, held_out=[{"x": X}], epochs=2, lr=1e-2, batch=160)
    assert len(calls) == 4  # one to find the hidden state


def test_caches_among_the_outputs_are_not_kept() -> None:
    class Cached(nn.Linear):
        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"states": super().forward(x), "cache": object()}

    teacher = distillation._Teacher(Cached(12, 4), distillation._Signals(), comes_again=True)
    assert list(teacher(X)) == ["states"]


def test_padding_changes_nothing() -> None:
    teacher = Tokens()
    model = st.compress(teacher, st.Rank(3), example_inputs=texts(padding=0)[0]).model
    first, second = (st.distill(model, teacher, data=texts(padding=pad), lr=1e-2).model for pad in (0, 19))
    plain = st.distill(model, teacher, data=texts(padding=0), lr=1e-2, hidden=False).model
    assert all(torch.allclose(first.state_dict()[name], value) for name, value in second.state_dict().items())
    assert not torch.allclose(first.last.up.weight, plain.last.up.weight)


@pytest.mark.parametrize(
    ("compress", "expected"), [({"exclude": "6"}, "6"), ({"exclude": "4"}, "6")], ids=["dense head", "factored head"]
)
def test_the_hidden_state_is_what_the_last_layer_reads(compress: dict[str, str], expected: str) -> None:
    teacher = dense()
    place = distillation._hidden_place(small(teacher, **compress), teacher, st.training.losses.Inputs((X,), {}))
    assert place == expected


def test_a_state_of_another_size_leaves_the_outputs_alone() -> None:
    teacher = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    model = nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 4))
    each = [st.distill(model, teacher, data=DATA, hidden=hidden, lr=1e-2).model for hidden in (True, False)]
    assert same(*each)


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    teacher = dense()
    model, path = small(teacher), tmp_path / "run.safetensors"
    whole = st.distill(model, teacher, data=DATA, lr=1e-2)

    def stop(_: str, done: int, __: int) -> None:
        if done == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        st.distill(model, teacher, data=DATA, lr=1e-2, checkpoint=path, on_progress=stop)
    resumed = st.distill(model, teacher, data=DATA, lr=1e-2, checkpoint=path)
    assert same(resumed.model, whole.model)
    assert [epoch.loss for epoch in resumed.history] == [epoch.loss for epoch in whole.history]
    with pytest.raises(errors.FileError, match="hidden was true and is false"):
        st.distill(model, teacher, data=DATA, lr=1e-2, checkpoint=path, hidden=False)


def test_minutes_end_it() -> None:
    teacher = dense()
    told: list[int] = []
    result = st.distill(
        small(teacher), teacher, data=DATA, minutes=1e-7, lr=1e-2, on_progress=lambda _, done, __: told.append(done)
    )
    assert told == [1]
    assert len(result.history) == 1
    assert result.history.stopped_early


def test_equal_networks_are_left_alone() -> None:
    teacher = dense()
    with pytest.warns(UserWarning, match="computes what the dense one does already"):
        assert same(st.distill(copy.deepcopy(teacher), teacher, data=DATA).model, teacher)


def test_logits_are_compared_as_classes() -> None:
    class Named(nn.Module):
        def __init__(self, inner: nn.Module, *, shift: float = 0.0) -> None:
            super().__init__()
            self.inner, self.shift = inner, shift

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.inner(x) + self.shift}

    teacher = dense()
    compared = [st.distill(Named(small(teacher)), Named(teacher, shift=s), data=DATA, loss=None) for s in (0.0, 3.0)]
    first, second = (result.history[-1].loss for result in compared)
    assert first == pytest.approx(second, rel=1e-3)  # a softmax does not see what all logits have in common


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"data": DATA[:1]}, errors.DataError, "of up to 16 samples, is 1; give data="),
        ({"data": []}, errors.DataError, "samples, is 0"),
        ({"data": DATA, "held_out": []}, errors.DataError, "held_out is empty"),
        ({"data": DATA, "batch": 0}, errors.TrainingError, "batch=0"),
        ({"data": DATA, "minutes": 0.0}, errors.TrainingError, "minutes=0.0: give a number above 0"),
        ({"data": DATA, "loss": "ce"}, errors.TrainingError, 'loss=\'ce\': there are "kl" and "mse"'),
        ({"data": DATA, "mask": "m"}, errors.DataError, "mask='m': the inputs .* have no entry of this name"),
        (
            {"data": DATA, "model": nn.Linear(12, 4).requires_grad_(requires_grad=False)},
            errors.TrainingError,
            "nothing to train",
        ),
        ({"data": DATA, "epochs": 0}, errors.TrainingError, "epochs=0"),
        ({"data": X}, errors.DataError, "data is one Tensor"),
        (
            {"data": DATA, "teacher": nn.Linear(12, 5)},
            errors.DataError,
            r"have the shapes \[\[16, 4\]\].*\[\[16, 5\]\]",
        ),
    ],
)
def test_a_mistake_is_said(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    teacher = dense()
    with pytest.raises(kind, match=message):
        st.distill(**{"model": small(teacher), "teacher": teacher, **options})


def test_compress_distils_and_looks_at_the_result() -> None:
    teacher = dense()
    options: dict[str, Any] = {"example_inputs": X[:2], "data": DATA, "exclude": ["6"]}
    plain = st.compress(teacher, st.Budget(params=0.5), **options)
    told: list[str] = []
    after = st.compress(
        teacher,
        st.Budget(params=0.5),
        **options,
        distill=st.Distillation(lr=1e-2, data=[(x.flip(1), 0) for x in DATA]),
        on_progress=lambda what, *_: told.append(what.partition(",")[0]),
    )
    assert after.plan == plain.plan
    assert error(after.model) < error(plain.model)
    assert plain.fidelity is not None
    assert after.fidelity is not None
    assert after.fidelity.relative_error != plain.fidelity.relative_error
    assert "distil epoch 5/5" in told
    assert same(teacher, dense())


def test_a_network_that_is_compressed_in_place_is_the_distilled_one() -> None:
    models = []
    for inplace in (False, True):
        torch.manual_seed(0)
        norm = nn.LayerNorm(16)
        network = nn.Sequential(nn.Linear(12, 16), norm, nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        distillation = st.Distillation(lr=1e-2)
        result = st.compress(
            network, st.Rank(3), example_inputs=X[:2], data=DATA, exclude=["5"], distill=distillation, inplace=inplace
        )
        assert (result.model is network) == (result.model[1] is norm) == inplace
        models.append(result.model)
    assert same(*models)


def test_compress_says_what_distillation_lacks() -> None:
    teacher = dense()
    with pytest.raises(errors.DataError, match="samples, is 0; give data="):
        st.compress(teacher, st.Rank(2), example_inputs=X[:2], distill=st.Distillation())
    with pytest.raises(errors.ArgumentError, match="distill=True: give a Distillation"):
        st.compress(teacher, st.Rank(2), example_inputs=X[:2], distill=True)
    with pytest.raises(errors.TrainingError, match="lr=-1"):
        st.Distillation(lr=-1.0)
    options: dict[str, Any] = {"example_inputs": X[:2], "data": DATA}
    assert (
        st.estimate_memory(teacher, st.Rank(2), **options, distill=True).peak
        > st.estimate_memory(teacher, st.Rank(2), **options).peak
    )


@pytest.mark.filterwarnings("ignore:distillation made nothing better")
def test_convolutions_want_other_images_than_those_of_the_calibration() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(2, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.Flatten(), nn.Linear(32, 3))
    data = list(torch.randn(32, 2, 6, 6).split(8))
    options: dict[str, Any] = {"example_inputs": data[0], "data": data}
    with pytest.warns(UserWarning, match=r"give others, without labels: distill=Distillation\(data=batches\)"):
        st.compress(teacher, st.Budget(macs=0.6), **options, distill=st.Distillation(epochs=1))
    st.compress(teacher, st.Budget(macs=0.6), **options, distill=st.Distillation(epochs=1, data=data))
