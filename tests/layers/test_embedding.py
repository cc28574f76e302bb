"""Embeddings: factored where parameters or bytes are limited, by how often the data look each row up."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.linalg import DiagonalCovariance

ENTRIES, SIZE, LENGTH = 300, 24, 7


class Words(nn.Module):
    """Words and places, a body, and a head."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(ENTRIES, SIZE, **options), nn.Embedding(LENGTH, SIZE)
        self.body, self.head = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 3)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.places(torch.arange(words.shape[1]))
        return self.head(torch.relu(self.body(x)))


class Bags(nn.Module):
    """A bag of words, of one length or with offsets, and a head."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(ENTRIES, SIZE, **options), nn.Linear(SIZE, 3)

    def forward(self, words: Tensor, offsets: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        return self.head(self.bag(words, offsets, per_sample_weights=weights))


def with_low_rank(model: nn.Module) -> nn.Module:
    """Rows that nearly lie in a space of 6 dimensions, and differ in how often data look them up."""
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.num_embeddings == ENTRIES:
            inner = torch.randn(ENTRIES, 6) @ torch.randn(6, SIZE)
            module.weight.data.copy_(inner + 0.05 * torch.randn(ENTRIES, SIZE))
            if module.padding_idx is not None:
                module.weight.data[module.padding_idx] = 0
    return model


def build(cls: type[nn.Module] = Words, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return with_low_rank(cls(**options)).eval()


def sentences(seed: int, number: int = 32) -> Tensor:
    """Some words are a hundred times as frequent as others, and the last ones never occur."""
    generator = torch.Generator().manual_seed(seed)
    weights = 1 / (1 + torch.arange(ENTRIES - 50).double())
    return torch.multinomial(weights, number * LENGTH, replacement=True, generator=generator).reshape(number, LENGTH)


DATA = [sentences(1), sentences(2)]


@pytest.mark.parametrize("data", [None, DATA], ids=["plain", "data"])
@pytest.mark.parametrize("cost", ["params", "bytes"])
def test_a_budget_of_size_is_met(cost: str, data: list[Tensor] | None, tmp_path: Path) -> None:
    model, x = build(padding_idx=0), DATA[0]
    before = model.words.weight.clone()
    small = st.compress(model, st.Budget(**{cost: 0.55}), example_inputs=x, data=data)
    assert isinstance(small.model.words, st.LowRankEmbedding)
    assert 0.5 < getattr(small.measurement, f"{cost}_ratio") <= 0.55
    whole, plan = st.measure(model, x, latency=False), small.plan
    assert whole.macs - small.measurement.macs == plan.dense_cost.macs - plan.kept_cost.macs
    assert whole.params - small.measurement.params == plan.dense_cost.params - plan.kept_cost.params
    assert plan["words"].kept.macs == small.model.words.rank * SIZE * x.numel()
    assert small.model.words.bias is None
    assert not small.model.words(torch.zeros(1, dtype=torch.long)).any()
    assert torch.equal(model.words.weight, before)
    again = st.load(st.save(small.model, tmp_path / "small"), build(padding_idx=0))
    assert torch.equal(again(x), small.model(x))
    merged = st.merge(small.model)
    assert type(merged.words) is nn.Embedding
    assert merged.words.padding_idx == 0
    torch.testing.assert_close(merged(x), small.model(x), rtol=1e-4, atol=1e-4)
    plan.save(tmp_path / "plan.json")
    repeated = st.compress(model, st.Plan.load(tmp_path / "plan.json"), example_inputs=x, data=data)
    assert [layer.ranks for layer in repeated.plan] == [layer.ranks for layer in plan]


@pytest.mark.parametrize("rule", [st.Rank(2), st.Rank(20), st.Ratio(0.3), st.Energy(0.5), st.Budget(macs=0.6)])
def test_other_rules_leave_embeddings_as_they_are(rule: Any) -> None:
    small = st.compress(build(), rule, example_inputs=DATA[0], data=DATA, keep_last=True)
    assert type(small.model.words) is nn.Embedding
    assert "looked up" in small.plan["words"].reason
    analysis = st.analyze(build(), DATA[0], calibration=st.calibrate(build(), DATA), keep_last=True)
    assert not st.plan(analysis, rule)["words"].is_factored
    assert st.plan(analysis, st.Budget(params=0.55))["words"].is_factored


def test_the_statistics_are_frequencies() -> None:
    model = build()
    moments = st.calibrate(model, DATA).moments["words"]
    counts = torch.bincount(torch.cat(DATA).flatten(), minlength=ENTRIES).double()
    assert isinstance(moments.compact, DiagonalCovariance)
    torch.testing.assert_close(moments.compact.variances[0], counts / counts.sum())
    assert moments.count == counts.sum()
    assert moments.shrinkage == pytest.approx(float((counts == 1).sum() / counts.sum()))


class Positions(nn.Embedding):
    """Finds its indices itself, as the embeddings of positions do in OPT and BART."""

    def forward(self, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(mask.cumsum(dim=1).long() - 1)


def test_a_table_that_is_not_given_indices_is_left_out() -> None:
    model = nn.Sequential(Positions(9, 4), nn.Linear(4, 4))
    assert set(st.calibrate(model, [torch.ones(2, 9)]).moments) == {"1"}


def test_the_error_is_that_of_what_is_looked_up() -> None:
    """Each row counts as often as it is looked up, and those that never were a little."""
    model = build()
    analysis = st.analyze(model, DATA[0], calibration=st.calibrate(model, DATA))
    layer, moments = analysis["words"], st.calibrate(model, DATA).moments["words"]
    shares = (1 - moments.shrinkage) * moments.compact.variances[0] + moments.shrinkage / ENTRIES
    rows = model.words.weight.detach().double() * shares.sqrt().unsqueeze(1)
    values = torch.linalg.svdvals(rows)
    torch.testing.assert_close(torch.from_numpy(layer.spectra["activation"].values.copy()), values)
    down, up = layer.decomposition("linear", "activation").factors((4,))
    lost = (rows - ((up @ down)[0].mT * shares.sqrt().unsqueeze(1))).square().sum()
    torch.testing.assert_close(lost, values[4:].square().sum())


def test_frequent_words_come_nearer_than_by_the_weight_alone() -> None:
    model, x = build(), sentences(3, 256)
    ranks = {"words": 3}
    analysis = st.analyze(model, DATA[0], calibration=st.calibrate(model, DATA))
    plans = [st.plan(analysis, st.Budget(params=0.4), metric=metric) for metric in ("activation", "plain")]
    errors = []
    for plan in plans:
        layers = [
            layer.model_copy(update={"rank": ranks[layer.name]}) if layer.name in ranks else layer for layer in plan
        ]
        edited = plan.model_copy(update={"layers": tuple(layers)})
        small = st.compress(model, edited, example_inputs=DATA[0], analysis=analysis).model
        errors.append((small.words(x) - model.words(x)).detach().norm())
    assert errors[0] < errors[1]


def test_padding_is_not_counted() -> None:
    class Masked(Words):
        def forward(self, words: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(words)

    words, mask = DATA[0], torch.ones(DATA[0].shape, dtype=torch.long)
    mask[:, 5:] = 0
    batch = {"words": words, "attention_mask": mask}
    moments = st.calibrate(build(Masked), [batch]).moments["words"]
    counts = torch.bincount(words[:, :5].flatten(), minlength=ENTRIES).double()
    torch.testing.assert_close(moments.compact.variances[0], counts / counts.sum())


OFFSETS = torch.tensor([0, 3, 9])
BAGS: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "mean": ({}, (DATA[0],)),
    "sum": ({"mode": "sum", "padding_idx": 1}, (DATA[0],)),
    "offsets": ({"mode": "mean"}, (DATA[0].flatten(), OFFSETS)),
    "last offset": ({"include_last_offset": True}, (DATA[0].flatten(), torch.tensor([0, 3, 9, 224]))),
    "weights": ({"mode": "sum"}, (DATA[0], None, torch.rand(DATA[0].shape))),
}


@pytest.mark.parametrize("case", BAGS)
def test_bags(case: str, tmp_path: Path) -> None:
    options, inputs = BAGS[case]
    model = build(Bags, **options)
    small = st.compress(model, st.Budget(params=0.5), example_inputs=inputs)
    assert isinstance(small.model.bag, st.LowRankEmbeddingBag)
    assert small.measurement.params_ratio <= 0.5
    error = (small.model(*inputs) - model(*inputs)).norm() / model(*inputs).norm()
    assert error < 0.2
    again = st.load(st.save(small.model, tmp_path / "small"), build(Bags, **options))
    assert torch.equal(again(*inputs), small.model(*inputs))
    torch.testing.assert_close(st.merge(small.model)(*inputs), small.model(*inputs), rtol=1e-4, atol=1e-4)


def test_a_bag_on_data() -> None:
    model = build(Bags)
    small = st.compress(model, st.Budget(params=0.5), example_inputs=DATA[0], data=DATA)
    assert small.fidelity.relative_error < 0.2


@pytest.mark.parametrize(
    ("cls", "options", "reason"),
    [(Words, {"max_norm": 1.0}, "max_norm"), (Bags, {"mode": "max"}, "mode='max'")],
)
def test_what_does_not_pass_through_a_product_is_refused(
    cls: type[nn.Module], options: dict[str, Any], reason: str
) -> None:
    plan = st.compress(build(cls, **options), st.Budget(params=0.995), example_inputs=DATA[0]).plan
    assert any(reason in layer.reason for layer in plan)


def test_frozen_embeddings_have_gradients_of_their_outputs() -> None:
    model = build().requires_grad_(False)
    moments = st.calibrate(model, DATA, gradients=True).moments
    assert moments["words"].output_grad_covariance is not None
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("options", [{"sparse": True}, {"scale_grad_by_freq": True}])
def test_options_of_gradients_stay(options: dict[str, bool]) -> None:
    small = st.compress(build(**options), st.Budget(params=0.55), example_inputs=DATA[0]).model
    assert all(getattr(small.words.down, name) for name in options)
    small(DATA[0]).sum().backward()
    assert small.words.down.weight.grad.is_sparse == options.get("sparse", False)


def test_half_of_a_bert_that_is_half_embeddings() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=600, max_position_embeddings=32, **sizes)).eval()
    batches = [
        {"input_ids": torch.randint(3, 600, (8, 12)), "attention_mask": torch.ones(8, 12, dtype=torch.long)}
        for _ in range(3)
    ]
    small = st.compress(model, st.Budget(params=0.5), example_inputs=batches[0], data=batches)
    assert small.measurement.params_ratio <= 0.5
    assert isinstance(small.model.embeddings.word_embeddings, st.LowRankEmbedding)
    assert small.fidelity is not None


class Tied(nn.Module):
    """Words, a body, and a head with the words' weight."""

    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.words, self.body = nn.Embedding(ENTRIES, SIZE), nn.Linear(SIZE, SIZE)
        self.head = nn.Linear(SIZE, ENTRIES, bias=bias)
        self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words)
        return self.head(x + torch.relu(self.body(x)))


