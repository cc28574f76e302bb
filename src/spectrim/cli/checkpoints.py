"""`spectrim compress --model hf:DIR` block by block, for folders whose model does not fit into memory twice."""

from pathlib import Path

import torch
import typer

from spectrim.cli import commands
from spectrim.cli.data_reference import data_reference
from spectrim.cli.loading import Loaded, load_batches
from spectrim.cli.machine import set_threads
from spectrim.cli.stages import Stages
from spectrim.core.memory import free_bytes
from spectrim.core.plans import Budget
from spectrim.integrations.checkpoints import CompressedCheckpoint, compress_checkpoint, new_model

_MANY_MACS = 10**12


def is_block_by_block(command: commands.Compress) -> bool:
    """Whether a network is to be compressed block by block: as asked, or where it does not fit twice and can be.

    Raises `BadParameter` where that is asked for and cannot be done.
    """
    folder, asked = command.source.folder, command.method.block_by_block
    reason = _why_not(command)
    if asked and reason is not None:
        raise typer.BadParameter(f"--block-by-block: {reason}")
    if asked is not None or folder is None or reason is not None:
        return bool(asked)
    size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    return 2 * size > free_bytes(torch.device("cpu"))


def compress_folder(command: commands.Compress, progress: Stages) -> tuple[CompressedCheckpoint, Loaded]:
    """The compressed folder, and the network without values with its data."""
    source, goal, layers = command.source, command.goal, command.layers
    reference, folder = data_reference(source), source.folder
    assert folder is not None
    assert reference is not None
    model = new_model(folder)
    data = load_batches(reference, source, progress, model)
    set_threads(command.machine, _MANY_MACS, closing=progress.closing, say=progress.say)
    result = compress_checkpoint(
        folder,
        goal.rule,
        data=data.calibration,
        out=command.out,
        metric=goal.metric,
        rank_multiple=None if goal.multiple == "auto" else goal.multiple,
        include=layers.selection.include,
        exclude=layers.selection.exclude,
        reconstruct=command.method.fitted,
        on_progress=progress.follow,
    )
    return result, Loaded(model, data.example, None, data)


def _why_not(command: commands.Compress) -> str | None:
    """Why it cannot be done block by block."""
    source, method, goal = command.source, command.method, command.goal
    if source.folder is None or source.data is None:
        return "it needs --model hf:DIR and --data"
    if method.plan is not None or method.estimate or method.distill:
        return "it takes a rule, not --plan, --estimate or --distill"
    has_other_budget = isinstance(goal.rule, Budget) and goal.rule.limits not in ("params", "macs")
    has_other_ranks = goal.metric == "loss" or goal.multiple == "auto" or goal.form
    reasons = {
        "it has budgets of --params or --macs": has_other_budget,
        "it does not take --metric loss, --rank-multiple auto or --form": has_other_ranks,
        "it does not take --keep-last, since the head is left as it is": command.layers.keep_last,
        "it measures no accuracy; leave out --test": command.test,
        "it runs on the CPU": command.machine.device not in ("cpu", "auto"),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)
