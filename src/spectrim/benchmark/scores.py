"""How good a model is: a score with its interval and every example's part in it, and the paired difference of two."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spectrim.benchmark.measurement import Accuracy, correct_samples, paired_difference
from spectrim.core.arguments import checked
from spectrim.core.batches import NamedLabels, batches_of, split_labels
from spectrim.core.errors import DataError
from spectrim.core.execution import Forward, ForwardFunction, Inputs, as_inputs, call, evaluating, require_values
from spectrim.core.files import Frozen
from spectrim.core.nested import describe, logits_of, tensor_of
from spectrim.layers.tokens import TokenMasks
from spectrim.runtimes.timing import Interval

_Array = NDArray[np.float64]
_IGNORED, _RESAMPLES = -100, 1000


class Score(Frozen):
    """A model's score on some data.

    Attributes:
        metric: `accuracy`, `perplexity`, `spearman`, or the `mean` of a function's scores.
        per_example: Of each example: 1 if it is right, else 0; the mean loss of a sequence's tokens, in nats; the
            cosine of the two embeddings of a pair; or what the function gives.
        reference: Of each example: a sequence's number of tokens, or a pair's gold score; empty for the others.
    """

    metric: Literal["accuracy", "perplexity", "spearman", "mean"]
    per_example: tuple[float, ...]
    reference: tuple[float, ...] = ()

    @property
    def value(self) -> float:
        """Share of right answers; exp of the mean loss of all tokens; rank correlation; mean."""
        return self._statistic()(np.arange(self.examples))

    @property
    def examples(self) -> int:
        """How many there are: samples, sequences or pairs."""
        return len(self.per_example)

    @cached_property
    def interval(self) -> Interval:
        """The score with its 95 % interval, which covers the choice of the examples.

        Of an accuracy that of Wilson (1927); else the percentile bootstrap over the examples (Efron 1979), of 1000
        resamples that are the same each time.
        """
        if self.metric == "accuracy":
            return Accuracy(correct=int(sum(self.per_example)), total=self.examples).interval
        return _bootstrap(self._statistic(), self.examples)

    def against(self, dense: "Score") -> Interval:
        """This score less another one on the same examples, with the 95 % interval of the difference.

        Both see the same examples, so only what differs between the two adds to the uncertainty. Of accuracies it is
        that of Agresti & Min (2005); else the paired bootstrap, which draws the same examples for both.

        Raises:
            DataError: the other score is of another metric, or of other examples.
        """
        if (self.metric, self.examples, self.reference) != (dense.metric, dense.examples, dense.reference):
            raise DataError(
                f"a score of {self.metric} on {self.examples} examples and one of {dense.metric} on {dense.examples} "
                "have no paired difference; evaluate both models on the same data in the same order"
            )
        if self.metric == "accuracy":
            pairs = list(zip(self.per_example, dense.per_example, strict=True))
            return paired_difference(self.examples, worse=pairs.count((0, 1)), better=pairs.count((1, 0)))
        own, other = self._statistic(), dense._statistic()
        return _bootstrap(lambda places: own(places) - other(places), self.examples)

    def __str__(self) -> str:
        places = ".2%" if self.metric == "accuracy" else ".4g"
        value, low, high = (format(part, places) for part in (self.value, self.interval.low, self.interval.high))
        return f"{self.metric} {value} (95 % interval {low} to {high}, {self.examples:,} examples)"

    def _statistic(self) -> Callable[[NDArray[np.int64]], float]:
        """From places of examples to their score."""
        own, reference = (np.array(values, dtype=np.float64) for values in (self.per_example, self.reference))

        def statistic(places: NDArray[np.int64]) -> float:
            if self.metric == "perplexity":
                tokens = reference[places]
                return float(np.exp(own[places] @ tokens / tokens.sum()))
            if self.metric == "spearman":
                return float(np.corrcoef(_ranks(own[places]), _ranks(reference[places]))[0, 1])
            return float(own[places].mean())

        return statistic


@checked
def evaluate(
    model: nn.Module,
    data: Iterable[Any],
    metric: Literal["accuracy", "perplexity", "spearman"] | Callable[[nn.Module, Any], Any] = "accuracy",
    *,
    labels: str | None = None,
    mask: str | None = None,
    forward: ForwardFunction | None = None,
) -> Score:
    """Score a model on batches of data, in evaluation mode.

    `accuracy` is that of `st.accuracy`, and takes the same data.

    `perplexity` is that of each next token, from outputs (batch, length, words). A batch is token numbers (batch,
    length), or a mapping like those of transformers, whose entry `labels`, or else `input_ids`, is what is to be told
    one position before; or a pair (inputs, labels), whose labels belong to the outputs at their own position. Padding
    and labels of -100 count nowhere.

    `spearman` is the rank correlation of gold scores with the cosines of two texts' embeddings; a batch is (inputs,
    inputs, gold scores). Embeddings are outputs (batch, size), or the mean of `last_hidden_state` over the tokens
    (Reimers & Gurevych 2019).

    Args:
        model: The model.
        data: The batches.
        metric: One of these, or a function of the model and a batch as it comes, that gives a score for each example.
        labels: The entry of mappings that is the labels, where it has another name.
        mask: Name of the input (batch, length) that is zero at padding, as in `st.compress`.
        forward: A function of the model and a batch's inputs that gives the outputs, where the model is not called with
            just these: `lambda model, batch: model(batch)["sentence_embedding"]`.

    Raises:
        DataError: no batches, or batches, outputs and labels that do not fit the metric.
        ModelError: weights without values, or a model that cannot run the batches.
    """
    require_values(model)
    if isinstance(metric, str) and metric not in _METRICS:
        raise DataError(f"metric={metric!r}: give one of {', '.join(_METRICS)}, or a function of the model and a batch")
    data = data if labels is None else NamedLabels(data, labels)
    network = _Network(model, forward, mask)
    rows = _METRICS[metric](network, data) if isinstance(metric, str) else _own(model, data, metric)
    with evaluating(model):
        pairs = [pair for batch in rows for pair in batch]
    if not pairs:
        raise DataError("the data for the score is empty; give at least one batch")
    own, reference = zip(*pairs, strict=True)
    if not np.isfinite([*own, *reference]).all():
        raise DataError("scores of single examples are NaN or infinite; look at the model's outputs for these data")
    name: Any = metric if isinstance(metric, str) else "mean"
    score = Score(metric=name, per_example=own, reference=reference if name in ("perplexity", "spearman") else ())
    _require_variation(score)
    return score


_Rows = Iterator[list[tuple[float, float]]]
"""Of each batch, an example's own figure and its reference."""


