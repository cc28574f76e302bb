"""The laws of compression on many random networks, with the smallest network that breaks each.

    python benchmarks/random_graphs.py --graphs 500 [--seed 0] [--onnx 20] [--all]

Each network (`tests/random_networks.py`) is compressed under one of five rules, with and without data, at full rank, in
place, without the activation cache, then saved, loaded and merged (`tests/network_laws.py`). Every n-th is exported to
ONNX. A network that breaks a law is made as simple as it can be while it does, and printed so that it can be pasted.
The same seed draws the same networks. About one second a network on one core.
"""

import argparse
import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from network_laws import RULES, Laws, simplest  # the tests are no package
from random_networks import Network, networks


@dataclass(frozen=True)
class Case:
    """One network under one rule."""

    network: Network
    rule: str
    calibrated: bool
    exported: bool

    def violations(self) -> dict[str, str]:
        """What does not hold."""
        laws = Laws(self.network, RULES[self.rule], self.calibrated)
        if self.exported:
            laws.exported()
            return laws.violations
        return laws.check()

    def of(self, network: Network) -> "Case":
        """The same with another network."""
        return replace(self, network=network)


def drawn(number: int, *, start: int) -> list[Network]:
    """Random networks, the same for the same seed."""
    result: list[Network] = []

    @seed(start)
    @settings(
        max_examples=number,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(networks())
    def add(network: Network) -> None:
        result.append(network)

    add()
    return result


def main() -> int:
    """Draw, check, simplify, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--onnx", type=int, default=20, help="export every n-th network to ONNX; 0 for none")
    parser.add_argument("--all", action="store_true", help="every rule for every network, rather than one of them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    began = time.perf_counter()
    cases = [
        Case(network, rule, calibrated, exported)
        for number, network in enumerate(drawn(options.graphs, start=options.seed))
        for rule in (RULES if options.all else [list(RULES)[number % len(RULES)]])
        for calibrated in (False, True)
        for exported in ([False, True] if options.onnx and number % options.onnx == 0 else [False])
    ]
    broken: dict[str, list[tuple[Case, str]]] = {}
    console = Console(width=None if sys.stdout.isatty() else 240)
    for case in cases:
        for law, text in case.violations().items():
            if law not in broken:  # at once, since making it simple takes a while
                console.print(f"{law}: {text}\n    {case}")
            broken.setdefault(law, []).append((case, text))
    table = Table("law", "broken", "rule", "data", "what", "smallest network")
    for law, places in broken.items():
        case, text = places[0]
        smallest = simplest(case.network, lambda other, case=case, law=law: law in case.of(other).violations())
        table.add_row(law, str(len(places)), case.rule, str(case.calibrated), text, repr(smallest))
    console.print(table)
    total, seconds = sum(map(len, broken.values())), time.perf_counter() - began
    console.print(f"{options.graphs} networks, {len(cases)} checks, {total} violations, {seconds:.0f} s")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
