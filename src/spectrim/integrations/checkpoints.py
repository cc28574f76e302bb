"""Models of any size: a folder of Hugging Face is compressed block by block, and never loaded as a whole."""

import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from spectrim.analysis.moments import covariance_bytes
from spectrim.analysis.sampling import SampleCount, warn_of_few
from spectrim.analysis.spectra import Analysis
from spectrim.benchmark.measurement import Measurement, resized
from spectrim.core.arguments import checked
from spectrim.core.batches import batches_of, collected, inputs_of
from spectrim.core.display import Displayed
from spectrim.core.errors import FileError, ModelError, ResourceError, RuleError
from spectrim.core.execution import LABELS, Inputs, ProgressCallback
from spectrim.core.files import write_text
from spectrim.core.memory import free_bytes
from spectrim.core.plans import Budget, Metric, Plan, Rule
from spectrim.core.progress import progress_callback
from spectrim.export.folders import copy_beside
from spectrim.integrations.blocks import BlockCall, BlockChain, block_bytes, empty_model, shared_calls
from spectrim.integrations.shards import Shards, groups_of, open_shard, write_index, write_shard
from spectrim.integrations.spectra_files import read_spectra
from spectrim.integrations.walks import BlockRecord, Request, Walk
from spectrim.integrations.work_folders import BEGIN_ANEW, WorkFolder
from spectrim.layers.cost import NetworkCost
from spectrim.layers.selection import LayerSelection, Patterns
from spectrim.layers.structure import Structure, rebuild
from spectrim.layers.tracing import typed_layers
from spectrim.layers.types.base import TOKENS
from spectrim.models.folders import CONFIG, OWN_METHOD, is_factored, model_class_of
from spectrim.planning.decisions import PlanOptions
from spectrim.planning.rules import plan_with, require_reachable
from spectrim.reporting.cards import write_model_card

PLAN = "plan.json"
_SHARD_BYTES = 2**30


@dataclass(frozen=True, eq=False)
class CompressedCheckpoint(Displayed):
    """A folder with a compressed model.

    Attributes:
        folder: It, as `save_pretrained` of a compressed model writes one.
        plan: Form and ranks of every layer in the blocks.
        measurement: Counted costs, with their ratios to the dense model's. MACs are those of the blocks alone.
        hidden_error: How far the last hidden states of both networks on the calibration data are apart: the root of the
            mean over the tokens of |h' - h|^2 / |h|^2.
    """

    folder: Path
    plan: Plan
    measurement: Measurement
    hidden_error: float


@checked
def compress_checkpoint(
    folder: str | Path,
    rule: Rule,
    *,
    data: Iterable[Any],
    out: str | Path,
    max_batches: int | None = None,
    mask: str | None = None,
    metric: Metric | None = None,
    rank_multiple: int | None = None,
    include: Patterns = ("*",),
    exclude: Patterns = (),
    reconstruct: Literal["auto"] | bool = "auto",
    on_progress: ProgressCallback | None = None,
    progress: bool = False,
) -> CompressedCheckpoint:
    """Factor the layers of a model in a folder of Hugging Face, which is read and written one block at a time.

    As `st.compress`, for models that do not fit into memory twice, or at all. A first pass takes the statistics and
    spectra of every block, then a plan is made for all of them, and a second pass fits each block to what it receives
    in the compressed model. Blocks are computed with in float32 and written in their own number type. Embeddings, head
    and what else is not in a block are copied as they are. How much a layer matters under a `Budget` is measured by how
    much an error in it changes what its block gives, not by the model's outputs as in `st.compress`.

    Memory: the largest block about four times in float32, with its statistics and the largest weight's decomposition in
    float64. Disk, in `out`: the result, and hidden states of the data at two blocks of both networks.

    A call that was stopped goes on after the last block that was done, if it is repeated with the same arguments; the
    result is the same. `out` holds no config.json before all is written.

    Args:
        folder: What `save_pretrained` wrote, with its weights as safetensors.
        rule: `Budget` of params or macs, `Rank`, `Ratio` or `Energy`. A share of the macs is one of the blocks' MACs.
        data: Batches of inputs of the model, tensors or mappings, as for `st.compress`. They are read once.
        out: A folder that does not exist, is empty, or was begun by the same call.
        max_batches: As for `st.compress`, and so are `mask`, `rank_multiple`, `include`, `exclude`, `reconstruct`,
            `on_progress` and `progress`.
        metric: `activation`, the default, or `plain`.

    Raises:
        SpectrimError: one of its kinds. Models whose blocks are not one chain, such as encoder-decoder models, are
            refused, with what else can be done.
    """
    source, target = Path(folder).expanduser(), Path(out).expanduser()
    _require_rule(rule, metric=metric, reconstruct=reconstruct)
    if is_factored(source):
        raise ModelError(f"{source} was compressed already; give the folder of the dense model")
    if target.resolve() == source.resolve():
        raise FileError(f"out={str(out)!r} is the folder of the dense model, which stays as it is; choose another")
    WorkFolder(target).require_usable()
    options = PlanOptions(metric, rank_multiple=rank_multiple)
    fitted = isinstance(rule, Budget) if reconstruct == "auto" else reconstruct
    request = Request(rule, options, include, exclude, fitted and metric != "plain")
    with progress_callback(on_progress, progress=progress) as report:
        report("read", 0, 1)
        model = new_model(source)
        shards = Shards.of(source, model)
        batches = _read(data, model, max_batches=max_batches, mask=mask)
        chain = BlockChain.of(model, shards, resized(batches[0], 1))
        return _Run(chain, request, batches, target, report).compress()