@pytest.mark.parametrize("data", [None, DATA], ids=["plain", "data"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_tied_head_shares_the_factors(bias: bool, data: list[Tensor] | None, tmp_path: Path) -> None:
    model, x = build(Tied, bias=bias), DATA[0]
    small = st.compress(model, st.Budget(params=0.6), example_inputs=x, data=data)
    words, head = small.model.words, small.model.head
    assert isinstance(words, st.LowRankEmbedding)
    assert head.up.weight is words.down.weight
    assert head.down.weight is words.up.weight
    torch.testing.assert_close(torch.as_tensor(head.weight), torch.as_tensor(words.weight))
    assert small.measurement.params_ratio <= 0.6
    whole, plan = st.measure(model, x, latency=False), small.plan
    for cost in ("params", "macs"):
        saved = getattr(plan.dense_cost, cost) - getattr(plan.kept_cost, cost)
        assert getattr(whole, cost) - getattr(small.measurement, cost) == saved
    assert plan["words"].dense.macs == ENTRIES * SIZE * x.numel()
    assert plan["words"].kept.macs == words.rank * (ENTRIES + 2 * SIZE) * x.numel()
    assert plan["words"].tied_names == ("head",)
    again = st.load(st.save(small.model, tmp_path / "small"), build(Tied, bias=bias))
    assert torch.equal(again(x), small.model(x))
    assert again.head.up.weight is again.words.down.weight
    merged = st.merge(small.model)
    assert merged.head.weight is merged.words.weight
    torch.testing.assert_close(merged(x), small.model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", [st.Ratio(0.3), st.Budget(macs=0.96), st.Budget(params=0.8, of="body")])
def test_a_tied_head_stays_dense_where_embeddings_do(rule: Any) -> None:
    small = st.compress(build(Tied), rule, example_inputs=DATA[0], data=DATA)
    assert small.model.head.weight is small.model.words.weight
    assert "shares its weight with words" in small.plan["head"].reason
    assert st.compress(build(Tied), small.plan, example_inputs=DATA[0], data=DATA).plan == small.plan


def test_tied_layers_are_factored_only_together() -> None:
    for left in ("words", "head"):
        small = st.compress(build(Tied), st.Budget(params=0.95), example_inputs=DATA[0], exclude=[left])
        assert f"shares its weight with {left}, which is not selected" in small.plan["words"].reason


def test_the_metric_of_tied_layers_joins_both() -> None:
    """Close to the sum of both errors, and closer than a metric of either one alone."""
    model = build(Tied)
    calibration = st.calibrate(model, DATA)
    f = calibration.moments["words"].covariance[0].diagonal()
    inputs = calibration.moments["head"]
    C = inputs.covariance[0] + inputs.mean[0].outer(inputs.mean[0])
    E = model.words.weight.detach().double()

    def lost(rows: Tensor, columns: Tensor) -> tuple[float, float]:
        """Shares of the energies of both uses that rank 5 loses in the metric of these rows and columns."""
        values, vectors = torch.linalg.eigh(columns)
        root = vectors * values.clamp(min=1e-9).sqrt() @ vectors.T
        scale = rows.clamp(min=1e-9).sqrt().unsqueeze(1)
        U, s, V = torch.linalg.svd(scale * E @ root, full_matrices=False)
        return shares((U[:, :5] * s[:5] @ V[:5]) @ torch.linalg.inv(root) / scale)

    def shares(product: Tensor) -> tuple[float, float]:
        errors = [float((f.unsqueeze(1) * matrix.square()).sum()) for matrix in (E - product, E)]
        outputs = [float((matrix @ C * matrix).sum()) for matrix in (E - product, E)]
        return errors[0] / errors[1], outputs[0] / outputs[1]

    analysis = st.analyze(model, DATA[0], calibration=calibration)
    down, up = analysis["words"].decomposition("linear", "activation").factors((5,))
    both = sum(shares((up @ down)[0].mT))
    ones, identity = torch.ones(ENTRIES).double(), torch.eye(SIZE).double()
    assert both < sum(lost(f, identity))
    assert both < sum(lost(ones, C))
    assert both < sum(lost(ones, identity))


class Counted(nn.Embedding):
    """As Whisper's: called with tokens, of which only the number counts."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return self.weight[: input.shape[1]]


class Placed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(90, 12), Counted(8, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tokens(x) + self.positions(x))


def test_an_embedding_with_a_forward_of_its_own_has_no_statistics() -> None:
    model, tokens = Placed().eval(), torch.randint(20, 90, (4, 6))
    assert set(st.calibrate(model, [tokens]).moments) == {"tokens", "head"}
    small = st.compress(model, st.Budget(params=0.8), example_inputs=tokens, data=[tokens])
    assert small.plan["positions"].form == "dense"


class Scaled(nn.Embedding):
    """Gives what an `nn.Embedding` gives, by a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return 1.0 * super().forward(input)


def test_an_embedding_that_is_treated_as_one_has_statistics() -> None:
    model, tokens = nn.Sequential(Scaled(300, 16), nn.Linear(16, 4)).eval(), torch.randint(0, 300, (16, 6))
    assert set(st.calibrate(model, [tokens]).moments) == {"0", "1"}
    small = st.compress(
        model, st.Budget(params=0.6), example_inputs=tokens, data=[tokens], treat_as={Scaled: nn.Embedding}
    )
    assert small.plan["0"].is_factored
