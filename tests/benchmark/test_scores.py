"""Scores: what each metric counts, that intervals cover, and that paired differences know what is shared."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim import errors

WORDS = 11


class Bigrams(nn.Module):
    """Scores of the next token from the last one alone, in a mapping like those of transformers."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WORDS)
        with torch.no_grad():
            self.table.weight.copy_(torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(seed)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.table(input_ids)}


class Encoder(nn.Module):
    """Embeddings of tokens (batch, length, size), whatever stands at padding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"last_hidden_state": self.table(input_ids), "pooler_output": self.table(input_ids)[:, 0]}


def ids(batch: int, length: int = 7, *, seed: int = 1) -> Tensor:
    return torch.randint(1, WORDS, (batch, length), generator=torch.Generator().manual_seed(seed))


def losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """Of every token but the first, by hand."""
    logits = model(tokens)["logits"].detach()[:, :-1].log_softmax(dim=2)
    return -logits.gather(2, tokens[:, 1:, None])[..., 0]


class TestAccuracy:
    def test_it_is_that_of_the_other_call(self) -> None:
        model, x = nn.Linear(5, 3), torch.randn(40, 5)
        data = list(zip(x.split(16), (x.sum(dim=1) > 0).long().split(16), strict=True))
        score, accuracy = st.evaluate(model, data), st.accuracy(model, data)
        assert (score.value, score.interval) == (accuracy.value, accuracy.interval)
        assert score.examples == len(score.per_example) == 40

    def test_a_difference_counts_what_changed(self) -> None:
        first, second = (
            st.Score(metric="accuracy", per_example=tuple(map(float, right))) for right in ("1110011", "1011001")
        )
        difference = second.against(first)
        tally = st.Changes.model_fields["classes"].annotation.__args__[0]
        same = tally(name="", total=7, before=5, broken=2, mended=1, confused=0).difference
        assert difference == same
        assert first.against(first).value == 0


class TestPerplexity:
    def test_tokens_that_come_next(self) -> None:
        model, tokens = Bigrams(), ids(6)
        expected = float(losses(model, tokens).mean().exp())
        for data in (
            [tokens],
            [{"input_ids": tokens}],
            [{"input_ids": tokens, "labels": tokens}],
            [(tokens[:, :-1], tokens[:, 1:])],
            list(tokens.split(2)),
        ):
            score = st.evaluate(model, data, "perplexity")
            assert score.value == pytest.approx(expected, rel=1e-6)
            assert (score.examples, score.reference) == (6, (6.0,) * 6)
            assert score.interval.low < score.value < score.interval.high

    @pytest.mark.parametrize("key", ["attention_mask", "mine"])
    def test_padding_and_ignored_labels_count_nowhere(self, key: str) -> None:
        model, tokens = Bigrams(), ids(3)
        each = losses(model, tokens)
        mask = torch.ones_like(tokens)
        mask[1, 4:] = 0
        labels = tokens.masked_fill(torch.arange(7) == 2, -100)
        total = torch.cat([each[0], each[1, :3], each[2]])
        forward = lambda model, batch: model(batch["input_ids"])  # noqa: E731
        data, options = [{"input_ids": tokens, key: mask}], {"mask": key, "forward": forward}
        score = st.evaluate(model, data, "perplexity", **options)
        assert score.value == pytest.approx(float(total.mean().exp()), rel=1e-6)
        assert score.reference == (6.0, 3.0, 6.0)
        score = st.evaluate(model, [data[0] | {"labels": labels}], "perplexity", **options)
        assert score.reference == (5.0, 2.0, 5.0)

    def test_nothing_is_told_from_padding(self) -> None:
        model, tokens = Bigrams(), ids(3)
        each, mask = losses(model, tokens), torch.ones_like(tokens)
        mask[1, :4] = 0
        total = torch.cat([each[0], each[1, 4:], each[2]])
        score = st.evaluate(
            model,
            [{"input_ids": tokens, "attention_mask": mask}],
            "perplexity",
            forward=lambda model, batch: model(batch["input_ids"]),
            mask="attention_mask",
        )
        assert score.reference == (6.0, 2.0, 6.0)
        assert score.value == pytest.approx(float(total.mean().exp()), rel=1e-6)

    def test_other_labels_below_zero_are_refused(self) -> None:
        with pytest.raises(st.errors.DataError, match="labels below 0"):
            st.evaluate(Bigrams(), [(ids(3), ids(3) - 50)], "perplexity")

    def test_a_paired_difference_is_narrower_than_the_intervals(self) -> None:
        dense, small = Bigrams(), Bigrams()
        with torch.no_grad():
            small.table.weight.add_(torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(9)), alpha=0.05)
        first, second = (st.evaluate(model, [ids(200)], "perplexity") for model in (dense, small))
        difference = second.against(first)
        assert difference.value == pytest.approx(second.value - first.value)
        assert difference.high - difference.low < (second.interval.high - second.interval.low) / 2

    def test_a_score_survives_its_file(self) -> None:
        score = st.evaluate(Bigrams(), [ids(6)], "perplexity")
        again = st.Score.model_validate_json(score.model_dump_json())
        assert again == score
        assert again.interval == score.interval
        assert "perplexity" in str(score)


class TestSpearman:
    def test_it_is_the_correlation_of_ranks(self) -> None:
        model = Encoder()
        first, second = ids(30, seed=1), ids(30, seed=2)
        gold = torch.arange(30) % 6
        means = [model(tokens)["last_hidden_state"].mean(dim=1).detach() for tokens in (first, second)]
        cosines = torch.cosine_similarity(*means)
        ranks = [
            (values[:, None] > values).sum(dim=1) + (values[:, None] == values).sum(dim=1) / 2
            for values in (cosines, gold)
        ]
        expected = np.corrcoef(*ranks)[0, 1]
        score = st.evaluate(model, [({"input_ids": first}, {"input_ids": second}, gold)], "spearman")
        assert score.value == pytest.approx(expected, abs=1e-9)
        assert -1 <= score.interval.low < score.value < score.interval.high <= 1
        assert st.evaluate(
            model, [(first, second, gold)], "spearman", forward=lambda model, x: model(x)["pooler_output"]
        ).value != pytest.approx(expected)

    def test_padding_is_no_part_of_the_mean(self) -> None:
        model = Encoder()
        first, second, gold = ids(5, seed=1), ids(5, seed=2), torch.arange(5)
        padded = {
            "input_ids": torch.cat([first, torch.zeros(5, 3, dtype=torch.int64)], dim=1),
            "attention_mask": torch.tensor([[1] * 7 + [0] * 3] * 5),
        }
        scores = [
            st.evaluate(model, [(inputs, {"input_ids": second}, gold)], "spearman")
            for inputs in ({"input_ids": first}, padded)
        ]
        assert scores[0].per_example == pytest.approx(scores[1].per_example)


class TestFunctions:
    def test_the_mean_of_its_scores(self) -> None:
        def score(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
            assert not model.training
            return (model(batch["x"])[:, 0] - batch["y"]).abs()

        model, x, y = nn.Linear(3, 1).train(), torch.randn(20, 3), torch.randn(20)
        data = [{"x": x[:8], "y": y[:8]}, {"x": x[8:], "y": y[8:]}]
        result = st.evaluate(model, data, score)
        assert result.metric == "mean"
        assert result.value == pytest.approx(float((model(x)[:, 0] - y).abs().mean().detach()), rel=1e-5)
        assert model.training

    def test_intervals_cover(self) -> None:
        """Of samples of a known mean about 95 % of the intervals hold it."""
        values = torch.randn(60, 50, generator=torch.Generator().manual_seed(0))
        scores = [st.Score(metric="mean", per_example=tuple(sample.tolist())) for sample in values]
        covered = sum(score.interval.low <= 0 <= score.interval.high for score in scores)
        assert covered >= 51


@pytest.mark.parametrize(
    ("data", "metric", "message"),
    [
        ([], "accuracy", "is empty"),
        ([], lambda model, batch: [], "is empty"),
        ([ids(2)], "bleu", "accuracy, perplexity, spearman"),
        ([ids(2)], "spearman", "first inputs, second inputs, gold scores"),
        ([(ids(2), ids(2), torch.zeros(3))], "spearman", "embeddings"),
        ([{"attention_mask": ids(2), "input_ids": ids(2)[:, :1]}], "perplexity", "two tokens or more"),
        ([(ids(2), ids(2) + WORDS)], "perplexity", "there is a token"),
        ([(ids(2), ids(2)[:, :3])], "perplexity", "give no perplexity"),
        ([ids(2)], lambda model, batch: model.nothing, "AttributeError: .*nothing"),
        ([ids(2)], lambda model, batch: 1.0, "one score for each example"),
        ([ids(2)], lambda model, batch: torch.full((2,), torch.nan), "NaN"),
    ],
)
def test_what_does_not_fit_is_said(data: Any, metric: Any, message: str) -> None:
    with pytest.raises(errors.DataError, match=message):
        st.evaluate(Bigrams(), data, metric)


def test_pairs_that_do_not_differ_have_no_correlation() -> None:
    with pytest.raises(errors.DataError, match="give pairs that differ"):
        st.evaluate(Encoder(), [({"input_ids": ids(4)}, {"input_ids": ids(4, seed=2)}, torch.ones(4))], "spearman")


def test_scores_of_other_data_have_no_difference() -> None:
    model = Bigrams()
    first, second = (st.evaluate(model, [ids(4, length)], "perplexity") for length in (5, 6))
    with pytest.raises(errors.DataError, match="same data in the same order"):
        first.against(second)


def test_scores_are_compared_after_they_were_looked_at() -> None:
    scores = [st.evaluate(Bigrams(), [torch.arange(8).reshape(2, 4)], "perplexity") for _ in range(2)]
    assert {score.interval.value for score in scores} == {scores[0].value}
    assert scores[0] == scores[1]
    assert scores[0] != st.evaluate(Bigrams(seed=1), [torch.arange(8).reshape(2, 4)], "perplexity")