@dataclass(frozen=True, eq=False)
class _Network:
    """A model, and how a batch becomes its outputs."""

    model: nn.Module
    forward: ForwardFunction | None
    mask: str | None

    @property
    def signature(self) -> nn.Module | None:
        """The model, if it is called with a batch's inputs as they are."""
        return self.model if self.forward is None else None

    def outputs(self, inputs: Inputs, what: str) -> Any:
        return call(self.model if self.forward is None else Forward(self.model, self.forward), inputs, what=what)

    def is_token(self, inputs: Inputs, outputs: Tensor) -> Tensor:
        """(batch, length) of outputs (batch, length, size), False at padding."""
        masks = TokenMasks.of(self.model, Inputs(inputs.args, inputs.kwargs, self.mask))
        places = TokenMasks(masks.masks).places(outputs.shape)  # of outputs it is known which dimension is which
        is_token = torch.full((outputs.shape[0] * outputs.shape[1],), places is None)
        if places is not None:
            is_token[places.index] = True
        return is_token.view(outputs.shape[:2])


def _accuracy(network: _Network, data: Iterable[Any]) -> _Rows:
    for right in correct_samples(data, network.outputs, model=network.signature):
        yield [(float(each), 0.0) for each in right.tolist()]


def _perplexity(network: _Network, data: Iterable[Any]) -> _Rows:
    for position, batch in enumerate(batches_of(data, what="the data for the perplexity")):
        what = f"batch {position}"
        inputs, labels = split_labels(batch, position=position, model=network.signature, required=False)
        shifted = labels is None or isinstance(batch, Mapping)
        tokens = tensor_of(_tokens_of(inputs, what) if labels is None else labels)
        logits = logits_of(network.outputs(inputs, what))
        if not isinstance(logits, Tensor) or logits.ndim != 3 or tokens is None or tokens.shape != logits.shape[:2]:
            raise DataError(
                f"{what}: outputs {describe(logits)} and tokens {describe(tokens)} give no perplexity; it needs "
                "outputs (batch, length, words) and token numbers (batch, length)"
            )
        tokens, is_token = tokens.to("cpu", torch.int64), network.is_token(inputs, logits)
        if shifted:  # what is told of the first token comes from no token before it, or from padding
            logits, tokens, is_token = logits[:, :-1], tokens[:, 1:], is_token[:, 1:] & is_token[:, :-1]
        tokens = torch.where(is_token, tokens, _IGNORED)
        if ((tokens < 0) & (tokens != _IGNORED)).any():
            raise DataError(f"{what}: there are labels below 0; those that do not count are {_IGNORED}")
        if (largest := int(tokens.max()) if tokens.numel() else 0) >= (words := logits.shape[2]):
            extent = f"{words} words, 0 to {words - 1}"
            raise DataError(f"{what}: there is a token {largest}, and the outputs are of {extent}")
        yield [_loss(*pair) for pair in zip(logits, tokens.to(logits.device), strict=True)]


