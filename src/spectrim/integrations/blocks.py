"""A model of transformers whose blocks are read from its folder one at a time, and run one after the other."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spectrim.core.errors import DataError, ModelError, SpectrimError
from spectrim.core.execution import Inputs, evaluating, temporary
from spectrim.core.nested import map_tensors, size_of, tensors
from spectrim.core.state import distinct_state, fill_state
from spectrim.integrations.shards import Shards
from spectrim.layers.tokens import TokenMasks
from spectrim.layers.types import find_layer_type

_WHOLE = "load it whole with transformers, and call st.compress"


class BlockModel(nn.Module):
    """One block under the name that it has in its model, so that its layers have theirs; gives its hidden states.

    Args:
        name: The block's name.
        block: The block.
    """

    def __init__(self, name: str, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["_name"] = name
        *path, last = name.split(".")
        parent: nn.Module = self
        for part in path:
            parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, block)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the block, without what it gives besides hidden states."""
        output = self.get_submodule(self.__dict__["_name"])(hidden, *args, **kwargs)
        return cast(Tensor, output[0] if isinstance(output, tuple) else output)


class _EmptyOnMeta(TorchFunctionMode):
    """Weights get no storage: layers make them by `torch.empty`. All else, such as tables of positions, is computed."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


def empty_model(model_class: Any, config: Any) -> nn.Module:
    """A model of this class in evaluation mode whose parameters are on the meta device, shared ones once."""
    with torch.random.fork_rng(devices=[]), _EmptyOnMeta(), torch.no_grad():
        model: nn.Module = model_class(config)
    unset: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                empty = nn.Parameter(weight.detach().to("meta"), requires_grad=weight.requires_grad)
                module._parameters[name] = unset.setdefault(id(weight), empty)
    return model.eval()


@dataclass(frozen=True, eq=False)
class BlockCall:
    """What a block is given in one batch besides its hidden states.

    Attributes:
        args: Positional arguments after them.
        kwargs: Those with names.
        mask: (batch, length), nonzero at tokens.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    mask: Tensor

    def of(self, hidden: Tensor) -> Inputs:
        """With hidden states."""
        return Inputs((hidden, *self.args), self.kwargs, self.mask)


class _BlocksEnded(BaseException):
    """Ends a forward pass after the last block. Not an Exception, so that no model catches it."""


