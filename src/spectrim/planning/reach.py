"""What to say of budgets that cannot be reached."""

import math
from typing import TYPE_CHECKING

from spectrim.analysis.spectra import LayerAnalysis
from spectrim.core.plans import Budget
from spectrim.planning.decisions import why_impossible

if TYPE_CHECKING:
    from spectrim.planning.budgets import Candidates


def out_of_reach(candidates: "Candidates", rule: Budget, least: float, *, how: str = "predicted") -> str:
    """What to say of a budget when `least` is the smallest share there is."""
    open_to = len(candidates.open_to)
    timed = candidates.cost == "latency"
    if timed and (not open_to or least >= 1):
        measured = f"with all its layers at their fastest ranks the model takes {least:.3g} of the dense time"
        why = measured if open_to else "no layer would be faster in factors"
        return (
            f"{rule} cannot be reached: {why} with the {rule.runtime} runtime here; "
            "limit the MACs or the parameters instead, or try another runtime or batch"
        )
    share = math.ceil(1e4 * least) / 1e4
    smallest, at = ("fastest", f"their fastest ranks ({how})") if timed else ("smallest", f"rank {candidates.multiple}")
    cost = "time is" if timed else f"{rule.limits} are"
    others = max(0, candidates.whole - candidates.body) / candidates.whole
    of = f", of={rule.of!r}" if rule.of else ""
    return (
        f"{rule} cannot be reached: the {smallest} this model can be is Budget({rule.limits}={share:g}{of}), with all "
        f"{open_to} layers that can shrink at {at}; {others:.1%} of the {cost} in what cannot shrink"
        f"{_first_reason(candidates)}"
    )


def _first_reason(candidates: "Candidates") -> str:
    """The reason for which most of the cost stays dense, with its largest layer, if there are any."""
    metric = candidates.metric if candidates.metric in candidates.analysis.metrics else "plain"
    groups: dict[str, list[LayerAnalysis]] = {}
    for layer in candidates.analysis:
        if reason := why_impossible(layer, metric, limit=candidates._limit):
            groups.setdefault(reason, []).append(layer)
    if not groups:
        return ""
    reason, layers = max(groups.items(), key=lambda group: sum(map(candidates.dense, group[1])))
    number, largest = sum(map(len, groups.values())), max(layers, key=candidates.dense)
    return f"; {number} layers stay dense, {len(layers)} of them like {largest.name or largest.kind}: {reason}"