@dataclass(frozen=True, eq=False)
class _Run:
    """One compression: what it reads, and what it is asked for."""

    chain: BlockChain
    request: Request
    batches: Sequence[Inputs]
    out: Path
    report: ProgressCallback

    def compress(self) -> CompressedCheckpoint:
        """Both passes, and the folder."""
        chain, shards = self.chain, self.chain.shards
        shapes = {name: tuple(chain.model.get_submodule(name).weight.shape) for name in self._selected}
        require_reachable(self.request.rule, {name: (own, min(own[0], prod(own[1:]))) for name, own in shapes.items()})
        hidden = chain.record(self.batches[0])[0].nbytes // self.batches[0].samples
        samples = sum(batch.samples for batch in self.batches)
        self._require_memory(shapes, hidden=hidden, samples=samples)
        fingerprint = self.request.fingerprint(shards, self.batches)
        if not WorkFolder(self.out).is_begun:
            self.report("check", 0, 1)
            chain.require_chain(resized(self.batches[0], 1))
        work = WorkFolder.begin(self.out, fingerprint, needed=shards.bytes + 5 * hidden * samples)
        walk = Walk(chain, self.request, work, self._recorded(work), self.report)
        for block in walk.missing(work.spectra, ["spectra"]):
            walk.learn(block, self._selected)
        plan = self._planned(work)
        for block in walk.missing(work.record, ["dense", "compressed"]):
            walk.fit(block, plan)
        return _Output(self, work, plan).written()

    @cached_property
    def _selected(self) -> set[str]:
        """Names of the layers in the blocks that may be factored."""
        blocks = tuple(f"{name}." for name in self.chain.names)
        names = [name for name in typed_layers(self.chain.model) if name.startswith(blocks)]
        return LayerSelection(self.request.include, self.request.exclude).matching(names)

    def _recorded(self, work: WorkFolder) -> list[list[BlockCall]]:
        """By batch what each block is given besides hidden states; those that reach the first block go into files."""
        calls: list[list[BlockCall]] = []
        for position, batch in enumerate(self.batches):
            hidden, own = self.chain.record(batch)
            work.write_hidden("spectra", 0, position, hidden)
            calls.append(shared_calls(own, calls[-1] if calls else None))
        return calls

    def _require_memory(self, shapes: Mapping[str, Sequence[int]], *, hidden: int, samples: int) -> None:
        """Raise `ResourceError` if a block, its statistics and the work on its largest weight do not fit.

        `hidden` are the bytes of one sample's hidden states.
        """
        sizes = [(shape[0], prod(shape[1:])) for shape in shapes.values()]
        statistics = sum(covariance_bytes(into, vectors=samples * TOKENS, itemsize=4) for _, into in sizes)
        largest = 8 * max((out * into for out, into in sizes), default=0)
        batch = max(own.samples for own in self.batches)
        needed = 3 * block_bytes(self.chain) + statistics // len(self.chain.names) + 8 * largest + 16 * batch * hidden
        free = free_bytes(torch.device("cpu"))
        if needed > free:
            raise ResourceError(
                f"one block takes about {needed / 1e9:.1f} GB with its statistics, and {free / 1e9:.1f} GB are free; "
                "give smaller batches, fewer samples, or a machine with more memory"
            )

    def _planned(self, work: WorkFolder) -> Plan:
        path = work.path / PLAN
        if not path.exists():
            self.report("plan", 0, 1)
            plan_with(self.analysis(work), self.request.rule, self.request.options).save(path)
        return Plan.load(path)

    def analysis(self, work: WorkFolder) -> Analysis:
        return read_spectra(map(work.spectra, range(len(self.chain.names))), whole=self.dense_cost)

    @cached_property
    def dense_cost(self) -> NetworkCost:
        """Of the dense model; the analysis adds the MACs."""
        params = sum(parameter.numel() for parameter in new_model(self.chain.shards.folder).parameters())
        return NetworkCost(params=params, bytes=self.chain.shards.bytes, macs=0)