@dataclass(frozen=True, eq=False)
class BlockChain:
    """A model of which all but the blocks is loaded.

    Attributes:
        model: Its blocks have no values.
        shards: Where these are.
        names: Names of the blocks in the order in which they run.
        beside: What a block gives after the hidden states, None for each; None where it gives these alone.
    """

    model: Any
    shards: Shards
    names: tuple[str, ...]
    beside: tuple[Any, ...] | None = None

    @classmethod
    def of(cls, model: Any, shards: Shards, example: Inputs) -> "BlockChain":
        """Of an empty model; loads what is not a block, and runs the first block on the example.

        Raises:
            ModelError: no blocks, or blocks that share weights with others.
        """
        names = _block_names(model)
        _, aliases = distinct_state(model)
        for pair in aliases.items():
            first, second = (next((name for name in names if key.startswith(f"{name}.")), "") for key in pair)
            if first != second:
                raise ModelError(f"{pair[0]} and {pair[1]} are one weight in two blocks or beside them; {_WHOLE}")
        chain = cls(model, shards, names)
        chain._load_rest()
        return chain._with_output_of_first(example)

    def block(self, name: str) -> BlockModel:
        """A block with its values, those of less than 4 bytes as float32, in which a CPU is fastest and most exact."""
        return BlockModel(name, self._filled(name))

    def state_names(self, name: str) -> list[str]:
        """Names of a block's tensors in the model."""
        return [key for key in self.shards.keys if key.startswith(f"{name}.")]

    @property
    def rest(self) -> list[str]:
        """Keys of all tensors that no block has."""
        blocks = tuple(f"{name}." for name in self.names)
        own = {key for name, key in self.shards.keys.items() if name.startswith(blocks)}
        return [key for key in self.shards.files if key not in own]

    def record(self, batch: Inputs) -> tuple[Tensor, list[BlockCall]]:
        """The hidden states that reach the first block, and what each block is given besides; no block is run.

        Raises:
            ModelError: between blocks there is more than hidden states.
            DataError: padding that cannot be told from tokens in the hidden states.
        """
        entries: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

        def pass_on(name: str, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            expected = self.names[min(len(entries), len(self.names) - 1)]
            if name != expected or (entries and hidden is not entries[-1][0]):
                raise ModelError(f"what {name} is given is not what the block before it gives; {_WHOLE}")
            entries.append((hidden, args, kwargs))
            return hidden if self.beside is None else (hidden, *self.beside)

        self._run(batch, pass_on)
        if len(entries) < len(self.names):
            raise ModelError(f"{self.names[len(entries)]} is not called after the block before it; {_WHOLE}")
        mask = self._mask(batch, entries[0][0])
        return entries[0][0], [BlockCall(args, kwargs, mask) for _, args, kwargs in entries]

    def require_chain(self, batch: Inputs) -> None:
        """Run the model on a batch, each block loaded while it runs, and compare with what `record` says, bit by bit.

        Raises:
            ModelError: something differs.
        """
        first, calls = self.record(batch)
        before = [first]

        def run(name: str, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            position = len(before) - 1
            if position == len(calls) or name != self.names[position]:
                raise ModelError(f"{name} does not run once, in the order of the blocks; {_WHOLE}")
            expected = calls[position]
            same = torch.equal(hidden, before[-1]) and _equal((args, kwargs), (expected.args, expected.kwargs))
            if not same:
                raise ModelError(f"{name} is given more than the hidden states of the block before it; {_WHOLE}")
            output = self._filled(name)(hidden, *args, **kwargs)
            before.append(_hidden_of(name, output)[0])
            if not bool(before[-1].isfinite().all()):
                raise ModelError(f"{name} gives NaN or infinite numbers on the calibration data; check its weights")
            return output

        self._run(batch, run, to_end=True)

    def _with_output_of_first(self, batch: Inputs) -> "BlockChain":
        """The chain that knows what its blocks give besides hidden states."""
        beside: list[tuple[Any, ...] | None] = []

        def run(name: str, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            beside.append(_hidden_of(name, self._filled(name)(hidden, *args, **kwargs))[1])
            raise _BlocksEnded

        self._run(batch, run)
        return replace(self, beside=beside[0])

    def _run(self, batch: Inputs, on_block: Callable[..., Any], *, to_end: bool = False) -> None:
        """Run the model with `on_block` in the place of each block's forward pass, up to the last block or the head."""
        blocks = {name: self.model.get_submodule(name) for name in self.names}

        reached: list[str] = []

        def end(*_: Any) -> None:
            raise _BlocksEnded

        def forward(name: str, *args: Any, **kwargs: Any) -> Any:
            hidden, *args = args if args else (kwargs.pop("hidden_states", None),)  # type: ignore[assignment]
            if not isinstance(hidden, Tensor):
                raise ModelError(f"{name} is not given hidden states as its first argument; {_WHOLE}")
            reached.append(name)
            output = on_block(name, hidden, tuple(args), kwargs)
            if name == self.names[-1] and not to_end:
                raise _BlocksEnded
            return output

        hooks = [] if self._head is None else [self._head.register_forward_pre_hook(end)]
        # embeddings stay in the file, in its number type, and what they look up is converted
        lookups = filter(_is_lookup, self.model.modules())
        hooks += [module.register_forward_hook(lambda *call: _widened(call[-1])) for module in lookups]
        with evaluating(self.model), temporary(hooks), suppress(_BlocksEnded):
            try:
                for name, block in blocks.items():
                    block.__dict__["forward"] = partial(forward, name)
                self.model(*batch.args, **batch.kwargs)
            except SpectrimError:
                raise
            except Exception as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                name = type(self.model).__name__
                raise DataError(f"{name} cannot run the calibration data ({batch.describe()}): {reason}") from error
            finally:
                for block in blocks.values():
                    del block.__dict__["forward"]
        if not reached:
            raise ModelError(f"no block is called by {type(self.model).__name__}; {_WHOLE}")

    def _filled(self, name: str) -> nn.Module:
        block: nn.Module = copy.deepcopy(self.model.get_submodule(name))
        block.__dict__.pop("forward", None)
        state = self.shards.read(self.state_names(name))
        values = {key.removeprefix(f"{name}."): _widened(tensor, copy=True) for key, tensor in state.items()}
        missing = fill_state(block, values, strict=False, assign=True).missing_keys
        unset = [key for key, tensor in (*block.named_parameters(), *block.named_buffers()) if tensor.is_meta]
        if missing or unset:
            raise ModelError(f"the values of {name}.{[*unset, *missing][0]} are not in the folder; {_WHOLE}")
        return block

    @property
    def _head(self) -> nn.Module | None:
        """What gives scores of words; it is not run."""
        return cast("nn.Module | None", self.model.get_output_embeddings())

    def _load_rest(self) -> None:
        blocks = tuple(f"{name}." for name in self.names)
        state = self.shards.read(name for name in self.shards.keys if not name.startswith(blocks))
        for key, tensor in state.items():
            owner = self.model.get_submodule(key.rpartition(".")[0])
            if not _is_lookup(owner) and owner is not self._head:
                state[key] = _widened(tensor, copy=True)
        fill_state(self.model, state, strict=False, assign=True)
        for name, buffer in self.model.named_buffers():
            if buffer.is_meta and not name.startswith(blocks):
                raise ModelError(f"the values of {name} are not in the folder, and not known otherwise; {_WHOLE}")

    def _mask(self, batch: Inputs, hidden: Tensor) -> Tensor:
        masks = TokenMasks.of(self.model, batch).masks
        fitting = [mask for mask in masks if mask.shape == hidden.shape[:2]]
        if fitting:
            return torch.stack(fitting).any(dim=0).long()
        if any(not bool(mask.all()) for mask in masks):
            raise DataError(
                f"the batches have padding, and hidden states {list(hidden.shape)} in which it cannot be told; give "
                "batches without padding"
            )
        return torch.ones(hidden.shape[:2], dtype=torch.int64)


def _hidden_of(name: str, output: Any) -> tuple[Tensor, tuple[Any, ...] | None]:
    """A block's hidden states, and what it gives besides."""
    beside = output[1:] if isinstance(output, tuple) else None
    hidden = output if beside is None else output[0]
    if not isinstance(hidden, Tensor) or any(each is not None for each in beside or ()):
        raise ModelError(f"{name} gives more than hidden states, which blocks after it may need; {_WHOLE}")
    return hidden, beside


def shared_calls(calls: Sequence[BlockCall], before: Sequence[BlockCall] | None) -> list[BlockCall]:
    """The calls of a batch, with the tensors of the batch before in the place of equal ones."""
    if before is None:
        return list(calls)
    known: dict[int, Tensor] = {}

    def share(own: Any, other: Any) -> None:
        for tensor, earlier in zip(tensors(own), tensors(other), strict=False):
            if id(tensor) not in known and tensor.shape == earlier.shape and torch.equal(tensor, earlier):
                known[id(tensor)] = earlier

    for pair in zip(calls, before, strict=True):
        share(*((each.args, dict(each.kwargs), each.mask) for each in pair))
    change = partial(map_tensors, change=lambda tensor: known.get(id(tensor), tensor))
    return [BlockCall(change(each.args), change(dict(each.kwargs)), change(each.mask)) for each in calls]


def block_bytes(chain: BlockChain) -> int:
    """Bytes of the largest block as it is computed with."""
    return max(2 * size_of(list(chain.shards.read(chain.state_names(name)).values())) for name in chain.names)


def _block_names(model: Any) -> tuple[str, ...]:
    """The members of the list of blocks: of classes that the model says are not to be split, or of the largest list."""
    whole = set(getattr(model, "_no_split_modules", None) or ())
    lists = {name: list(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    named = {name: own for name, own in lists.items() if own and all(type(each).__name__ in whole for each in own)}
    alike = {name: own for name, own in lists.items() if len({type(each) for each in own}) == 1}
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{type(model).__name__} has an encoder and a decoder, which are not one chain; {_WHOLE}")
    lists = named or alike
    if not lists:
        raise ModelError(f"{type(model).__name__} has no list of blocks (nn.ModuleList) that are alike; {_WHOLE}")
    largest = max(lists, key=lambda name: sum(p.numel() for each in lists[name] for p in each.parameters()))
    return tuple(f"{largest}.{position}" for position in range(len(lists[largest])))


def _widened(value: Any, *, copy: bool = False) -> Any:
    def widen(tensor: Tensor) -> Tensor:
        kind = torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype
        return tensor.to(kind, copy=copy)

    return map_tensors(value, widen)


def _is_lookup(module: nn.Module) -> bool:
    kind = find_layer_type(module)
    return kind is not None and kind.is_lookup


def _equal(first: Any, second: Any) -> bool:
    pairs = [list(tensors(value)) for value in (first, second)]
    return len(pairs[0]) == len(pairs[1]) and all(map(torch.equal, *pairs))
