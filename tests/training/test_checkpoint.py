"""A run that is killed or interrupted, and taken up again, ends bit-equal to one that was left alone."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import spectrim as st
from spectrim.training import Checkpoint

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "AdamW, its loader seeded by the run": ({"optimizer": "adamw", "weight_decay": 0.01, "train": "all"}, "plain"),
    "SGD, a loader with its own generator": ({"optimizer": "sgd", "frozen_norms": False, "clip": None}, "own"),
    "bf16, data that draws from everything": ({"precision": "bf16", "frozen_norms": False, "lr": 3e-3}, "noisy"),
}


class Noisy(Dataset[tuple[Tensor, int]]):
    """Examples with noise from torch, numpy and Python."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, at: int) -> tuple[Tensor, int]:
        drawn = torch.randn(12) + float(np.random.standard_normal()) + random.gauss(0.0, 1.0)
        return self.x[at] + 0.1 * drawn, int(self.y[at])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, 4))


def loader(kind: str) -> DataLoader[Any]:
    x = torch.randn(120, 12, generator=torch.Generator().manual_seed(1))
    y = x[:, :4].argmax(dim=1)
    data = Noisy(x, y) if kind == "noisy" else TensorDataset(x, y)
    own = torch.Generator().manual_seed(7) if kind == "own" else None
    return DataLoader(data, batch_size=10, shuffle=True, generator=own)


def train(case: str, folder: Path, on_step: Callable[[Any], None]) -> None:
    """One run, and what came of it as files."""
    settings, kind = CASES[case]
    held_out = [tuple(loader("plain").dataset.tensors)]
    tuned = st.finetune(
        network(),
        loader(kind),
        epochs=4,
        held_out=held_out,
        keep="best",
        seed=3,
        checkpoint=folder / "state.safetensors",
        save_every=3,
        on_step=on_step,
        **settings,
    )
    st.save(tuned.model, folder / "model.safetensors")
    curve = [[epoch.loss, epoch.held_out] for epoch in tuned.history]
    (folder / "curve.json").write_text(json.dumps([curve, tuned.history.lr, tuned.history.weights_of]))