def _tokens_of(inputs: Inputs, what: str) -> Any:
    values = [*inputs.args, *(inputs.kwargs[name] for name in ("input_ids",) if name in inputs.kwargs)]
    if len(values) != 1:
        raise DataError(
            f"{what} ({inputs.describe()}) does not say which tokens are to be told; give token numbers, a mapping "
            'with the entry "input_ids" or "labels", or pairs (inputs, labels)'
        )
    return values[0]


def _loss(logits: Tensor, tokens: Tensor) -> tuple[float, float]:
    """Mean loss of a sequence's tokens, (length, words) and (length,), and how many they are."""
    count = int((tokens != _IGNORED).sum())
    total = nn.functional.cross_entropy(logits.float(), tokens, ignore_index=_IGNORED, reduction="sum")
    return float(total) / max(1, count), float(count)


def _spearman(network: _Network, data: Iterable[Any]) -> _Rows:
    for position, batch in enumerate(batches_of(data, what="the data for the correlation")):
        if not isinstance(batch, Sequence) or len(batch) != 3:
            raise DataError(f"batch {position} is {describe(batch)}; give (first inputs, second inputs, gold scores)")
        first, second, gold = (*batch[:2], tensor_of(batch[2]))
        pair = [_embeddings(network, as_inputs(inputs), f"batch {position}") for inputs in (first, second)]
        if gold is None or pair[0].shape != pair[1].shape or gold.shape != pair[0].shape[:1]:
            raise DataError(
                f"batch {position}: embeddings {describe(pair[0])} and {describe(pair[1])} and gold scores "
                f"{describe(batch[2])} do not belong together; give a gold score (batch,) for each pair"
            )
        cosines = nn.functional.cosine_similarity(pair[0].double(), pair[1].double())
        yield list(zip(cosines.tolist(), gold.double().tolist(), strict=True))


def _embeddings(network: _Network, inputs: Inputs, what: str) -> Tensor:
    """(batch, size)."""
    outputs = network.outputs(inputs, what)
    if isinstance(outputs, Mapping):
        hidden = outputs.get("last_hidden_state")
        if "sentence_embedding" in outputs:
            outputs = outputs["sentence_embedding"]
        elif isinstance(hidden, Tensor) and hidden.ndim == 3:
            is_token = network.is_token(inputs, hidden).to(hidden.device)[..., None]
            outputs = torch.where(is_token, hidden, 0).sum(dim=1) / is_token.sum(dim=1)
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        raise DataError(
            f"{what}: outputs {describe(outputs)} are no embeddings (batch, size), nor have they a last_hidden_state; "
            "give forward=, a function of the model and a batch's inputs that gives embeddings"
        )
    return outputs


def _own(model: nn.Module, data: Iterable[Any], metric: Callable[[nn.Module, Any], Any]) -> _Rows:
    for position, batch in enumerate(batches_of(data, what="the data for the score")):
        try:
            scores = tensor_of(metric(model, batch))
        except Exception as error:  # of the user's function
            text = f"batch {position}: the metric, called with the model and a batch, failed"
            raise DataError(f"{text}: {type(error).__name__}: {error}") from error
        if scores is None or scores.ndim != 1:
            raise DataError(
                f"batch {position}: the metric gives {describe(scores)}; it is to give one score for each example, "
                "(batch,), so that the score has an interval"
            )
        yield [(float(score), 0.0) for score in scores.tolist()]


_METRICS: Mapping[str, Callable[[_Network, Iterable[Any]], _Rows]] = {
    "accuracy": _accuracy,
    "perplexity": _perplexity,
    "spearman": _spearman,
}


def _require_variation(score: Score) -> None:
    if score.metric == "perplexity" and not any(score.reference):
        raise DataError("the data has no token whose loss counts; give sequences of two tokens or more")
    figures = (score.per_example, score.reference) if score.metric == "spearman" else ()
    if any(len(set(values)) < 2 for values in figures):
        raise DataError(
            f"a rank correlation of {score.examples} pairs with {len(set(score.per_example))} different cosines and "
            f"{len(set(score.reference))} different gold scores does not exist; give pairs that differ"
        )


def _ranks(values: _Array) -> _Array:
    """From 1 on; equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: _Array = (np.cumsum(counts) - (counts - 1) / 2)[places]
    return ranks


def _bootstrap(statistic: Callable[[NDArray[np.int64]], float], examples: int) -> Interval:
    """The statistic of all examples, and between which values it lies for 95 % of the resamples."""
    generator = np.random.Generator(np.random.PCG64(0))
    value = statistic(np.arange(examples))
    with np.errstate(invalid="ignore"):  # of a resample in which all examples are equal
        drawn = [statistic(generator.integers(0, examples, examples)) for _ in range(_RESAMPLES)]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return Interval(value=value, low=min(value, float(low)), high=max(value, float(high)))
