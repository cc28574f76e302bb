"""The Lightning callbacks do in a real Trainer what the plain objects do in a loop."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import inputs, same_state, small_mlp, state
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import spectrim as st
from spectrim.core.errors import TrainingError
from spectrim.training import ProjectEachEpoch, RankSchedule, truncated_

lightning = pytest.importorskip("lightning.pytorch", reason="the extra 'lightning' is not installed")
from spectrim.integrations.lightning import ProjectionCallback, RankScheduleCallback  # noqa: E402

# of Lightning itself: what it says about torch's own names, and about a loader without workers
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]


class Net(lightning.LightningModule):
    def __init__(self, *, optimisers: int = 1) -> None:
        super().__init__()
        self.body = small_mlp(dtype=torch.float32)
        self.optimisers = optimisers

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return functional.cross_entropy(self.body(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimisers = [torch.optim.Adam(self.body.parameters(), lr=1e-2) for _ in range(self.optimisers)]
        return optimisers[0] if self.optimisers == 1 else optimisers


def data() -> DataLoader:
    x = inputs(48, 12, dtype=torch.float32)
    return DataLoader(TensorDataset(x, x[:, :4].argmax(dim=1)), batch_size=8)


def trainer(folder: Path, *callbacks: Any, epochs: int = 2, **options: Any) -> Any:
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


def by_hand(net: Net, after_step: Any, after_epoch: Any, *, epochs: int = 2) -> torch.optim.Optimizer:
    optimiser = net.configure_optimizers()
    net.train()
    for _ in range(epochs):
        for batch in data():
            optimiser.zero_grad()
            net.training_step(batch, 0).backward()
            optimiser.step()
            after_step(optimiser)
        after_epoch(optimiser)
    return optimiser


def nothing(_: Any) -> None:
    pass


@pytest.mark.parametrize("every", [None, 4])
def test_projection_is_what_a_loop_of_ones_own_does(every: int | None, tmp_path: Path) -> None:
    net = Net()
    other = copy.deepcopy(net)
    callback = ProjectionCallback(ProjectEachEpoch(st.Rank(3), every_steps=every))
    trainer(tmp_path, callback).fit(net, data())
    project = ProjectEachEpoch(st.Rank(3), every_steps=every)
    step = nothing if every is None else lambda optimiser: project.step(other, optimiser)
    by_hand(other, step, nothing if every else lambda optimiser: project(other, optimiser))
    assert same_state(net, state(other))
    small = callback.project.finish(net)
    assert {type(layer) for layer in small.body} == {st.LowRankLinear, nn.ReLU}
    x = inputs(5, 12, dtype=torch.float32)
    if every is None:
        assert torch.linalg.matrix_rank(net.body[2].weight) == 3
        torch.testing.assert_close(small.body(x), net.body(x), atol=1e-5, rtol=1e-5)


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    net, calls = Net(), []
    project = ProjectEachEpoch(st.Rank(3), every_steps=2)

    class Watched(ProjectionCallback):
        def _apply(self, trainer: Any, module: Any) -> None:
            calls.append(trainer.global_step)
            super()._apply(trainer, module)

    trainer(tmp_path, Watched(project), accumulate_grad_batches=2).fit(net, data())
    assert calls == [2, 4, 6]


def scheduled() -> tuple[Net, RankScheduleCallback]:
    net = Net()
    truncation = truncated_(net, st.Ratio(1.0), trainable_rank=True)
    return net, RankScheduleCallback(RankSchedule(st.Budget(params=0.6), every=3, end=12), truncation)


def test_the_schedule_moves_ranks_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    net, callback = scheduled()
    other, plain = scheduled()
    trainer(tmp_path, callback).fit(net, data())
    by_hand(other, lambda optimiser: plain.schedule.step(plain.truncation, optimiser), nothing)
    assert same_state(net, state(other))
    assert callback.schedule.history == plain.schedule.history
    assert [record.step for record in callback.schedule.history] == [0, 3, 6, 9, 12]
    assert callback.schedule.history[-1].kept <= 0.6

    first, interrupted = scheduled()
    fitting = trainer(tmp_path, interrupted, epochs=1)
    fitting.fit(first, data())
    fitting.save_checkpoint(tmp_path / "part.ckpt")
    again, resumed = scheduled()
    trainer(tmp_path, resumed).fit(again, data(), ckpt_path=tmp_path / "part.ckpt")
    assert same_state(again, state(net))
    assert resumed.schedule.history == callback.schedule.history


def test_a_schedule_counts_one_optimiser(tmp_path: Path) -> None:
    net = Net(optimisers=2)
    net.automatic_optimization = False
    truncation = truncated_(net, st.Rank(3))
    with pytest.raises(TrainingError, match="there are 2 optimisers"):
        trainer(tmp_path, RankScheduleCallback(RankSchedule(st.Energy(0.9)), truncation)).fit(net, data())
