"""`nn.MultiheadAttention` with its projections as layers, so that each can be factored."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectrim.layers.factored import attributes_of, is_low_rank

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")

_PARAMETERS = {"in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight", "bias_k", "bias_v"}


class UnfusedMultiheadAttention(nn.Module):
    """`nn.MultiheadAttention` that calls a layer for each of its projections; options and results are the same.

    Attributes:
        q_proj: embed_dim -> embed_dim, an `nn.Linear` or a factored one.
        k_proj: kdim -> embed_dim.
        v_proj: vdim -> embed_dim.
        out_proj: embed_dim -> embed_dim.
        bias_k: (1, 1, embed_dim), a key beside those of the inputs, or None.
        bias_v: (1, 1, embed_dim), its value, or None.

    Shapes:
        as for `nn.MultiheadAttention`.
    """

    # torch's encoder layers use fused kernels, which read one weight, where this is true
    _qkv_same_embed_dim = False
    num_heads: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    def __init__(self, fused: Any) -> None:
        super().__init__()
        biases_kv = {"bias_k": fused.bias_k, "bias_v": fused.bias_v}
        self.__dict__.update({name: value for name, value in attributes_of(fused).items() if name not in biases_kv})
        biases = [None] * 3 if fused.in_proj_bias is None else fused.in_proj_bias.detach().chunk(3)
        whole, separate = fused.in_proj_weight, (fused.q_proj_weight, fused.k_proj_weight, fused.v_proj_weight)
        weights = separate if whole is None else [_like(weight, whole) for weight in whole.detach().chunk(3)]
        for name, weight, bias in zip(PROJECTIONS, weights, biases, strict=False):
            self.add_module(name, _linear(weight, bias, like=fused.in_proj_bias))
        self.out_proj = _linear(fused.out_proj.weight, fused.out_proj.bias)
        for name, parameter in biases_kv.items():
            self.register_parameter(name, cast(nn.Parameter | None, parameter))
        self.training = fused.training

    @classmethod
    def parts(cls, fused: nn.Module) -> tuple[str, ...]:
        """Names of the projections of an attention; none for another module, or one that cannot be taken apart."""
        return PROJECTIONS if type(fused) is nn.MultiheadAttention and _is_ordinary(fused) else ()

    @classmethod
    def replaces(cls, _: nn.Module) -> bool:
        """Whether it gives what the attention gives: always."""
        return True

    @property
    def is_dense(self) -> bool:
        """Whether all projections are as they were made, so that they can be put together."""
        return all(type(part) is nn.Linear for part in self.children())

    def fused(self) -> nn.MultiheadAttention:
        """Torch's own attention with these weights."""
        options = attributes_of(self)
        sizes = {name: options[name] for name in ("embed_dim", "num_heads", "kdim", "vdim")}
        fused: Any = nn.MultiheadAttention(**sizes, bias=False, device="meta")
        fused.__dict__.update(options)
        parts = cast(tuple[nn.Linear, ...], tuple(self.children()))
        weights, bias = [part.weight for part in parts[:3]], self.in_proj_bias
        if fused.in_proj_weight is not None:
            fused.in_proj_weight = _like(torch.cat([weight.detach() for weight in weights]), weights[0])
        else:
            fused.q_proj_weight, fused.k_proj_weight, fused.v_proj_weight = weights
        fused.in_proj_bias = None if bias is None else _like(bias.detach(), weights[0])
        fused.out_proj.weight, fused.out_proj.bias = parts[3].weight, parts[3].bias
        fused.bias_k, fused.bias_v = self.bias_k, self.bias_v
        return cast(nn.MultiheadAttention, fused.train(self.training))

    @property
    def in_proj_weight(self) -> Tensor | None:
        """The weights of queries, keys and values as one matrix, made anew; None where their inputs' sizes differ."""
        weights = [cast(Tensor, layer.weight) for layer in self._inputs]
        return torch.cat(weights) if len({weight.shape for weight in weights}) == 1 else None

    @property
    def in_proj_bias(self) -> Tensor | None:
        """Their biases as one vector, made anew; None where none has one."""
        biases = [cast(Tensor | None, layer.bias) for layer in self._inputs]
        known = next((bias for bias in biases if bias is not None), None)
        return None if known is None else torch.cat([torch.zeros_like(known) if b is None else b for b in biases])

    @property
    def _inputs(self) -> tuple[nn.Module, ...]:
        return tuple(self.get_submodule(name) for name in PROJECTIONS[:3])

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,  # noqa: FBT001, FBT002  # as torch has it
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,  # noqa: FBT001, FBT002
        is_causal: bool = False,  # noqa: FBT001, FBT002
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention`."""
        q, k, v = (self._batched(layer(x)) for layer, x in zip(self._inputs, (query, key, value), strict=True))
        own_length = k.shape[1]
        k, v = self._extended(k, self.bias_k), self._extended(v, self.bias_v)
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint that attn_mask is causal; give that mask as well")
        is_causal = is_causal and key_padding_mask is None and not need_weights
        masks = (None if is_causal else attn_mask, key_padding_mask)
        mask = self._added(*masks, like=q, more=k.shape[1] - own_length)
        q, k, v = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * q.shape[-1] ** -0.5) @ k.mT
            weights = functional.dropout((scores if mask is None else scores + mask).softmax(dim=-1), dropout)
            heads = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if query.ndim == 3 else weights.squeeze(0)
        else:
            heads = functional.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        y = heads.transpose(1, 2).flatten(2)
        y = y.squeeze(0) if query.ndim == 2 else y if self.batch_first else y.transpose(0, 1)
        return self.out_proj(y), weights

    def _batched(self, x: Tensor) -> Tensor:
        """As (batch, length, size)."""
        if x.ndim == 2:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _extended(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Keys or values with those that no input has."""
        more = [] if bias is None else [bias.expand(x.shape[0], -1, -1)]
        zero = [x.new_zeros(x.shape[0], 1, x.shape[2])] if self.add_zero_attn else []
        return torch.cat([x, *more, *zero], dim=1)

    def _added(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, *, like: Tensor, more: int
    ) -> Tensor | None:
        """Both masks as one that is added to scores (batch, heads, queries, keys), with `more` keys that all see."""
        masks, batch = [], like.shape[0]  # not its length, which would be a constant in an exported program
        if attn_mask is not None:
            masks.append(attn_mask if attn_mask.ndim == 2 else attn_mask.unflatten(0, (batch, self.num_heads)))
        if key_padding_mask is not None:
            masks.append(key_padding_mask.reshape(batch, 1, 1, -1))
        masks = [functional.pad(_as_score(mask, like), (0, more)) for mask in masks]
        return sum(masks[1:], start=masks[0]) if masks else None


def _as_score(mask: Tensor, like: Tensor) -> Tensor:
    """A mask that is true at what is not seen as a number that is added to scores; any other as it is."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return like.new_zeros(mask.shape).masked_fill(mask, -torch.inf)


def match_fast_paths(model: nn.Module, parents: Iterable[nn.Module] = ()) -> None:
    """Torch's fused encoder layers multiply by the weights themselves; let them do so only where all are dense.

    An encoder also gives nested tensors to all of its layers, which only torch's own attention takes.

    Args:
        model: Whose encoders are looked at.
        parents: Of layers that were exchanged, among which encoder layers may be.
    """
    for parent in parents:
        if isinstance(parent, nn.TransformerEncoderLayer):
            dense = not any(is_low_rank(layer) for layer in (parent.linear1, parent.linear2))
            relu = parent.activation is functional.relu or isinstance(parent.activation, nn.ReLU)
            gelu = parent.activation is functional.gelu or isinstance(parent.activation, nn.GELU)
            parent.activation_relu_or_gelu = int(dense and (relu or gelu)) * (2 if gelu else 1)
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder):
            fused = not any(isinstance(part, UnfusedMultiheadAttention) for part in encoder.modules())
            if not fused and encoder.use_nested_tensor:
                encoder.__dict__ |= {"use_nested_tensor": False, "_used_nested_tensor": True}
            elif fused and encoder.__dict__.pop("_used_nested_tensor", False):
                encoder.use_nested_tensor = True


def _is_ordinary(module: nn.MultiheadAttention) -> bool:
    hooks = any(value for part in module.modules() for name, value in vars(part).items() if name.endswith("_hooks"))
    is_known = set(module._parameters) <= _PARAMETERS and set(module._modules) == {"out_proj"} and not module._buffers
    out_proj: Any = module.out_proj
    is_own = type(out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear and "forward" not in vars(module)
    return is_known and not hooks and is_own


def _like(value: Tensor, reference: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=reference.requires_grad)


def _linear(weight: Tensor, bias: Tensor | None, *, like: Tensor | None = None) -> nn.Linear:
    """A linear layer of these very tensors; a bias that is no parameter becomes one as `like`."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    layer.weight = cast(nn.Parameter, weight)
    if bias is not None:
        layer.bias = cast(nn.Parameter, bias) if like is None else _like(bias, like)
    return layer
