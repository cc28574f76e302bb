"""Seconds of `spectrim demo` beside programs that take cores: the default choice, and fixed numbers of threads.

    python benchmarks/busy_machine.py --quick                 # one busy program, one run of each
    python benchmarks/busy_machine.py --busy 2 --rounds 3 --spin
    python benchmarks/busy_machine.py --steps                 # how much two threads gain, by the MACs of a batch

The variants are run in turns. With each run the processor time and the load of the machine are printed. With `--spin`
two threads that wait busily, as OpenMP's do by default, are a variant too; that takes minutes.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from torch import nn

from spectrim.layers.cost import count_macs

SLEEP, SPIN = {"OMP_WAIT_POLICY": "PASSIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}


@contextmanager
def busy(number: int) -> Iterator[None]:
    """So many programs that take a core each."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def cpu_seconds() -> float:
    """Processor time of the programs that this one has waited for."""
    times = os.times()
    return times.children_user + times.children_system


def demo(arguments: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Seconds from start to end of the command, and its processor time."""
    own = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "spectrim", "demo", "--out", f"{folder}/demo", *arguments]
        start, cpu = time.perf_counter(), cpu_seconds()
        subprocess.run(command, env=own | environment, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start, cpu_seconds() - cpu


def demos(options: argparse.Namespace) -> None:
    """Every variant, in turns."""
    quick = ["--quick"] if options.quick else []
    threads = {f"{number} threads": (["--threads", str(number)], SLEEP) for number in options.threads}
    variants = {"default": ([], {}), **threads}
    if options.spin:
        variants["2 threads that wait busily"] = (["--threads", "2"], SPIN)
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(options.rounds):
        for name, (arguments, environment) in variants.items():
            with busy(options.busy):
                others = sum(psutil.cpu_percent(1, percpu=True)) / 100
                wall, cpu = demo([*quick, *arguments], environment)
            seconds[name].append(wall)
            print(f"{name}: {wall:.0f} s, processor {cpu:.0f} s; {others:.1f} cores were busy before", flush=True)
    for name, times in seconds.items():
        print(f"median of {len(times)}: {name} {statistics.median(times):.0f} s")


def mlp(width: int) -> nn.Module:
    """Six layers, as in the demo."""
    hidden = [layer for _ in range(4) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), *hidden, nn.Linear(width, 10))


def cnn(width: int) -> nn.Module:
    """Six layers."""
    hidden = [layer for _ in range(4) for layer in (nn.Conv2d(width, width, 3, padding=1), nn.ReLU())]
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), *hidden, nn.Flatten(), nn.Linear(1024 * width, 10))


def step_seconds(model: nn.Module, batch: torch.Tensor, *, threads: int) -> float:
    """Seconds of a training step."""
    torch.set_num_threads(threads)
    optimizer, times = torch.optim.Adam(model.parameters()), []
    for _ in range(4):
        start = time.perf_counter()
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def steps(options: argparse.Namespace) -> None:
    """The gain of two threads by the MACs of a batch."""
    cases = [(mlp(width), torch.randn(size, 64)) for width, size in ((64, 64), (256, 64), (1024, 64), (1024, 256))]
    cases += [(cnn(width), torch.randn(size, 3, 32, 32)) for width, size in ((8, 16), (16, 32), (32, 32), (64, 32))]
    with busy(options.busy):
        for model, batch in cases:
            pairs = [(step_seconds(model, batch, threads=1), step_seconds(model, batch, threads=2)) for _ in range(7)]
            gain = statistics.median(alone / together for alone, together in pairs)
            macs = len(batch) * count_macs(model, batch[:1])
            print(
                f"{macs / 1e6:7.0f} M MACs: {1000 * min(pairs)[0]:6.1f} ms, two threads {gain:.2f}x as fast", flush=True
            )


def main() -> None:
    """Demos, or steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, default=1, help="programs that take a core each")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="`spectrim demo --quick`")
    parser.add_argument("--spin", action="store_true", help="also two threads that wait busily")
    parser.add_argument("--steps", action="store_true", help="time training steps instead; set OMP_WAIT_POLICY=PASSIVE")
    options = parser.parse_args()
    steps(options) if options.steps else demos(options)


if __name__ == "__main__":
    main()
