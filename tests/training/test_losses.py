"""Losses: each fits its outputs and labels, learns, and is refused where it would mean something else."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import same_state, state
from torch import Tensor, nn
from torch.nn import functional

import spectrim as st
from spectrim import errors
from spectrim.benchmark.measurement import Epoch
from spectrim.core.batches import split_labels
from spectrim.training import History, Settings, TrainingRun, train_in_place
from spectrim.training.losses import Objective

torch.manual_seed(0)
X = torch.randn(64, 8)
VALUES = X @ torch.randn(8, 3)
HOT = (VALUES > 0.5).float()
CLASSES = VALUES.argmax(dim=1)
IMAGES = torch.randn(8, 2, 6, 7)
SERIES = torch.randn(8, 5, 8)


def mlp(outputs: int = 3, *, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, outputs))


class Named(nn.Module):
    """Outputs by name, as Hugging Face's models return them."""

    def __init__(self, body: nn.Module | None = None, name: str = "logits") -> None:
        super().__init__()
        self.body, self.name = body or mlp(), name

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.body(x if mask is None else x * mask)
        return {self.name: logits, "hidden": logits * 2}


class Heads(nn.Module):
    """Boxes and a score."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.box, self.score = mlp(4, seed=seed), mlp(1, seed=seed + 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return 100 * self.box(x), self.score(x).squeeze(1)


def maps(classes: int, *, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, classes, 1))


def first_loss(model: nn.Module, data: list[Any], **options: Any) -> float:
    """Of the first batch, before any step."""
    return st.finetune(model, data, epochs=1, **options).history[0].loss


MASK = (IMAGES[:, :1] > 0).float()
PLACES = IMAGES.argmax(dim=1)
STEPS = (SERIES[..., :3]).argmax(dim=2)
LABELLED: dict[str, tuple[Callable[[], nn.Module], Tensor, Any, dict[str, Any], Callable[[Any, Any], Tensor]]] = {
    "classes": (mlp, X, CLASSES, {}, functional.cross_entropy),
    "classes by name": (mlp, X, CLASSES, {"loss": "cross_entropy"}, functional.cross_entropy),
    "maps": (lambda: maps(4), IMAGES, PLACES, {}, functional.cross_entropy),
    "sequences": (mlp, SERIES, STEPS, {}, lambda o, y: functional.cross_entropy(o.mT, y)),
    "a named axis": (lambda: mlp(5), SERIES, STEPS, {"axis": -1}, lambda o, y: functional.cross_entropy(o.mT, y)),
    "logits by name": (Named, X, CLASSES, {}, lambda o, y: functional.cross_entropy(o["logits"], y)),
    "values": (mlp, X, VALUES, {"loss": "mse"}, functional.mse_loss),
    "a column of values": (lambda: mlp(1), X, VALUES[:, 0], {"loss": "mse"}, lambda o, y: ((o[:, 0] - y) ** 2).mean()),
    "whole values": (lambda: mlp(1), X, CLASSES, {"loss": "mse"}, lambda o, y: ((o[:, 0] - y) ** 2).mean()),
    "several labels": (mlp, X, HOT, {"loss": "bce"}, functional.binary_cross_entropy_with_logits),
    "bool labels": (
        mlp,
        X,
        HOT.bool(),
        {"loss": "bce"},
        lambda o, y: functional.binary_cross_entropy_with_logits(o, y.float()),
    ),
    "masks": (lambda: maps(1), IMAGES, MASK, {"loss": "bce"}, functional.binary_cross_entropy_with_logits),
    "a teacher's logits": (
        mlp,
        X,
        VALUES,
        {"loss": "kl", "temperature": 2.0},
        lambda o, y: functional.kl_div((o / 2).log_softmax(1), (y / 2).softmax(1), reduction="batchmean") * 4,
    ),
    "a function": (
        Named,
        X,
        VALUES,
        {"loss": lambda o, y: (o["hidden"] - y).abs().mean()},
        lambda o, y: (o["hidden"] - y).abs().mean(),
    ),
    "two outputs": (
        Heads,
        X,
        (torch.rand(64, 4), torch.rand(64)),
        {"loss": "mse"},
        lambda o, y: (((o[0] - y[0]) ** 2).mean() + ((o[1] - y[1]) ** 2).mean()) / 2,
    ),
}


@pytest.mark.parametrize(("build", "x", "labels", "options", "expected"), LABELLED.values(), ids=LABELLED.keys())
def test_a_loss_is_what_its_name_says_and_falls(
    build: Callable[[], nn.Module],
    x: Tensor,
    labels: Any,
    options: dict[str, Any],
    expected: Callable[[Any, Any], Tensor],
) -> None:
    model = build()
    with torch.no_grad():
        loss = float(expected(model(x), labels))
    history = st.finetune(model, [(x, labels)], epochs=8, lr=3e-2, warm_up=0.0, **options).history
    assert history[0].loss == pytest.approx(loss, rel=1e-5)
    assert history[-1].loss < 0.95 * loss


def kl(own: Tensor, other: Tensor, axis: int, T: float = 4.0) -> Tensor:
    """The mean over all places."""
    own, other = (values.movedim(axis, -1).flatten(0, -2) / T for values in (own, other))
    return functional.kl_div(own.log_softmax(1), other.softmax(1), reduction="batchmean") * T**2


def scaled(own: Any, other: Any) -> Tensor:
    return torch.stack([((a - b) ** 2).mean() / b.var(unbiased=False) for a, b in zip(own, other, strict=True)]).mean()


def binary(own: Tensor, other: Tensor, T: float = 4.0) -> Tensor:
    p, q = (other / T).sigmoid(), (own / T).sigmoid()
    return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean() * T**2


TAUGHT: dict[str, tuple[Callable[[int], nn.Module], Any, dict[str, Any], Callable[[Any, Any], Tensor]]] = {
    "classes": (lambda seed: mlp(seed=seed), (X, CLASSES), {}, lambda o, t: kl(o, t, 1)),
    "without labels": (lambda seed: mlp(seed=seed), X, {}, lambda o, t: kl(o, t, 1)),
    "sequences": (lambda seed: mlp(seed=seed), (SERIES, STEPS), {}, lambda o, t: kl(o, t, 2)),
    "a named axis": (lambda seed: mlp(seed=seed), SERIES, {"axis": -1}, lambda o, t: kl(o, t, 2)),
    "maps": (
        lambda seed: maps(4, seed=seed),
        (IMAGES, PLACES),
        {},
        lambda o, t: kl(o, t, 1),
    ),
    "logits by name": (lambda seed: Named(mlp(seed=seed)), X, {}, lambda o, t: kl(o["logits"], t["logits"], 1)),
    "series of logits by name": (
        lambda seed: Named(mlp(seed=seed)),
        SERIES,
        {},
        lambda o, t: kl(o["logits"], t["logits"], 2),
    ),
    "values": (lambda seed: mlp(seed=seed), (X, VALUES), {"loss": "mse"}, functional.mse_loss),
    "one value": (lambda seed: mlp(1, seed=seed), X, {"loss": "mse"}, functional.mse_loss),
    "several labels": (lambda seed: mlp(seed=seed), (X, HOT), {"loss": "bce"}, binary),
    "heads": (Heads, X, {}, scaled),
    "features": (lambda seed: Named(mlp(seed=seed), "state"), X, {}, lambda o, t: scaled(o.values(), t.values())),
    "a function": (
        lambda seed: Named(mlp(seed=seed)),
        X,
        {"loss": lambda o, t: (o["hidden"] - t["hidden"]).abs().mean()},
        lambda o, t: (o["hidden"] - t["hidden"]).abs().mean(),
    ),
}


@pytest.mark.parametrize(("build", "batch", "options", "expected"), TAUGHT.values(), ids=TAUGHT.keys())
def test_a_teacher_of_any_outputs_is_followed(
    build: Callable[[int], nn.Module], batch: Any, options: dict[str, Any], expected: Callable[[Any, Any], Tensor]
) -> None:
    model, teacher = build(0), build(3)
    x = batch[0] if isinstance(batch, tuple) else batch
    with torch.no_grad():
        loss = float(expected(model(x), teacher(x)))
    tuned = st.finetune(model, [batch], teacher=teacher, epochs=8, lr=3e-2, warm_up=0.0, **options)
    assert tuned.history[0].loss == pytest.approx(loss, rel=1e-4)
    assert tuned.history[-1].loss < 0.95 * loss


def test_labels_and_a_teacher_are_mixed_in_every_loss() -> None:
    model, teacher = mlp(), mlp(seed=3)
    with torch.no_grad():
        expected = 0.3 * functional.mse_loss(model(X), VALUES) + 0.7 * functional.mse_loss(model(X), teacher(X))
    loss = first_loss(model, [(X, VALUES)], teacher=teacher, loss="mse", label_weight=0.3)
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_places_without_a_label_do_not_count() -> None:
    labels = CLASSES.clone()
    labels[:50] = -100
    model = mlp()
    expected = functional.cross_entropy(model(X[50:]), CLASSES[50:])
    assert first_loss(model, [(X, labels)]) == pytest.approx(expected.item(), rel=1e-5)
    objective = Objective(Settings())
    inputs, known = split_labels((X, labels), position=0)
    result = objective.step(model, inputs, known, position=0)
    assert (result.correct, result.labelled) == (int((model(X[50:]).argmax(1) == CLASSES[50:]).sum()), 14)


def test_an_axis_once_told_holds_where_shapes_allow_more() -> None:
    objective, model = Objective(Settings()), mlp()
    square = (SERIES[:, :3], STEPS[:, :3])
    with pytest.raises(errors.TrainingError, match=r"\[8, 3, 3\] and labels \[8, 3\] do not say .*give axis=1"):
        objective.step(model, *split_labels(square, position=0), position=0)
    objective.step(model, *split_labels((SERIES, STEPS), position=0), position=0)
    result = objective.step(model, *split_labels(square, position=1), position=1)
    expected = functional.cross_entropy(model(SERIES[:, :3]).mT, STEPS[:, :3])
    assert float(result.loss.detach()) == pytest.approx(expected.item(), rel=1e-5)


BATCH = {"x": X, "labels": CLASSES}


def test_batches_by_name_train_and_are_measured() -> None:
    model = Named()
    history = st.finetune(model, [BATCH], epochs=3, held_out=[BATCH], keep="best").history
    assert history.measured_by == "accuracy"
    assert history[-1].loss < history[0].loss
    assert st.accuracy(model, [BATCH]).total == 64
    named = {"x": X, "mask": torch.ones(64, 1)}
    assert len(st.finetune(model, [named], teacher=Named(mlp(seed=3)), epochs=1).history) == 1


@pytest.mark.parametrize(
    ("options", "batch"),
    [({"loss": "mse"}, (X, VALUES)), ({"teacher": mlp(seed=3), "loss": "bce"}, X), ({"loss": "kl"}, (X, VALUES))],
    ids=["values", "a teacher without labels", "logits"],
)
def test_the_best_epoch_has_the_lowest_held_out_loss(options: dict[str, Any], batch: Any, tmp_path: Path) -> None:
    def spoiled(epoch: int) -> list[Any]:
        if isinstance(batch, Tensor):
            return [batch if epoch < 3 else -batch * 9]
        return [(X, VALUES if epoch < 3 else -9 * VALUES)]

    model = mlp()
    options |= {"lr": 3e-2, "warm_up": 0.0}
    tuned = st.finetune(model, spoiled, epochs=9, held_out=[batch], patience=2, **options)
    history = tuned.history
    assert history.measured_by == "loss"
    assert all(epoch.held_out is None for epoch in history)
    losses = [epoch.held_out_loss for epoch in history]
    assert history.best.held_out_loss == min(losses)
    assert history.weights_of == losses.index(min(losses))
    after = Objective(Settings(loss=options["loss"]), teacher=options.get("teacher")).held_out(tuned.model, [batch])
    assert after == (None, pytest.approx(min(losses), rel=1e-5))
    again = History.load(history.save(tmp_path / "history.json"))
    assert (again, again.measured_by, again.best) == (history, "loss", history.best)
    names = [trace.name for trace in st.plot_history(history).data]
    assert names == ["training loss", "held-out loss", "best"]
    assert list(st.plot_history(history).data[2].x) == [history.best.epoch + 1]


def test_a_history_of_before_has_no_held_out_loss() -> None:
    text = (
        '{"epochs": [{"epoch": 0, "loss": 1.0, "held_out": 0.5, "seconds": 1.0}], "lr": [0.1], "stopped_early": false}'
    )
    history = History.from_json(text)
    assert (history.measured_by, history.best) == ("accuracy", Epoch(epoch=0, loss=1.0, held_out=0.5, seconds=1.0))


def test_a_checkpoint_belongs_to_its_loss(tmp_path: Path) -> None:
    model, path = mlp(), tmp_path / "run"
    st.finetune(model, [(X, VALUES)], epochs=1, loss="mse", checkpoint=path)
    with pytest.raises(errors.FileError, match='loss was "mse" and is "kl"'):
        st.finetune(model, [(X, VALUES)], epochs=1, loss="kl", checkpoint=path)
    with pytest.raises(errors.FileError, match=r'loss was "mse" and is "torch.*l1_loss"'):
        st.finetune(model, [(X, VALUES)], epochs=1, loss=functional.l1_loss, checkpoint=path)


def test_a_run_takes_a_function_too() -> None:
    model = mlp()
    run = TrainingRun(model, [(X, VALUES)], settings=Settings(epochs=1), loss=functional.l1_loss)
    with torch.no_grad():
        expected = functional.l1_loss(model(X), VALUES)
    assert train_in_place(run)[0].loss == pytest.approx(expected.item(), rel=1e-5)


class Detached(nn.Module):
    def __init__(self, *, rounded: bool = False) -> None:
        super().__init__()
        self.body, self.rounded = mlp(), rounded

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.body(x)
        return outputs.round() if self.rounded else outputs.detach()


IDS = torch.randint(0, 5, (4, 6))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 8), nn.Linear(8, 5)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.table(input_ids))}


NAMES = r'loss="mse".*loss="bce".*loss="kl"'
WRONG: dict[str, tuple[Callable[[], object], type[errors.SpectrimError], str]] = {
    "values of the outputs' shape": (
        lambda: st.finetune(mlp(), [(X, VALUES)]),
        errors.TrainingError,
        rf"labels float32 \[64, 3\] for outputs float32 \[64, 3\], which can mean more than one thing; give {NAMES}",
    ),
    "a column of values": (lambda: st.finetune(mlp(1), [(X, VALUES[:, 0])]), errors.TrainingError, NAMES),
    "several whole labels": (lambda: st.finetune(mlp(), [(X, HOT.long())]), errors.TrainingError, NAMES),
    "masks": (lambda: st.finetune(maps(1), [(IMAGES, MASK)]), errors.TrainingError, NAMES),
    "a teacher of several labels": (
        lambda: st.finetune(mlp(), [(X, HOT)], teacher=mlp(seed=3)),
        errors.TrainingError,
        NAMES,
    ),
    "a teacher of one value": (
        lambda: st.finetune(mlp(1), [X], teacher=mlp(1, seed=3)),
        errors.TrainingError,
        rf"\[64, 1\] have a single entry in dimension 1, whose softmax is always 1.*{NAMES}",
    ),
    "one class": (lambda: st.finetune(mlp(1), [(X, 0 * CLASSES)]), errors.TrainingError, "single entry"),
    "a teacher of maps": (
        lambda: st.finetune(maps(4), [IMAGES], teacher=maps(4)),
        errors.TrainingError,
        r"outputs \[8, 4, 6, 7\] do not say which dimension holds the classes; give axis=1",
    ),
    "an axis that is none": (
        lambda: st.finetune(mlp(), [(SERIES, STEPS)], axis=3),
        errors.TrainingError,
        r"axis=3 is no dimension of classes of outputs \[8, 5, 3\]",
    ),
    "classes of another shape": (
        lambda: st.finetune(mlp(), [(SERIES, STEPS[:, :2])], axis=2),
        errors.DataError,
        r"labels \[8, 2\] do not fit the outputs \[8, 5, 3\]: class indices are \[8, 5\]",
    ),
    "values of another shape": (
        lambda: st.finetune(mlp(), [(X, VALUES[:, :2])], loss="mse"),
        errors.DataError,
        r"the labels float32 \[64, 2\] do not fit the outputs float32 \[64, 3\]",
    ),
    "labels below 0": (
        lambda: st.finetune(mlp(), [(X, 2 * HOT - 1)], loss="bce"),
        errors.DataError,
        'loss="bce" takes labels from 0 to 1, and they go from -1 to 1',
    ),
    "class indices as values": (
        lambda: st.finetune(mlp(), [(X, CLASSES)], loss="mse"),
        errors.DataError,
        r"int64 \[64\] do not fit the outputs",
    ),
    "names that differ": (
        lambda: st.finetune(Named(name="a"), [(X, {"b": VALUES, "hidden": VALUES})], loss="mse"),
        errors.DataError,
        "do not fit the outputs dict",
    ),
    "a teacher of other outputs": (
        lambda: st.finetune(Heads(), [X], teacher=nn.Sequential(Heads(), nn.Identity()).append(First())),
        errors.DataError,
        "Heads gives a tuple, not logits",
    ),
    "nothing but ignored": (
        lambda: st.finetune(mlp(), [(X, CLASSES * 0 - 100)]),
        errors.DataError,
        "batch 0 has no labels but -100",
    ),
    "the inputs as labels": (
        lambda: st.finetune(Words(), [{"input_ids": IDS, "labels": IDS}]),
        errors.DataError,
        r"its inputs as labels int64 \[4, 6\].*shift them",
    ),
    "a network without gradients": (
        lambda: st.finetune(Detached(), [(X, CLASSES)]),
        errors.TrainingError,
        r"no gradient reaches what is trained: at the first step \(loss 1\.\d+\) all gradients are 0",
    ),
    "rounded outputs": (
        lambda: st.finetune(Detached(rounded=True), [(X, VALUES)], loss="mse"),
        errors.TrainingError,
        "no gradient reaches what is trained",
    ),
    "a loss that is none": (
        lambda: st.finetune(mlp(), [(X, CLASSES)], loss="l1"),
        errors.TrainingError,
        'loss=\'l1\': there are "cross_entropy", "mse", "bce", "kl" and',
    ),
    "logits beside a teacher": (
        lambda: st.finetune(mlp(), [(X, VALUES)], loss="kl", teacher=mlp(seed=3)),
        errors.TrainingError,
        "leave teacher= out",
    ),
    "two losses": (
        lambda: TrainingRun(mlp(), [(X, VALUES)], settings=Settings(loss="mse"), loss=functional.mse_loss),
        errors.TrainingError,
        "give one of the two",
    ),
    "a loss a sample": (
        lambda: st.finetune(mlp(), [(X, VALUES)], loss=lambda o, y: (o - y).mean(dim=1)),
        errors.TrainingError,
        r"loss= gave float32 \[64\] for batch 0, not a scalar",
    ),
    "a loss that fails": (
        lambda: st.finetune(mlp(), [(X, VALUES)], loss=lambda o, y: o["logits"]),
        errors.TrainingError,
        r"loss= failed on batch 0 \(outputs float32 \[64, 3\], labels float32 \[64, 3\]\)",
    ),
    "held-out labels that may mean anything": (
        lambda: st.finetune(mlp(), [(X, CLASSES)], held_out=[(X, VALUES)]),
        errors.TrainingError,
        NAMES,
    ),
    "held-out values that are none": (
        lambda: st.finetune(mlp(), [(X, VALUES)], loss="mse", held_out=[(X, VALUES * torch.nan)]),
        errors.TrainingError,
        "the held-out loss became nan in epoch 0, step 0",
    ),
    "no held-out batch": (
        lambda: st.finetune(mlp(), [(X, CLASSES)], held_out=[]),
        errors.DataError,
        "held_out is empty",
    ),
}


class First(nn.Module):
    def forward(self, outputs: tuple[Tensor, ...]) -> Tensor:
        return outputs[0]


@pytest.mark.parametrize(("call", "kind", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_could_mean_something_else_is_one_clear_error(
    call: Callable[[], object], kind: type[errors.SpectrimError], message: str
) -> None:
    with pytest.raises(kind, match=re.compile(message, re.DOTALL)):
        call()


def test_a_regressor_and_a_multi_label_network_regain_what_compression_lost() -> None:
    torch.manual_seed(0)
    x = torch.randn(1000, 20)
    values = (x @ torch.randn(20, 3)) + torch.sin(3 * x[:, :1])
    for loss, labels in (("mse", values), ("bce", (values > 1).float())):
        torch.manual_seed(0)
        dense = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
        data = list(zip(x.split(50), labels.split(50), strict=True))
        dense = st.finetune(dense, data, loss=loss, epochs=6, lr=5e-3).model
        small = st.compress(dense, st.Rank(4), example_inputs=x[:1], data=data, keep_last=True).model
        before = state(small)

        def error(model: nn.Module, loss: str = loss, labels: Tensor = labels) -> float:
            with torch.no_grad():
                outputs = model(x)
            return float(
                functional.mse_loss(outputs, labels)
                if loss == "mse"
                else ((outputs > 0) != (labels > 0)).float().mean()
            )

        for options in ({}, {"teacher": dense}):
            tuned = st.finetune(small, data, loss=loss, epochs=4, lr=3e-3, **options).model
            assert error(tuned) < 0.9 * error(small)
        assert same_state(small, before)


class Options(nn.Module):
    """A network with an argument of its own, whose scores are one output among others."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, values: Tensor, *, scale: float) -> dict[str, Any]:
        return {"scores": scale * self.layer(values), "feature": values}


