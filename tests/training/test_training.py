"""Fine-tuning: it learns, repeats, resumes, and stops with a reason."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import inputs, same_state, state
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spectrim as st
from spectrim import errors
from spectrim.training import Settings, Step, TrainingRun, train_in_place
from spectrim.training.checkpoint import Checkpoint


def task() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network and data that it labels itself, so that a good answer exists."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    x = inputs(512, 12, dtype=torch.float32)
    with torch.no_grad():
        y = model(x).argmax(dim=1)
    return model, x, y


def epochs(x: Tensor, y: Tensor) -> Callable[[int], list[tuple[Tensor, Tensor]]]:
    def data(epoch: int) -> list[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        return [(x[part], y[part]) for part in order.split(64)]

    return data


@pytest.mark.parametrize("how", ["labels", "teacher", "logits"])
def test_it_regains_what_compression_lost(how: str) -> None:
    model, x, y = task()
    small = st.compress(model, st.Rank(2), example_inputs=x, keep_last=True).model
    before = st.accuracy(small, [(x, y)]).value
    with torch.no_grad():
        targets = model(x) if how == "logits" else y
    options = {"teacher": {"teacher": model}, "logits": {"loss": "kl"}, "labels": {}}[how]
    tuned = st.finetune(small, epochs(x, targets), **options, epochs=8, lr=1e-2)
    assert st.accuracy(tuned.model, [(x, y)]).value > before + 0.02
    assert tuned.history[-1].loss < tuned.history[0].loss


def test_a_data_loader_is_enough() -> None:
    model, x, y = task()
    loader = DataLoader(TensorDataset(x, y), batch_size=64)
    tuned = st.finetune(model, loader, epochs=2, held_out=[(x, y)])
    assert [epoch.epoch for epoch in tuned.history] == [0, 1]
    assert tuned.history[-1].held_out is not None


def test_the_models_are_left_alone_and_only_the_factors_move_when_asked() -> None:
    model, x, y = task()
    small = st.compress(model, st.Rank(2), example_inputs=x, keep_last=True).model
    before, dense, random = state(small), state(model), torch.get_rng_state()
    tuned = st.finetune(small, epochs(x, y), teacher=model, train="factors", epochs=1)
    assert same_state(small, before)
    assert same_state(model, dense)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(tuned.model[4].weight, small[4].weight)
    assert not torch.equal(tuned.model[0].down.weight, small[0].down.weight)
    assert model.training
    assert all(parameter.grad is None for parameter in (*model.parameters(), *small.parameters()))


def test_running_statistics_of_norms_stay_and_training_flags_come_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 4))
    model[2].eval()
    x, y = inputs(64, 12, dtype=torch.float32), torch.arange(64) % 4
    tuned = st.finetune(model, [(x, y)], epochs=2)
    assert torch.equal(tuned.model[1].running_mean, model[1].running_mean)
    assert not torch.equal(tuned.model[1].weight, model[1].weight)
    assert [module.training for module in tuned.model.modules()] == [module.training for module in model.modules()]


def test_the_same_seed_gives_the_same_weights() -> None:
    model, x, y = task()
    model.insert(1, nn.Dropout(0.3))
    same, again = (st.finetune(model, epochs(x, y), epochs=2, seed=5).model for _ in range(2))
    other = st.finetune(model, epochs(x, y), epochs=2, seed=6).model
    assert same_state(same, state(again))
    assert not same_state(same, state(other))


class InterruptedRunError(Exception):
    pass


def stop_in_epoch(number: int) -> Callable[[Step], None]:
    def stop(step: Step) -> None:
        if step.epoch == number and step.step == 3:
            raise InterruptedRunError

    return stop


def test_an_interrupted_run_goes_on_to_bit_equal_weights(tmp_path: Path) -> None:
    model, x, y = task()
    model.insert(1, nn.Dropout(0.2))
    whole = st.finetune(model, epochs(x, y), epochs=4, held_out=[(x, y)])
    checkpoint = Checkpoint(tmp_path / "state.safetensors", run="this one")
    with pytest.raises(InterruptedRunError):
        st.finetune(model, epochs(x, y), epochs=4, held_out=[(x, y)], checkpoint=checkpoint, on_step=stop_in_epoch(2))
    steps: list[Step] = []
    resumed = st.finetune(model, epochs(x, y), epochs=4, held_out=[(x, y)], checkpoint=checkpoint, on_step=steps.append)
    assert steps[0].epoch == 2
    assert same_state(resumed.model, state(whole.model))
    curves = ([(epoch.loss, epoch.held_out) for epoch in run.history] for run in (resumed, whole))
    assert next(curves) == next(curves)


@pytest.mark.parametrize("harm", ["another run", "cut", "another network"])
def test_a_checkpoint_that_does_not_fit_is_not_taken_up(tmp_path: Path, harm: str) -> None:
    model, x, y = task()
    checkpoint = Checkpoint(tmp_path / "state.safetensors", run="one")
    st.finetune(model, epochs(x, y), epochs=1, checkpoint=checkpoint)
    if harm == "another run":
        checkpoint = Checkpoint(checkpoint.path, run="two")
    elif harm == "cut":
        checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:200])
    else:
        model = nn.Sequential(nn.Linear(12, 4))
    steps: list[Step] = []
    st.finetune(model, epochs(x, y), epochs=1, checkpoint=checkpoint, on_step=steps.append)
    assert (steps[0].epoch, steps[0].step) == (0, 0)


def test_steps_tell_where_training_stands() -> None:
    model, x, y = task()
    steps: list[Step] = []
    st.finetune(model, epochs(x, y), epochs=2, on_step=steps.append)
    assert [(step.epoch, step.step) for step in steps] == [(e, s) for e in range(2) for s in range(8)]
    assert {(step.epochs, step.steps) for step in steps} == {(2, 8)}


def nothing_to_train(model: nn.Module, x: Tensor, y: Tensor) -> object:
    return st.finetune(model.requires_grad_(False), [(x, y)])


BAD: dict[str, tuple[Callable[..., Any], type[errors.SpectrimError], str]] = {
    "NaN": (lambda m, x, y: st.finetune(m, [(x, y), (x * torch.nan, y)]), errors.TrainingError, "epoch 0, step 1"),
    "no epochs": (lambda m, x, y: st.finetune(m, [(x, y)], epochs=0), errors.TrainingError, "at least one epoch"),
    "no factors": (
        lambda m, x, y: st.finetune(m, [(x, y)], train="factors"),
        errors.TrainingError,
        "no factored layer",
    ),
    "all frozen": (nothing_to_train, errors.TrainingError, "nothing to train"),
    "no data": (lambda m, x, y: st.finetune(m, []), errors.DataError, "empty"),
    "no labels": (lambda m, x, y: st.finetune(m, [x]), errors.DataError, "pairs"),
    "labels out of range": (lambda m, x, y: st.finetune(m, [(x, y + 9)]), errors.DataError, r"outside 0\.\.3"),
    "labels of another size": (lambda m, x, y: st.finetune(m, [(x, y[:5])]), errors.DataError, r"labels \[5\]"),
    "another teacher": (
        lambda m, x, y: st.finetune(m, [(x, y)], teacher=nn.Linear(12, 3)),
        errors.DataError,
        r"logits \[512, 3\]",
    ),
}


@pytest.mark.parametrize(("call", "kind", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_clear_error(call: Callable[..., Any], kind: type[errors.SpectrimError], message: str) -> None:
    model, x, y = task()
    before = state(model)
    with pytest.raises(kind, match=message):
        call(model, x, y)
    assert same_state(model, before)
    assert model.training


def test_the_best_epoch_is_kept_when_asked_and_an_interrupted_run_still_knows_it(tmp_path: Path) -> None:
    model, x, y = task()
    model = nn.Sequential(*(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)))
    seen: list[dict[str, Tensor]] = []

    def data(epoch: int) -> list[tuple[Tensor, Tensor]]:
        seen.append(state(model))  # after epoch - 1
        return epochs(x, y if epoch < 2 else (y + 1) % 4)(epoch)  # from epoch 2 on it learns the wrong

    settings = Settings(epochs=5, lr=1e-2, keep="best", clip=None)
    start = state(model)
    curve = train_in_place(TrainingRun(model, data, settings=settings, held_out=[(x, y)]))
    best = max(curve, key=lambda epoch: epoch.held_out).epoch
    assert best < 4
    assert same_state(model, seen[best + 1])
    whole = state(model)
    checkpoint = Checkpoint(tmp_path / "state.safetensors", run="this one")
    run = TrainingRun(model, data, settings=settings, held_out=[(x, y)], checkpoint=checkpoint)
    model.load_state_dict(start)
    with pytest.raises(InterruptedRunError):
        train_in_place(dataclasses.replace(run, on_step=stop_in_epoch(4)))
    model.load_state_dict(start)
    train_in_place(run)
    assert same_state(model, whole)
