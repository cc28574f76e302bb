"""Fine-tuning: what is trained, by which loss, when it stops, and what a mistake says."""

import copy
import inspect
import math
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Residual, inputs, same_state, small_mlp, state
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import spectrim as st
from spectrim import errors
from spectrim.training import Checkpoint, History, Settings, Step, TrainingRun, resumed, train_in_place

Pair = tuple[Tensor, Tensor]


def network() -> nn.Sequential:
    """Two factored layers, a norm with statistics of its own, dropout, a head."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )
    model(inputs(64, 12, dtype=torch.float32))
    return st.compress(model, st.Rank(3), example_inputs=inputs(2, 12, dtype=torch.float32), keep_last=True).model


def task(size: int = 96) -> list[Pair]:
    x = inputs(size, 12, dtype=torch.float32)
    return list(zip(x.split(16), x[:, :4].argmax(dim=1).split(16), strict=True))


def changed(tuned: nn.Module, model: nn.Module) -> set[str]:
    before = model.state_dict()
    return {name for name, tensor in tuned.state_dict().items() if not torch.equal(tensor, before[name])}


FACTORS = {"0.down.weight", "0.up.weight", "0.up.bias", "4.down.weight", "4.up.weight", "4.up.bias"}
NORM = {"1.weight", "1.bias"}
STATISTICS = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
HEAD = {"6.weight", "6.bias"}


@pytest.mark.parametrize(
    ("train", "frozen_norms", "moved"),
    [
        ("all", True, FACTORS | NORM | HEAD),
        ("all", False, FACTORS | NORM | STATISTICS | HEAD),
        ("factors", True, FACTORS),
        ("factors", False, FACTORS),
        ("head", False, HEAD),
        ("6", False, HEAD),
        (["*.up"], True, {"0.up.weight", "0.up.bias", "4.up.weight", "4.up.bias"}),
        (("4.*.weight", "6.bias"), True, {"4.down.weight", "4.up.weight", "6.bias"}),
        (["1"], False, NORM | STATISTICS),
    ],
    ids=lambda value: None if isinstance(value, set) else str(value),
)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_what_is_frozen_really_does_not_change(
    train: str | list[str], frozen_norms: bool, moved: set[str], optimizer: str
) -> None:
    model = network()
    options = {"optimizer": optimizer, "weight_decay": 0.1, "epochs": 1}
    tuned = st.finetune(model, task(), train=train, frozen_norms=frozen_norms, **options)
    assert changed(tuned.model, model) == moved
    assert all(parameter.requires_grad and parameter.grad is None for parameter in tuned.model.parameters())


def test_the_head_may_be_factored_and_a_parameter_that_asks_for_no_gradient_stays() -> None:
    model = small_mlp(dtype=torch.float32)
    model = st.compress(model, st.Rank(2), example_inputs=inputs(2, 12, dtype=torch.float32)).model
    model[4].up.bias.requires_grad_(False)
    tuned = st.finetune(model, task(), train="head", epochs=1)
    assert changed(tuned.model, model) == {"4.down.weight", "4.up.weight"}
    flags = ([parameter.requires_grad for parameter in network.parameters()] for network in (tuned.model, model))
    assert next(flags) == next(flags)
    assert not tuned.model[4].up.bias.requires_grad


def test_statistics_of_a_frozen_norm_stay_when_others_move() -> None:
    model = Residual().float()
    x = inputs(16, 3, 10, 10, dtype=torch.float32)
    tuned = st.finetune(model, [(x, torch.arange(16) % 5)], train=["norm_one", "head"], frozen_norms=False, epochs=2)
    assert {name.partition(".")[0] for name in changed(tuned.model, model)} == {"norm_one", "head"}
    assert "norm_one.running_mean" in changed(tuned.model, model)


def reference(
    model: nn.Module, batches: list[Pair], optimiser: torch.optim.Optimizer, *, epochs: int, lr: float
) -> None:
    """The same training, written out."""
    total = epochs * len(batches)
    for number in range(total):
        x, y = batches[number % len(batches)]
        for group in optimiser.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * number / total))
        optimiser.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimiser.step()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_it_is_the_optimiser_and_the_schedule_that_it_says(optimizer: str) -> None:
    model = small_mlp()
    batches = [(x.double(), y) for x, y in task()]
    options: dict[str, Any] = {"lr": 0.03, "weight_decay": 0.2}
    tuned = st.finetune(
        model, batches, optimizer=optimizer, momentum=0.8, epochs=2, warm_up=0.0, clip=0.5, **options
    ).model
    kinds = {"adamw": torch.optim.AdamW, "sgd": lambda *a, **k: torch.optim.SGD(*a, momentum=0.8, **k)}
    reference(model, batches, kinds[optimizer](model.parameters(), **options), epochs=2, lr=options["lr"])
    for trained, expected in zip(tuned.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(trained, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_loss_beside_a_teacher_is_the_weighted_sum(weight: float) -> None:
    model, teacher = small_mlp(dtype=torch.float32), small_mlp(dtype=torch.float32).requires_grad_(False)
    teacher[0].weight.mul_(1.7)
    (x, y), *_ = task()
    tuned = st.finetune(model, [(x, y)], teacher=teacher, label_weight=weight, temperature=3.0, epochs=1)
    own, others = model(x), teacher(x)
    soft = functional.kl_div((own / 3).log_softmax(1), (others / 3).softmax(1), reduction="batchmean") * 9
    expected = weight * functional.cross_entropy(own, y) + (1 - weight) * soft
    assert tuned.history[0].loss == pytest.approx(expected.item(), rel=1e-5)


def test_bfloat16_computes_in_bfloat16_and_keeps_the_weights() -> None:
    seen: list[torch.dtype] = []
    model = network()
    hooked = copy.deepcopy(model)
    hooked[6].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    tuned = st.finetune(hooked, task(), precision="bf16", epochs=2, lr=1e-2)
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in tuned.model.parameters()} == {torch.float32}
    plain = st.finetune(model, task(), epochs=2, lr=1e-2)
    assert tuned.history[1].loss == pytest.approx(plain.history[1].loss, rel=0.1)
    assert tuned.history[1].loss != plain.history[1].loss


def spoiled(epoch: int) -> list[Pair]:
    """Right labels in the first two epochs, wrong ones afterwards."""
    return [(x, y if epoch < 2 else (y + 1) % 4) for x, y in task()]


def test_early_stopping_ends_with_the_best_weights() -> None:
    model, held_out = network(), task()
    whole = st.finetune(model, spoiled, epochs=9, lr=3e-2, held_out=held_out)
    assert not whole.history.stopped_early
    assert (len(whole.history), whole.history.weights_of) == (9, 8)
    tuned = st.finetune(model, spoiled, epochs=9, lr=3e-2, held_out=held_out, patience=2)
    history = tuned.history
    assert history.stopped_early
    assert history.best is not None
    assert history.best.epoch == history.weights_of == len(history) - 3
    assert [epoch.held_out for epoch in history] == [epoch.held_out for epoch in whole.history[: len(history)]]
    assert st.accuracy(tuned.model, held_out).value == history.best.held_out
    last = st.finetune(model, spoiled, epochs=9, lr=3e-2, held_out=held_out, patience=2, keep="last")
    assert (last.history.weights_of, last.history.stopped_early) == (len(history) - 1, True)
    assert st.accuracy(last.model, held_out).value == history[-1].held_out


def test_a_history_is_a_tuple_that_goes_to_json_and_back(tmp_path: Path) -> None:
    history = st.finetune(network(), task(), epochs=3, lr=1e-2, held_out=task(), keep="best").history
    assert isinstance(history, tuple)
    assert [epoch.epoch for epoch in history] == [0, 1, 2]
    assert all(epoch.seconds > 0 for epoch in history)
    assert len(history.lr) == 3
    assert history.lr[0] > history.lr[1] > history.lr[2] > 0
    again = History.load(history.save(tmp_path / "history.json"))
    assert again == history
    assert (again.lr, again.stopped_early, again.weights_of) == (history.lr, False, history.weights_of)
    assert copy.deepcopy(history).lr == history.lr
    assert "stopped_early=False" in repr(history)
    assert History().best is None
    assert st.finetune(network(), task(), epochs=1).history.best is None


@pytest.mark.parametrize("text", ["{}", "no", '{"epochs": [], "lr": [0.1], "stopped_early": false}'])
def test_what_is_not_a_history_is_an_error(text: str) -> None:
    with pytest.raises(errors.FileError, match=r"the text is not a valid"):
        History.from_json(text)


def test_a_history_is_plotted() -> None:
    history = st.finetune(network(), task(), epochs=3, held_out=task(), keep="best").history
    figure = st.plot_history(history)
    assert [trace.name for trace in figure.data] == ["training loss", "held-out accuracy", "best"]
    assert list(figure.data[0].y) == [epoch.loss for epoch in history]
    assert list(figure.data[1].y) == [100 * epoch.held_out for epoch in history]
    assert list(figure.data[2].x) == [history.best.epoch + 1]
    assert (figure.layout.yaxis.type, figure.layout.yaxis2.type) == ("log", None)  # linear where none is named
    alone = st.plot_history(st.finetune(network(), task(), epochs=2).history)
    assert ([trace.name for trace in alone.data], alone.layout.yaxis.type) == (["training loss"], "log")
    with pytest.raises(errors.DataError, match="no epoch"):
        st.plot_history(History())


def test_steps_tell_accuracy_and_time_left() -> None:
    model, batches = network().eval(), task()
    model[3].p = 0.0
    steps: list[Step] = []
    st.finetune(model, batches, epochs=2, lr=1e-9, on_step=steps.append)
    right = [int((model(x).argmax(dim=1) == y).sum()) for x, y in batches]
    assert [step.accuracy for step in steps[:6]] == [sum(right[: n + 1]) / (16 * (n + 1)) for n in range(6)]
    assert steps[6].accuracy == steps[0].accuracy
    assert all(step.seconds_left is not None and step.seconds_left >= 0 for step in steps)
    assert steps[-1].seconds_left == 0
    logits = [(x, model(x).detach()) for x, _ in batches]
    st.finetune(model, lambda epoch: iter(logits), loss="kl", epochs=1, on_step=steps.append)
    assert (steps[-1].accuracy, steps[-1].seconds_left, steps[-1].steps) == (None, None, 0)


def test_random_states_of_the_caller_are_put_back() -> None:
    own = torch.Generator().manual_seed(5)
    x, y = map(torch.cat, zip(*task(), strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True, generator=own)
    before = torch.get_rng_state(), own.get_state(), random.getstate(), np.random.get_state()[1].tolist()
    model = st.finetune(network(), loader, epochs=2).model
    torch.manual_seed(0)  # as network() does
    network()
    after = torch.get_rng_state(), own.get_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[1], after[1])
    assert before[2:] == after[2:]
    torch.manual_seed(8)
    state_now = torch.get_rng_state()
    st.finetune(model, loader, epochs=1)
    assert torch.equal(torch.get_rng_state(), state_now)


def test_training_in_place_leaves_other_parameters_their_gradients_and_flags() -> None:
    model = small_mlp(dtype=torch.float32)
    before = state(model)
    settings = Settings(epochs=1, lr=1e-2, weight_decay=0.1, clip=None)
    history = train_in_place(TrainingRun(model, task(), settings=settings, trained=list(model[4].parameters())))
    assert isinstance(history, History)
    assert {name for name in before if not torch.equal(before[name], model.state_dict()[name])} == {
        "4.weight",
        "4.bias",
    }
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


class Stop:
    """Interrupts once, when the given place is reached."""

    def __init__(self, at: int) -> None:
        self.ahead = at

    def __call__(self, _: object = None) -> None:
        self.ahead -= 1
        if self.ahead == 0:
            raise KeyboardInterrupt


class Watched:
    """Held-out batches that call a function whenever they are iterated."""

    def __init__(self, batches: list[Pair], asked: Callable[[], None]) -> None:
        self.batches, self.asked = batches, asked

    def __iter__(self) -> Iterator[Pair]:
        self.asked()
        return iter(self.batches)


def shuffled(*, own: bool) -> DataLoader[Any]:
    x, y = map(torch.cat, zip(*task(), strict=True))
    generator = torch.Generator().manual_seed(5) if own else None
    return DataLoader(TensorDataset(x, y), batch_size=20, shuffle=True, generator=generator)


@pytest.mark.parametrize("own", [False, True], ids=["seeded by the run", "own generator"])
@pytest.mark.parametrize("place", ["step", "held-out"])
def test_an_interrupt_anywhere_changes_nothing(tmp_path: Path, own: bool, place: str) -> None:
    model, path = network(), tmp_path / "run"
    options: dict[str, Any] = {"epochs": 2, "lr": 1e-2, "optimizer": "sgd", "frozen_norms": False}
    whole = st.finetune(model, shuffled(own=own), held_out=task(), **options)
    for at in range(1, 11 if place == "step" else 3):
        stop = Stop(at)
        on_step = stop if place == "step" else None
        held_out = Watched(task(), stop if place == "held-out" else lambda: None)
        with pytest.raises(KeyboardInterrupt):
            st.finetune(model, shuffled(own=own), held_out=held_out, checkpoint=path, on_step=on_step, **options)
        steps: list[Step] = []
        tuned = st.finetune(model, shuffled(own=own), held_out=task(), checkpoint=path, on_step=steps.append, **options)
        assert len(steps) == 10 - (at if place == "step" else 5 * at)
        assert same_state(tuned.model, state(whole.model))
        assert [epoch.loss for epoch in tuned.history] == [epoch.loss for epoch in whole.history]
        path.unlink()


def by_name(samples: list[Any]) -> dict[str, Tensor]:
    x, y = zip(*samples, strict=True)
    return {"x": torch.stack(x), "target": torch.stack(y)}


def test_labels_by_name_of_a_loader_are_resumed_as_well(tmp_path: Path) -> None:
    def call(**options: Any) -> nn.Module:
        pairs = shuffled(own=True)
        data = DataLoader(pairs.dataset, batch_size=20, shuffle=True, generator=pairs.generator, collate_fn=by_name)
        return st.finetune(network(), data, labels="target", forward=lambda m, b: m(b["x"]), **options).model

    whole = call(epochs=2)
    with pytest.raises(KeyboardInterrupt):
        call(epochs=2, checkpoint=tmp_path / "run", on_step=Stop(7))
    assert same_state(call(epochs=2, checkpoint=tmp_path / "run"), state(whole))


@pytest.mark.parametrize("name", ["data", "held_out"])
def test_labels_by_name_of_a_generator_are_refused_at_once(name: str) -> None:
    batches = [{"input": x, "target": y} for x, y in task()]
    arguments: dict[str, Any] = {"data": batches, "held_out": batches, name: iter(batches)}
    with pytest.raises(errors.DataError, match="exhausted after one epoch"):
        st.finetune(network(), **arguments, labels="target", epochs=2, on_step=lambda _: pytest.fail("it trained"))


class Signals(nn.Module):
    """Sends this process Ctrl-C in the middle of a forward pass, and as often as asked."""

    def __init__(self, *, at: int, times: int = 1) -> None:
        super().__init__()
        self.ahead, self.times = at, times

    def forward(self, x: Tensor) -> Tensor:
        self.ahead -= self.training
        for _ in range(self.times if self.ahead == 0 else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return x


def signalled(at: int, *, times: int = 1) -> nn.Module:
    return network().append(Signals(at=at, times=times))


def test_ctrl_c_within_a_step_waits_for_its_end(tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 2, "lr": 1e-2, "frozen_norms": False}
    whole = st.finetune(signalled(-1), task(), **options)
    for at in (1, 4, 6, 11):
        steps: list[Step] = []
        path = tmp_path / str(at)
        with pytest.raises(KeyboardInterrupt):
            st.finetune(signalled(at), task(), checkpoint=path, on_step=steps.append, **options)
        assert len(steps) == at
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        tuned = st.finetune(signalled(-1), task(), checkpoint=path, on_step=steps.append, **options)
        assert len(steps) == 12
        assert same_state(tuned.model, state(whole.model))


@pytest.mark.parametrize("at", [2, 6, 9])
def test_what_a_listener_does_to_the_weights_is_part_of_the_step(tmp_path: Path, at: int) -> None:
    def trained(*, stop: int = -1, checkpoint: Path | None = None) -> nn.Module:
        model, ahead = network(), stop

        def listen(step: Step) -> None:
            nonlocal ahead
            ahead -= 1
            if ahead == 0:
                os.kill(os.getpid(), signal.SIGINT)
            with torch.no_grad():
                model[6].weight.mul_(0.9 + 0.1 * torch.rand(()))

        state_file = Checkpoint(checkpoint, run="one") if checkpoint else None
        settings = Settings(epochs=2, lr=1e-2, clip=None)
        train_in_place(TrainingRun(model, task(), settings=settings, checkpoint=state_file, on_step=listen))
        return model

    whole, path = trained(), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        trained(stop=at, checkpoint=path)
    assert same_state(trained(checkpoint=path), state(whole))


def test_a_second_ctrl_c_does_not_wait_and_what_was_saved_stays(tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 2, "lr": 1e-2, "frozen_norms": False, "checkpoint": tmp_path / "run"}
    with pytest.raises(KeyboardInterrupt):
        st.finetune(signalled(5, times=2), task(), save_every=3, **options)
    steps: list[Step] = []
    tuned = st.finetune(signalled(-1), task(), on_step=steps.append, save_every=3, **options)
    assert steps[0].step == 3
    assert same_state(tuned.model, state(st.finetune(signalled(-1), task(), **options | {"checkpoint": None}).model))


def test_a_handler_of_ones_own_is_left_alone() -> None:
    def own(number: int, frame: object) -> None:
        raise RuntimeError("mine")

    before = signal.signal(signal.SIGINT, own)
    try:
        with pytest.raises(errors.ModelError, match="mine"):
            st.finetune(signalled(2), task(), epochs=1)
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupted_truncated_network_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def truncated() -> nn.Module:
        model = small_mlp(dtype=torch.float32)
        st.training.truncated_(model, st.Rank(3))
        return model

    options: dict[str, Any] = {"epochs": 2, "lr": 1e-2, "held_out": task()}
    whole = st.finetune(truncated(), task(), **options)
    for at in (1, 4, 6, 8):
        path = tmp_path / str(at)
        with pytest.raises(KeyboardInterrupt):
            st.finetune(truncated(), task(), checkpoint=path, on_step=Stop(at), **options)
        tuned = st.finetune(truncated(), task(), checkpoint=path, **options)
        assert same_state(tuned.model, state(whole.model))


def test_a_finished_run_is_taken_from_its_checkpoint(tmp_path: Path) -> None:
    model, path = network(), str(tmp_path / "new" / "run")
    first = st.finetune(model, spoiled, epochs=9, lr=3e-2, held_out=task(), patience=2, checkpoint=path)
    steps: list[Step] = []
    other = st.finetune(
        model, spoiled, epochs=9, lr=3e-2, held_out=task(), patience=2, checkpoint=path, on_step=steps.append
    )
    assert not steps
    assert other.history == first.history
    assert other.history.stopped_early
    assert same_state(other.model, state(first.model))


GIVEN: dict[str, Any] = {"epochs": 2, "lr": 1e-2}
OTHERS: dict[str, tuple[Callable[[nn.Module], nn.Module], dict[str, Any], str]] = {
    "lr": (lambda m: m, {"lr": 3e-2}, r"lr was 0\.01 and is 0\.03"),
    "epochs and seed": (lambda m: m, {"epochs": 3, "seed": 1}, r"epochs was 2 and is 3, seed was 0 and is 1"),
    "train": (lambda m: m, {"train": "head"}, r"trained was .* and is \[\"6\.bias\", \"6\.weight\"\]"),
    "weights": (lambda m: m.double().float().requires_grad_(True).apply(_nudge), {}, "other starting weights"),
    "network": (lambda m: m.double(), {}, "another network"),
    "teacher": (lambda m: m, {"teacher": small_mlp(dtype=torch.float32)}, "another teacher"),
}


def _nudge(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.weight.data[0, 0] += 1e-3


@pytest.mark.parametrize(("model", "more", "message"), OTHERS.values(), ids=OTHERS.keys())
def test_a_checkpoint_of_another_run_says_what_differs(
    tmp_path: Path, model: Callable[[nn.Module], nn.Module], more: dict[str, Any], message: str
) -> None:
    path = tmp_path / "run"
    st.finetune(network(), task(), checkpoint=path, **GIVEN)
    written = path.read_bytes()
    with pytest.raises(errors.FileError, match=message) as raised:
        st.finetune(model(network()), task(), checkpoint=path, **(GIVEN | more))
    assert "give another path, or delete the file" in str(raised.value)
    assert path.read_bytes() == written


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _flip(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[-9] ^= 4
    path.write_bytes(whole)


def _foreign(path: Path) -> None:
    save_file({"x": torch.zeros(2)}, path)


@pytest.mark.parametrize(
    ("harm", "message"),
    [(_truncate, "cannot read"), (_flip, "checksum"), (_foreign, "not the checkpoint of a training run")],
)
def test_a_damaged_checkpoint_is_an_error_for_a_path_and_replaced_for_a_checkpoint(
    tmp_path: Path, harm: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "run"
    st.finetune(network(), task(), checkpoint=path, **GIVEN)
    harm(path)
    harmed = path.read_bytes()
    with pytest.raises(errors.FileError, match=message) as raised:
        st.finetune(network(), task(), checkpoint=path, **GIVEN)
    assert "delete the file to start from the beginning" in str(raised.value)
    assert path.read_bytes() == harmed
    with pytest.raises(errors.FileError, match=message):
        st.finetune(network(), task(), checkpoint=Checkpoint(path, run="one", unfit="refuse"), **GIVEN)
    steps: list[Step] = []
    st.finetune(network(), task(), checkpoint=Checkpoint(path, run="one"), on_step=steps.append, **GIVEN)
    assert len(steps) == 12
    assert path.read_bytes() != harmed


def test_other_data_of_a_resumed_epoch_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        st.finetune(network(), task(), checkpoint=path, on_step=Stop(3), **GIVEN)
    with pytest.raises(errors.DataError, match="has 4 batches, and had 6"):
        st.finetune(network(), task()[:4], checkpoint=path, **GIVEN)
    with pytest.raises(KeyboardInterrupt):
        st.finetune(network(), lambda epoch: iter(task()), checkpoint=tmp_path / "other", on_step=Stop(3), **GIVEN)
    with pytest.raises(errors.DataError, match="ended after 2 batches, and 3 were done"):
        st.finetune(network(), lambda epoch: iter(task()[:2]), checkpoint=tmp_path / "other", **GIVEN)


def test_what_a_nan_loss_leaves_can_be_read(tmp_path: Path) -> None:
    model, path, good = network(), tmp_path / "run", task()
    bad = [*good[:2], (good[2][0] * torch.nan, good[2][1])]

    def data(epoch: int) -> list[Pair]:
        return good if epoch < 2 else bad

    options: dict[str, Any] = {"epochs": 4, "lr": 1e-2, "held_out": good}
    with pytest.raises(
        errors.TrainingError, match=r"loss became nan in epoch 2, step 2; .*/run holds the .* best epoch"
    ):
        st.finetune(model, data, keep="best", checkpoint=path, **options)
    best = resumed(path, model)
    history = st.finetune(model, good, keep="best", **options).history
    assert st.accuracy(best, good).value == max(epoch.held_out for epoch in history[:2])
    assert changed(resumed(path, model, which="last"), model)
    with pytest.raises(errors.FileError, match="another network"):
        resumed(path, small_mlp())
    path.unlink()
    with pytest.raises(errors.FileError, match="cannot read"):
        resumed(path, model)
    with pytest.raises(errors.TrainingError, match="an earlier step"):
        st.finetune(model, data, checkpoint=path, **options)
    with pytest.raises(errors.FileError, match="no best epoch"):
        resumed(path, model)


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change() -> None:
    model = nn.Sequential(nn.Linear(12, 4))
    nn.init.zeros_(model[0].weight)
    (x, y), *_ = task()

    class Root(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return z.abs().sqrt() * 0 + z  # the root's slope is infinite at 0

    model.append(Root())
    nn.init.zeros_(model[0].bias)
    with pytest.raises(errors.TrainingError, match="the gradient became nan in epoch 0, step 0"):
        st.finetune(model, [(x, y)])


def test_a_loop_of_ones_own_trains_a_compressed_network(tmp_path: Path) -> None:
    dense = small_mlp(dtype=torch.float32)
    batches = task()
    small = st.compress(dense, st.Rank(3), example_inputs=batches[0][0], keep_last=True).model
    optimiser = torch.optim.Adam(small.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        for x, y in batches:
            optimiser.zero_grad()
            loss = functional.cross_entropy(small(x), y)
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    again = st.load(st.save(small, tmp_path / "small.safetensors"), dense)
    assert same_state(again, state(small))
    assert torch.equal(again(batches[0][0]), small(batches[0][0]))


def frozen(model: nn.Module) -> nn.Module:
    model[6].requires_grad_(False)
    return model


class Tuples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.layer(x),)


def one_left(batches: list[Pair]) -> list[Pair]:
    return [batches[0], (batches[1][0][:1], batches[1][1][:1])]


def relabelled(change: Callable[[Tensor], object]) -> list[Any]:
    return [(x, change(y)) for x, y in task()]


B = task()
BAD: dict[str, tuple[Callable[[nn.Module], object], type[errors.SpectrimError], str]] = {
    "labels out of range": (
        lambda m: st.finetune(m, relabelled(lambda y: y + 9)),
        errors.DataError,
        r"labels 9\.\.12, outside 0\.\.3",
    ),
    "negative labels": (lambda m: st.finetune(m, relabelled(lambda y: y - 1)), errors.DataError, r"outside 0\.\.3"),
    "float labels": (lambda m: st.finetune(m, relabelled(Tensor.float)), errors.DataError, r"float32 \[16\].*\.long"),
    "bool labels": (lambda m: st.finetune(m, relabelled(Tensor.bool)), errors.DataError, r"labels bool \[16\]"),
    "word labels": (lambda m: st.finetune(m, relabelled(lambda y: ["cat"] * 16)), errors.DataError, "make no tensor"),
    "labels that a teacher needs": (
        lambda m: st.finetune(m, relabelled(Tensor.float), teacher=m, label_weight=0.5),
        errors.DataError,
        "whole numbers",
    ),
    "one example and a norm": (
        lambda m: st.finetune(m, one_left(B), frozen_norms=False),
        errors.TrainingError,
        r"batch 1 .*too small for BatchNorm.*drop_last=True.*frozen_norms=True",
    ),
    "no logits": (lambda m: st.finetune(Tuples(), B), errors.DataError, "Tuples gives a tuple, not logits"),
    "a teacher without logits": (
        lambda m: st.finetune(m, B, teacher=Tuples()),
        errors.DataError,
        "Tuples gives a tuple, not logits",
    ),
    "another teacher": (
        lambda m: st.finetune(m, B, teacher=nn.Linear(12, 3)),
        errors.DataError,
        r"teacher's logits \[16, 3\] do not fit the outputs \[16, 4\]",
    ),
    "a pattern that matches nothing": (
        lambda m: st.finetune(m, B, train=["4.up.bais"]),
        errors.PatternError,
        r"'4\.up\.bais' matches no .* near names: 4\.up\.bias",
    ),
    "a misspelt choice": (lambda m: st.finetune(m, B, train="factor"), errors.PatternError, '"factors" or "head"'),
    "no patterns": (lambda m: st.finetune(m, B, train=[]), errors.TrainingError, "freezes everything"),
    "patterns that freeze everything": (
        lambda m: st.finetune(frozen(m), B, train=["6"]),
        errors.TrainingError,
        r"no parameter that asks for gradients among those that train=\['6'\] chooses",
    ),
    "no factors": (
        lambda m: st.finetune(small_mlp(), B, train="factors"),
        errors.TrainingError,
        "Sequential has no factored layer",
    ),
    "no head": (
        lambda m: st.finetune(nn.Sequential(nn.BatchNorm1d(12)), B, train="head"),
        errors.TrainingError,
        "no Linear or convolution",
    ),
    "the best of nothing": (lambda m: st.finetune(m, B, keep="best"), errors.TrainingError, r"keep='best'.*held_out="),
    "patience for nothing": (lambda m: st.finetune(m, B, patience=2), errors.TrainingError, r"patience=2 .*held_out="),
    "epochs": (lambda m: st.finetune(m, B, epochs=0), errors.TrainingError, "epochs=0: give at least one epoch"),
    "half an epoch": (lambda m: st.finetune(m, B, epochs=0.5), errors.ArgumentError, r"epochs=0\.5: give a whole"),
    "lr": (lambda m: st.finetune(m, B, lr=0.0), errors.TrainingError, r"lr=0\.0: give a learning rate above 0"),
    "infinite lr": (lambda m: st.finetune(m, B, lr=math.inf), errors.TrainingError, "lr=inf"),
    "label_weight": (
        lambda m: st.finetune(m, B, label_weight=1.5),
        errors.TrainingError,
        r"label_weight=1\.5: give the share",
    ),
    "label_weight alone": (lambda m: st.finetune(m, B, label_weight=0.5), errors.TrainingError, "give teacher="),
    "optimizer": (lambda m: st.finetune(m, B, optimizer="adam"), errors.TrainingError, "'adam': there are"),
    "momentum": (lambda m: st.finetune(m, B, momentum=1.0), errors.TrainingError, r"momentum=1\.0"),
    "weight decay": (lambda m: st.finetune(m, B, weight_decay=-1), errors.TrainingError, "weight_decay=-1"),
    "warm_up": (lambda m: st.finetune(m, B, warm_up=2), errors.TrainingError, "warm_up=2"),
    "clip": (lambda m: st.finetune(m, B, clip=0), errors.TrainingError, "clip=0"),
    "temperature": (lambda m: st.finetune(m, B, temperature=0), errors.TrainingError, "temperature=0"),
    "precision": (lambda m: st.finetune(m, B, precision="fp16"), errors.TrainingError, '"bf16"'),
    "keep": (lambda m: st.finetune(m, B, keep="first"), errors.TrainingError, "keep='first'"),
    "patience": (lambda m: st.finetune(m, B, patience=0), errors.TrainingError, "patience=0"),
    "seed": (lambda m: st.finetune(m, B, seed=-1), errors.TrainingError, "seed=-1"),
    "save_every": (lambda m: st.finetune(m, B, save_every=3), errors.TrainingError, "checkpoint="),
    "a generator": (
        lambda m: st.finetune(m, ((x, y) for x, y in B)),
        errors.DataError,
        "is a generator, which is exhausted after one epoch; give a list, a DataLoader",
    ),
    "a held-out generator": (
        lambda m: st.finetune(m, B, held_out=iter(B)),
        errors.DataError,
        "held_out is a list_iterator, which is exhausted",
    ),
    "no held-out samples": (
        lambda m: st.finetune(
            m, [(x, torch.zeros(len(x), 4)) for x, _ in B], held_out=[(B[0][0][:0], torch.zeros(0, 4))], loss="mse"
        ),
        errors.DataError,
        "held_out has no samples",
    ),
    "no data at all": (lambda m: st.finetune(m, None), errors.DataError, "the training data is a NoneType"),
}


@pytest.mark.parametrize(("call", "kind", "message"), BAD.values(), ids=BAD.keys())
def test_a_mistake_is_one_clear_error(
    call: Callable[[nn.Module], object], kind: type[errors.SpectrimError], message: str
) -> None:
    model = network()
    before = state(model)
    with pytest.raises(kind, match=message):
        call(model)
    assert same_state(model, before)
    assert model.training


def test_settings_have_the_defaults_of_the_arguments_and_no_other_names() -> None:
    arguments = inspect.signature(st.finetune).parameters
    defaults = {name: arguments[name].default for name in Settings.model_fields}
    assert Settings(**{**defaults, "keep": "last"}) == Settings()
    with pytest.raises(errors.TrainingError, match=r"rate=0\.1: there is no such setting, only epochs, lr, .*, seed"):
        Settings(rate=0.1)


def test_a_generator_is_enough_for_one_epoch_without_a_checkpoint() -> None:
    assert len(st.finetune(network(), iter(task()), epochs=1).history) == 1


@pytest.mark.parametrize("where", ["file/run", "folder"])
def test_a_checkpoint_that_cannot_be_written_is_an_error_before_training(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    steps: list[Step] = []
    with pytest.raises(errors.FileError, match="folder"):
        st.finetune(network(), task(), checkpoint=tmp_path / where, on_step=steps.append)
    assert not steps
