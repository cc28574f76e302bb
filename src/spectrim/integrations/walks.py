"""Both passes over the blocks of a model: what each block is, what it becomes, and what it gives to the next one."""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.analysis.block_errors import block_sensitivity, first_samples, relative_squares
from spectrim.analysis.calibration import Calibration, calibrate
from spectrim.analysis.spectra import analyze_selected, analyze_units
from spectrim.core.errors import ModelError
from spectrim.core.execution import Inputs, ProgressCallback, call, evaluating, temporary
from spectrim.core.files import FrozenFile
from spectrim.core.names import Metric
from spectrim.core.plans import Budget, Plan, Rule
from spectrim.fitting.reconstruction import reconstruct
from spectrim.integrations.blocks import BlockCall, BlockChain, BlockModel
from spectrim.integrations.shards import Shards, write_shard
from spectrim.integrations.spectra_files import read_units, write_spectra
from spectrim.integrations.work_folders import Stage, WorkFolder
from spectrim.layers.cost import NetworkCost
from spectrim.layers.factored import low_rank_layers
from spectrim.layers.replacement import duplicate, factorize
from spectrim.layers.selection import LayerSelection, Patterns
from spectrim.layers.structure import LowRank, structure_of
from spectrim.layers.tokens import TokenMasks
from spectrim.layers.tracing import typed_layers
from spectrim.planning.decisions import PlanOptions


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        rule: The rule.
        options: Of the plan.
        include: Patterns of layers to factor.
        exclude: Patterns of layers to leave dense.
        fitted: Whether layers are fitted one after the other.
    """

    rule: Rule
    options: PlanOptions
    include: Patterns
    exclude: Patterns
    fitted: bool

    @property
    def metric(self) -> Metric:
        """In which the layers are factored."""
        return self.options.metric or "activation"

    def fingerprint(self, shards: Shards, batches: Sequence[Inputs]) -> str:
        """All that the result depends on, as JSON."""
        digest = hashlib.sha256()
        for batch in batches:
            digest.update(f"{batch.describe()}, {batch.mask}".encode())
            for tensor in batch.tensors():
                digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        fields = {
            "rule": str(self.rule),
            "metric": self.metric,
            "rank_multiple": self.options.step,
            "layers": [list(self.include), list(self.exclude)],
            "fitted": self.fitted,
            "weights": shards.outline,
            "data": digest.hexdigest(),
        }
        return json.dumps(fields, indent=1, default=str) + "\n"


class BlockRecord(FrozenFile):
    """What is known of a block whose weights are written.

    Attributes:
        keys: Of its tensors in the file.
        size: Their bytes.
        low_rank: Its factored layers, by their names in the model.
        hidden_error: See `CompressedCheckpoint`, of the hidden states that it gives.
    """

    keys: tuple[str, ...]
    size: int
    low_rank: dict[str, LowRank]
    hidden_error: float


@dataclass(frozen=True, eq=False)
class Walk:
    """From block to block, with the hidden states of all batches in files.

    Attributes:
        chain: The blocks.
        request: What is asked for.
        work: The files.
        calls: By batch, what each block is given besides hidden states.
        report: Called with what is done next.
    """

    chain: BlockChain
    request: Request
    work: WorkFolder
    calls: Sequence[Sequence[BlockCall]]
    report: ProgressCallback

    def missing(self, path: Any, stages: Sequence[Stage]) -> Iterator[int]:
        """Blocks of which there is no such file yet; what reached those that are done is deleted."""
        number = len(self.chain.names)
        begin = next((block for block in range(number) if not path(block).exists()), number)
        for block in range(begin, number):
            yield block
            self.work.forget_hidden(stages, block)

    def learn(self, block: int, selected: set[str]) -> None:
        """The first pass over a block: statistics, spectra, sensitivities, and what it gives to the next one."""
        request, name = self.request, self.chain.names[block]
        self.report(f"calibrate {name}", block, len(self.chain.names))
        model = self.chain.block(name)
        inputs = self._inputs("spectra", block)
        own = [layer for layer in typed_layers(model) if layer in selected]
        selection = LayerSelection(own or ("*",), () if own else ("*",), lookups=False, together=False)
        bare = analyze_selected(model, first_samples(inputs[0], 1), selection=selection)
        calibration = self._calibrated(model, bare.call_sites, block, "spectra")
        analysis = analyze_units(model, [layer.unit for layer in bare], whole=bare.whole, calibration=calibration)
        if isinstance(request.rule, Budget) and request.metric != "plain":
            analysis = replace(analysis, sensitivity=block_sensitivity(model, analysis, inputs))
        write_spectra(self.work.spectra(block), analysis, metric=request.metric)

    def fit(self, block: int, plan: Plan) -> None:
        """The second pass over a block: it is factored, fitted, written, and run on what reaches it."""
        name = self.chain.names[block]
        self.report(f"fit {name}", block, len(self.chain.names))
        dense = self.chain.block(name)
        units = read_units(self.work.spectra(block))
        own = plan.model_copy(update={"layers": tuple(plan[unit.name] for unit in units)})
        call_sites = {site for unit in units if unit.skip_reason is None for site in unit.call_sites}
        calibration = self._calibrated(dense, call_sites, block, "dense")
        analysis = analyze_units(dense, units, whole=NetworkCost(params=0, bytes=0, macs=0), calibration=calibration)
        small: nn.Module = duplicate(dense)
        inputs = self._inputs("compressed", block)
        if self.request.fitted:
            batches = self._inputs("dense", block)
            small = reconstruct(dense, small, own, analysis=analysis, batches=batches, small_batches=inputs)
        else:
            factorize(small, own, factors=analysis.factors, means=analysis.means)
        keys, size = self._write(block, small)
        del dense, analysis, calibration
        with evaluating(small), self._outputs_written(small, "compressed", block):
            for batch in inputs:
                call(small, batch)
        low_rank, error = structure_of(small).low_rank, self._error(block + 1)
        BlockRecord(keys=keys, size=size, low_rank=low_rank, hidden_error=error).save(self.work.record(block))

    def _inputs(self, stage: Stage, block: int) -> list[Inputs]:
        """What the block is given in each batch."""
        return [own[block].of(self.work.read_hidden(stage, block, batch)) for batch, own in enumerate(self.calls)]

    def _calibrated(self, model: BlockModel, call_sites: set[str], block: int, stage: Stage) -> Calibration:
        """The statistics of a dense block; keeps what it gives."""
        with self._outputs_written(model, stage, block):
            return calibrate(model, self._inputs(stage, block), layers=call_sites)

    def _outputs_written(self, model: nn.Module, stage: Stage, block: int) -> AbstractContextManager[None]:
        """Within it, what a block gives goes into files, batch after batch."""
        batches = itertools.count()

        def write(_: object, __: object, output: Tensor) -> None:
            self.work.write_hidden(stage, block + 1, next(batches), output)

        return temporary([model.register_forward_hook(write)])

    def _write(self, block: int, small: nn.Module) -> tuple[tuple[str, ...], int]:
        """A block's weights in the number types of the dense ones, to which its own are rounded."""
        shards, factored = self.chain.shards, low_rank_layers(small)
        stored: dict[str, Tensor] = {}
        for name, tensor in small.state_dict(keep_vars=True).items():
            layer = next((layer for layer in factored if name.startswith(f"{layer}.")), None)
            origin = name if layer is None else f"{layer}.weight"
            key = shards.keys[origin]
            key = key if layer is None else key.removesuffix("weight") + name.removeprefix(f"{layer}.")
            rounded = tensor.detach()
            rounded = rounded.to(shards.dtype(origin)) if rounded.is_floating_point() else rounded
            if not bool(torch.isfinite(rounded).all()) and bool(torch.isfinite(tensor).all()):
                raise ModelError(f"the factors of {origin} overflow {rounded.dtype}; save the model as bfloat16 first")
            tensor.detach().copy_(rounded)
            stored[key] = rounded
        # one number under each dense weight's name, at which programs without spectrim stop
        stored |= {shards.keys[f"{layer}.weight"]: torch.full((1,), torch.nan) for layer in factored}
        write_shard(self.work.weights(block), stored)
        return tuple(stored), sum(tensor.nbytes for tensor in stored.values())

    def _error(self, block: int) -> float:
        """See `BlockRecord`, of what reaches this block."""
        squares = []
        for batch, calls in enumerate(self.calls):
            dense, small = (self.work.read_hidden(stage, block, batch) for stage in ("dense", "compressed"))
            squares.append(relative_squares(dense, small, TokenMasks.of(nn.Identity(), calls[-1].of(dense))))
        return math.sqrt(float(torch.cat(squares).mean()))