def forked(work: Callable[[int], None], *, signal_after: tuple[int, int] | None) -> int:
    """Do the work in its own process, which is sent a signal after it has reported so many steps; its exit code."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        code = 0
        try:
            work(writing)
        except KeyboardInterrupt:
            code = 130
        except BaseException:
            code = 1
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    os.close(writing)
    seen = 0
    while report := os.read(reading, 1):
        seen += len(report)
        if signal_after is not None and seen == signal_after[1]:
            os.kill(child, signal_after[0])
    os.close(reading)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def histories(case: str, folder: Path, seed: int) -> dict[str, object]:
    """The same run: left alone; killed twice and interrupted twice at random steps before it is let go on."""
    draw = random.Random(seed)

    def work(where: Path) -> Callable[[int], None]:
        where.mkdir(exist_ok=True)

        def progress(pipe: int) -> Callable[[Any], None]:
            def report(_: Any) -> None:
                os.write(pipe, b".")
                time.sleep(0.002)

            return report

        return lambda pipe: train(case, where, progress(pipe))

    whole, broken = folder / "whole", folder / "broken"
    codes = [forked(work(whole), signal_after=None)]
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGINT):
        codes.append(forked(work(broken), signal_after=(number, draw.randint(2, 9))))
    last = forked(work(broken), signal_after=None)
    files = ("model.safetensors", "curve.json")
    same = [(whole / name).read_bytes() == (broken / name).read_bytes() for name in files]
    return {"codes": codes, "last": last, "same": same}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What came of all cases, from one process that forks: importing torch takes seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path_factory.mktemp("runs"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "stderr": done.stderr}


@pytest.mark.parametrize("case", CASES)
def test_a_killed_and_interrupted_run_goes_on_bit_for_bit(outcomes: dict[str, Any], case: str) -> None:
    assert outcomes[case]["codes"] == [0, -signal.SIGKILL, 130, -signal.SIGKILL, 130], outcomes["stderr"]
    assert (outcomes[case]["last"], outcomes[case]["same"]) == (0, [True, True]), outcomes["stderr"]


SAVED = Path(__file__).parents[1] / "files" / "saved" / "finetune.safetensors"
"""Written by commit 25f9191, whose run of `saved_run` was interrupted in the fourth step of its second epoch."""

IDENTITY = (
    '{"clip": 1.0, "epochs": 3, "frozen norms": 0, "keep": "best", "label_weight": 0.0, "lr": 0.05, "momentum": 0.9, '
    '"network": "6765541aa4c085b8301016bbbb053aba7ae4d98d78022c0eb7ad3b9753ecd142", "optimizer": "sgd", '
    '"patience": null, "precision": "float32", "seed": 3, "teacher": null, "temperature": 4.0, '
    '"trained": ["0.bias", "0.parametrizations.weight.original", "1.bias", "1.weight"], "warm_up": 0.1, '
    '"weight_decay": 0.01, "weights": "1a3434b531f33b8417d22994dbe1e7a7dd01b231377e53e1137979bdcad290c4"}'
)


def numbers(*shape: int) -> Tensor:
    """The same fractions of 128 on every machine."""
    count = torch.Size(shape).numel()
    return ((37 * torch.arange(count) % 101 - 50) / 128).reshape(shape)


def saved_run(**more: Any) -> st.Finetuned:
    """A truncated layer, a norm that moves, dropout, SGD with momentum, and a loader with its own generator."""
    model = nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(numbers(*parameter.shape))
    st.training.truncated_(model, st.Rank(2), exclude="4")
    x, y = 4 * numbers(120, 12), torch.arange(120) % 4
    data = DataLoader(TensorDataset(x, y), batch_size=20, shuffle=True, generator=torch.Generator().manual_seed(7))
    settings: dict[str, Any] = {"optimizer": "sgd", "lr": 0.05, "weight_decay": 0.01, "epochs": 3, "seed": 3}
    chosen: dict[str, Any] = {"train": ["0", "1"], "frozen_norms": False, "held_out": [(x, y)], "keep": "best"}
    return st.finetune(model, data, **settings, **chosen, **more)


def identity(path: Path) -> str:
    """What the checkpoint belongs to."""
    with safe_open(path, framework="pt") as opened:
        return str(json.loads(opened.metadata()["spectrim-training"])["run"])


def test_a_checkpoint_of_an_earlier_version_is_resumed(tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copy(SAVED, path)
    assert identity(path) == IDENTITY
    steps: list[st.training.Step] = []
    resumed, whole = saved_run(checkpoint=path, on_step=steps.append), saved_run()
    assert [(step.epoch, step.step) for step in steps] == [(1, 4), (1, 5), *((2, step) for step in range(6))]
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    assert [epoch.loss for epoch in resumed.history] == pytest.approx([epoch.loss for epoch in whole.history], rel=1e-4)
    assert resumed.history.weights_of == whole.history.weights_of
    assert identity(path) == IDENTITY


def test_what_identifies_a_run_is_compared_as_values(tmp_path: Path) -> None:
    path = tmp_path / "run"
    x = numbers(20, 12)
    options: dict[str, Any] = {"epochs": 1, "warm_up": 0}
    st.finetune(network(), [(x, torch.arange(20) % 4)], checkpoint=path, **options)
    # as written before settings were converted to their types
    changed = Checkpoint(path, run=identity(path).replace('"warm_up": 0.0', '"warm_up": 0'), unfit="refuse")
    assert changed.run != identity(path)
    steps: list[st.training.Step] = []
    st.finetune(network(), [(x, torch.arange(20) % 4)], checkpoint=changed, on_step=steps.append, **options)
    assert not steps


if __name__ == "__main__":
    import torch._dynamo  # what an optimiser imports at its first step, once for all forks

    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    runs = {}
    for number, name in enumerate(CASES):
        place = Path(sys.argv[1]) / str(number)
        place.mkdir()
        runs[name] = histories(name, place, number)
    sys.stdout.write(json.dumps(runs))
