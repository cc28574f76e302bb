"""Processor time of one `st.compress` of ResNet-20 to half of its MACs, in several trees of this repository in turn.

    git worktree add ../before COMMIT
    python benchmarks/compress_time.py ../before . --weights cifar_resnet20.safetensors

Each round is a process for each tree, with one thread; the ratios are to the first tree, round by round.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

TIMED = """
import argparse, sys, time, warnings
warnings.simplefilter("ignore")
import torch
import spectrim as st
from cifar_zero_shot import calibration, network
torch.set_num_threads(1)
model = network(argparse.Namespace(network="resnet20", weights=sys.argv[1]))
data = calibration(0, images=int(sys.argv[2]))
compress, rule = st.compress, st.Budget(macs=0.5)  # imported before the clock runs
before = time.process_time()
compress(model, rule, example_inputs=data[0][:1], data=data)
print(time.process_time() - before)
"""


def seconds(tree: Path, options: argparse.Namespace) -> float:
    """Processor time in a process of its own."""
    paths = os.pathsep.join(str(tree.resolve() / name) for name in ("src", "benchmarks"))
    command = [sys.executable, "-c", TIMED, str(options.weights), str(options.images)]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return float(output.split()[-1])


def main() -> None:
    """Print the times, and the median ratio of each tree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", type=Path, nargs="+")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rounds = []
    for _ in range(options.rounds):
        rounds.append([seconds(tree, options) for tree in options.trees])
        print(
            "  ".join(f"{tree}: {time:.1f} s" for tree, time in zip(options.trees, rounds[-1], strict=True)), flush=True
        )
    for place, tree in enumerate(options.trees[1:], 1):
        print(f"{tree}: {statistics.median(times[place] / times[0] for times in rounds):.3f} of {options.trees[0]}")


if __name__ == "__main__":
    main()
