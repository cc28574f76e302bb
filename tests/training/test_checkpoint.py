"""A run that is killed or interrupted, and taken up again, ends bit-equal to one that was left alone."""

import json
import os
import random
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
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import spectrim as st

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
        noise = torch.randn(12) + float(np.random.standard_normal()) + random.gauss(0.0, 1.0)
        return self.x[at] + 0.1 * noise, int(self.y[at])


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
    made = st.finetune(
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
    st.save(made.model, folder / "model.safetensors")
    curve = [[epoch.loss, epoch.held_out] for epoch in made.history]
    (folder / "curve.json").write_text(json.dumps([curve, made.history.lr, made.history.kept]))


def forked(work: Callable[[int], None], *, signal_after: tuple[int, int] | None) -> int:
    """Do the work in a process of its own, which is sent a signal once it has told of so many steps; its exit code."""
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
    while told := os.read(reading, 1):
        seen += len(told)
        if signal_after is not None and seen == signal_after[1]:
            os.kill(child, signal_after[0])
    os.close(reading)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def histories(case: str, folder: Path, seed: int) -> dict[str, object]:
    """The same run: left alone; killed twice and interrupted twice at random steps before it is let go on."""
    draw = random.Random(seed)

    def work(where: Path) -> Callable[[int], None]:
        where.mkdir(exist_ok=True)

        def tell(pipe: int) -> Callable[[Any], None]:
            def told(_: Any) -> None:
                os.write(pipe, b".")
                time.sleep(0.002)

            return told

        return lambda pipe: train(case, where, tell(pipe))

    whole, broken = folder / "whole", folder / "broken"
    codes = [forked(work(whole), signal_after=None)]
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGINT):
        codes.append(forked(work(broken), signal_after=(number, draw.randint(2, 9))))
    last = forked(work(broken), signal_after=None)
    files = ("model.safetensors", "curve.json")
    same = [(whole / name).read_bytes() == (broken / name).read_bytes() for name in files]
    return {"codes": codes, "last": last, "same": same}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What came of all cases, from one process that forks: importing torch takes seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path_factory.mktemp("runs"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "told": done.stderr}


@pytest.mark.parametrize("case", CASES)
def test_a_killed_and_interrupted_run_goes_on_bit_for_bit(found: dict[str, Any], case: str) -> None:
    assert found[case]["codes"] == [0, -signal.SIGKILL, 130, -signal.SIGKILL, 130], found["told"]
    assert (found[case]["last"], found[case]["same"]) == (0, [True, True]), found["told"]


if __name__ == "__main__":
    import torch._dynamo  # what an optimiser imports at its first step, once for all forks

    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    made = {}
    for number, name in enumerate(CASES):
        place = Path(sys.argv[1]) / str(number)
        place.mkdir()
        made[name] = histories(name, place, number)
    sys.stdout.write(json.dumps(made))