@dataclass(frozen=True, eq=False)
class _Output:
    """The folder, once all blocks are done."""

    run: _Run
    work: WorkFolder
    plan: Plan

    def written(self) -> CompressedCheckpoint:
        """Put everything in its place, config.json last; each step may have been done before."""
        run, out, work = self.run, self.run.out, self.work
        run.report("write", 0, 1)
        records = [BlockRecord.load(work.record(block)) for block in range(len(run.chain.names))]
        if not work.is_complete:
            parts = [*self._rest(), *((work.weights(at), own.keys, own.size) for at, own in enumerate(records))]
            files = []
            for number, (path, keys, _) in enumerate(parts, 1):
                file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
                files.append((file, keys))
                if path.exists():
                    path.replace(out / file)
                with open_shard(out / file, hint=BEGIN_ANEW) as opened:
                    list(map(opened.get_slice, keys))
            write_index(out, files, total=sum(size for *_, size in parts))
            self._write_beside(records)
        result = CompressedCheckpoint(out, self.plan, self._measurement(records), records[-1].hidden_error)
        shutil.rmtree(work.path)
        return result

    def _rest(self) -> list[tuple[Path, Sequence[str], int]]:
        """Files of what is in no block, with their keys and sizes."""
        shards, parts = self.run.chain.shards, list[tuple[Path, Sequence[str], int]]()
        sizes = {key: tensor.nbytes for key, tensor in shards.tensors(self.run.chain.rest)}
        for number, keys in enumerate(groups_of(sizes, most=_SHARD_BYTES)):
            path, done = self.work.path / f"rest-{number:05d}.safetensors", self.work.path / f"rest-{number:05d}"
            if not done.exists():
                write_shard(path, dict(shards.tensors(keys)))
                write_text(done, "")
            parts.append((path, keys, sum(sizes[key] for key in keys)))
        return parts

    def _write_beside(self, records: Sequence[BlockRecord]) -> None:
        """Everything but the weights."""
        out, source = self.run.out, self.run.chain.shards.folder
        copy_beside(source, out)
        self.plan.save(out / PLAN)
        low_rank = {name: layer for record in records for name, layer in record.low_rank.items()}
        config, model = _config_of(source), new_model(source)
        rebuild(model, Structure(low_rank=low_rank, same_layer={}), origin=str(out))
        write_model_card(model, out)
        if low_rank:
            keys = self.run.chain.shards.keys
            stored = {keys[f"{name}.weight"].removesuffix(".weight"): layer for name, layer in low_rank.items()}
            structure = Structure(low_rank=stored, same_layer={})
            config.quantization_config = {"structure": structure.model_dump(mode="json"), "quant_method": OWN_METHOD}
        with tempfile.TemporaryDirectory(dir=self.work.path) as temporary:
            config.save_pretrained(temporary)
            (Path(temporary) / CONFIG).replace(out / CONFIG)

    def _measurement(self, records: Sequence[BlockRecord]) -> Measurement:
        dense = self.run.analysis(self.work).whole
        params = dense.params - sum(layer.dense.params - layer.kept.params for layer in self.plan)
        macs = dense.macs - sum(layer.dense.macs - layer.kept.macs for layer in self.plan)
        size = sum(path.stat().st_size for path in self.run.out.glob("*.safetensors"))
        return Measurement(params=params, macs=macs, bytes=size).against(dense)


def _require_rule(rule: Rule, *, metric: Metric | None, reconstruct: object) -> None:
    if reconstruct not in ("auto", True, False):
        raise RuleError(f"reconstruct={reconstruct!r}: give 'auto', True or False")
    require_reachable(rule, {})
    if isinstance(rule, Budget) and rule.limits not in ("params", "macs"):
        raise RuleError(f"{rule}: a model that is compressed block by block has budgets of params or macs")
    if metric == "loss":
        raise RuleError("metric='loss' needs gradients of the whole model; give 'activation', the default, or 'plain'")


def _read(data: Iterable[Any], model: nn.Module, *, max_batches: int | None, mask: str | None) -> list[Inputs]:
    """The batches in memory, without labels."""
    limited = batches_of(data, what="the calibration data", max_batches=max_batches)
    inputs = (inputs_of(batch, model, position=at, labels=False, mask=mask)[0] for at, batch in enumerate(limited))
    pairs = ((own, {name: own.kwargs[name] for name in own.kwargs if name not in LABELS}) for own in inputs)
    batches = collected(replace(own, kwargs=kwargs) for own, kwargs in pairs)
    samples = SampleCount()
    for batch in batches:
        samples.add(batch)
    warn_of_few(samples, "activation")
    return batches


def _config_of(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def new_model(folder: Path) -> Any:
    """The folder's model without values, which keeps no keys and values of earlier tokens."""
    model_class, config = model_class_of(folder), _config_of(folder)
    for part in (config, config.get_text_config()):
        part.use_cache = False
    return empty_model(model_class, config)