def scores(model: nn.Module, batch: Any) -> Any:
    return model(batch["values"], scale=2.0)["scores"]


def test_labels_by_name_and_a_call_of_ones_own() -> None:
    torch.manual_seed(0)
    values = torch.randn(60, 6)
    target = (values[:, :3] + 0.1 * torch.randn(60, 3)).argmax(dim=1)
    data = [{"values": x, "target": y} for x, y in zip(values.split(20), target.split(20), strict=True)]
    named = {"labels": "target", "forward": scores}
    model = Options().eval()
    before = st.accuracy(model, data, **named).value
    assert before == float((model.layer(values).argmax(dim=1) == target).double().mean())
    tuned = st.finetune(model, data, epochs=8, lr=0.05, held_out=data, **named)
    after = st.accuracy(tuned.model, data, **named).value
    assert after == tuned.history[tuned.history.weights_of or -1].held_out
    assert after > max(before, 0.9)
    by_epoch = st.finetune(model, lambda epoch: data, epochs=8, lr=0.05, **named)
    assert same_state(by_epoch.model, state(tuned.model))


@pytest.mark.parametrize("call", [st.accuracy, st.finetune])
def test_labels_that_batches_do_not_have(call: Any) -> None:
    for batch in ({"values": torch.randn(4, 6)}, (torch.randn(4, 6), torch.zeros(4))):
        with pytest.raises(errors.DataError, match="without the entry 'target' that labels= names"):
            call(nn.Linear(6, 3), [batch], labels="target")
    with pytest.raises(errors.ModelError, match="Forward cannot run batch 0"):
        call(nn.Linear(6, 3), [(torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))], forward=scores)
