"""Folders of Hugging Face that are compressed block by block: what comes out, what is resumed, what is refused."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import spectrim as st
from spectrim import errors
from spectrim.layers.factored import low_rank_layers

transformers = pytest.importorskip("transformers", reason="the extra 'hf' is not installed")

SIZES = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
BODY = st.Budget(params=0.8, of="body")


def llama(**options: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 2, **options}))


def qwen3() -> Any:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    options = {"num_key_value_heads": 2, "head_dim": 8, "use_sliding_window": True, "sliding_window": 4}
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, **options, layer_types=kinds))


def bert() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=3))


def gpt2() -> Any:
    sizes = {"n_positions": 32, "n_embd": 32, "n_layer": 3, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=24, **sizes))


NETWORKS: dict[str, Callable[[], Any]] = {"llama": llama, "qwen3": qwen3, "bert": bert, "gpt2": gpt2}


def folder_of(model: Any, path: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.2)
    model.eval().save_pretrained(path, **options)
    return model


def tokens(batches: int = 5, samples: int = 4) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 24, (samples, 12), generator=draw)} for _ in range(batches)]


def files_of(folder: Path) -> dict[str, str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


def loaded(cls: Any, folder: Path, **options: Any) -> Any:
    model, info = cls.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_folder_loads_and_costs_what_the_plan_says(tmp_path: Path, name: str) -> None:
    dense = folder_of(NETWORKS[name](), tmp_path / "dense", max_shard_size="20KB")
    data = tokens()
    result = st.compress_checkpoint(tmp_path / "dense", BODY, data=data, out=tmp_path / "small")
    small = loaded(type(dense), tmp_path / "small")
    params = sum(weight.numel() for weight in small.parameters())
    assert params == result.measurement.params
    after, before = result.plan.kept_cost.params, result.plan.dense_cost.params
    assert after < before
    assert params == sum(weight.numel() for weight in dense.parameters()) - before + after
    assert st.Plan.load(tmp_path / "small" / "plan.json") == result.plan
    assert set(low_rank_layers(small)) == {layer.name for layer in result.plan.factored}
    with torch.no_grad():
        pair = [model(**data[0], output_hidden_states=True).hidden_states for model in (dense, small)]
    states = [each[-1] if name == "bert" else each[-2] for each in pair]
    assert float((states[0] - states[1]).norm() / states[0].norm()) < 0.6
    assert 0 < result.hidden_error < 0.6
    assert "What was kept" in (tmp_path / "small" / "README.md").read_text(encoding="utf-8")
    assert not list((tmp_path / "small").glob(".*"))


def test_the_body_costs_what_the_budget_allows(tmp_path: Path) -> None:
    folder_of(llama(), tmp_path / "dense")
    result = st.compress_checkpoint(tmp_path / "dense", BODY, data=tokens(), out=tmp_path / "small")
    body = sum(layer.dense.params for layer in result.plan if layer.break_even)
    assert 0.77 * body < result.plan.kept_cost.params - (result.plan.dense_cost.params - body) <= 0.8 * body


def test_what_stays_dense_is_as_it_was(tmp_path: Path) -> None:
    dense = folder_of(llama(), tmp_path / "dense")
    result = st.compress_checkpoint(
        tmp_path / "dense", st.Energy(1.0), data=tokens(), out=tmp_path / "small", reconstruct=True
    )
    assert not result.plan.factored
    assert result.hidden_error < 1e-5
    again = loaded(type(dense), tmp_path / "small")
    with torch.no_grad():
        torch.testing.assert_close(again(**tokens()[0]).logits, dense(**tokens()[0]).logits, rtol=1e-4, atol=1e-4)


def test_the_first_block_is_factored_as_by_compress(tmp_path: Path) -> None:
    dense = folder_of(llama(num_key_value_heads=4), tmp_path / "dense")
    data = tokens(8, 8)
    result = st.compress_checkpoint(tmp_path / "dense", st.Rank(6), data=data, out=tmp_path / "small")
    whole = st.compress(dense, st.Rank(6), example_inputs=data[0], data=data, exclude=["lm_head"])
    small, units = loaded(type(dense), tmp_path / "small"), torch.eye(32)
    for layer in whole.plan.factored[:4]:
        assert result.plan[layer.name].ranks == layer.ranks
        assert result.plan[layer.name].predicted_error == pytest.approx(layer.predicted_error)
        pair = [model.get_submodule(layer.name)(units) for model in (small, whole.model)]
        torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-4)


class StoppedError(Exception):
    pass


STEPS = ["check", "calibrate model.layers.1", "plan", "fit model.layers.0", "fit model.layers.2", "write"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    folder_of(llama(), folder / "dense")
    st.compress_checkpoint(folder / "dense", BODY, data=tokens(), out=folder / "small")
    return folder / "dense", files_of(folder / "small")


@pytest.mark.parametrize("step", STEPS)
def test_a_stopped_run_goes_on_to_the_same_files(
    tmp_path: Path, uninterrupted: tuple[Path, dict[str, str]], step: str
) -> None:
    dense, expected = uninterrupted
    out = tmp_path / "small"

    def stop(what: str, done: int, total: int) -> None:
        if what == step:
            raise StoppedError

    with pytest.raises(StoppedError):
        st.compress_checkpoint(dense, BODY, data=tokens(), out=out, on_progress=stop)
    assert not (out / "config.json").exists()
    steps: list[str] = []
    st.compress_checkpoint(dense, BODY, data=tokens(), out=out, on_progress=lambda what, *_: steps.append(what))
    assert files_of(out) == expected
    assert "calibrate model.layers.0" not in steps or step in ("check", "calibrate model.layers.1")
    assert ("fit model.layers.0" in steps) == (step not in ("fit model.layers.2", "write"))


def test_a_run_stopped_while_files_are_written_goes_on(
    tmp_path: Path, uninterrupted: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from spectrim.integrations import checkpoints

    dense, expected = uninterrupted
    (tmp_path / "small/.spectrim-checkpoint").mkdir(parents=True)  # stopped before it had begun
    for place in ("write_index", "write_model_card"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, place, lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                st.compress_checkpoint(dense, BODY, data=tokens(), out=tmp_path / "small")
        assert not (tmp_path / "small" / "config.json").exists()
    (tmp_path / "small/.plan.json.0a1b2c3d.part").touch()
    st.compress_checkpoint(dense, BODY, data=tokens(), out=tmp_path / "small")
    assert files_of(tmp_path / "small") == expected


def test_another_request_does_not_go_on(tmp_path: Path, uninterrupted: tuple[Path, dict[str, str]]) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "plan":
            raise StoppedError

    dense, _ = uninterrupted
    with pytest.raises(StoppedError):
        st.compress_checkpoint(dense, BODY, data=tokens(), out=tmp_path / "small", on_progress=stop)
    for rule, data in ((st.Budget(params=0.7, of="body"), tokens()), (BODY, tokens(4))):
        with pytest.raises(errors.FileError, match="was begun with another"):
            st.compress_checkpoint(dense, rule, data=data, out=tmp_path / "small")
    shutil.copytree(dense, tmp_path / "dense")
    damaged(tmp_path / "dense", lambda config: config.update(rms_norm_eps=0.1))
    with pytest.raises(errors.FileError, match="was begun with another"):
        st.compress_checkpoint(tmp_path / "dense", BODY, data=tokens(), out=tmp_path / "small")


def test_a_disk_that_runs_full_is_said(tmp_path: Path, uninterrupted: tuple[Path, dict[str, str]]) -> None:
    resource = pytest.importorskip("resource", reason="no limit of file sizes here")
    (dense, expected), limits = uninterrupted, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(what: str, done: int, total: int) -> None:
        if what == "calibrate model.layers.0":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))

    try:
        with pytest.raises(errors.FileError, match=r"cannot write .*small.*with space"):
            st.compress_checkpoint(dense, BODY, data=tokens(), out=tmp_path / "small", on_progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    st.compress_checkpoint(dense, BODY, data=tokens(), out=tmp_path / "small")
    assert files_of(tmp_path / "small") == expected


@pytest.mark.parametrize(
    ("name", "gone"),
    [("spectra-00000", False), ("dense-00001/000000", True), ("weights-00000", False), ("weights-00000", True)],
)
def test_damaged_files_of_a_stopped_run_are_named(
    tmp_path: Path, uninterrupted: tuple[Path, dict[str, str]], name: str, gone: bool
) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == ("plan" if name.startswith("spectra") else "fit model.layers.1"):
            raise StoppedError

    out = tmp_path / "small"
    with pytest.raises(StoppedError):
        st.compress_checkpoint(uninterrupted[0], BODY, data=tokens(), out=out, on_progress=stop)
    path = out / f".spectrim-checkpoint/{name}.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    if gone:
        path.unlink()
    with pytest.raises(errors.FileError, match=r"is damaged.*to begin anew"):
        st.compress_checkpoint(uninterrupted[0], BODY, data=tokens(), out=out)
    assert not (out / "config.json").exists()


def test_bfloat16_stays_bfloat16_and_places_of_outputs_whole_numbers(tmp_path: Path) -> None:
    dense = folder_of(llama(tie_word_embeddings=True, intermediate_size=600).to(torch.bfloat16), tmp_path / "dense")
    whole = st.Budget(params=0.8)
    result = st.compress_checkpoint(tmp_path / "dense", whole, data=tokens(), out=tmp_path / "small")
    small = loaded(type(dense), tmp_path / "small", dtype="auto")
    assert {weight.dtype for weight in small.parameters()} == {torch.bfloat16}
    assert {layer.form for layer in result.plan.factored} == {"interpolative"}
    # numbers that bfloat16 does not hold
    assert len(small.model.layers[0].mlp.up_proj.up.order.unique()) == 600
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert result.measurement.params == sum(weight.numel() for weight in small.parameters())
    assert result.hidden_error < 0.6


def test_names_without_the_prefix_of_the_body_are_known(tmp_path: Path) -> None:
    dense = folder_of(gpt2(), tmp_path / "dense")
    path = tmp_path / "dense" / "model.safetensors"
    save_file(
        {key.removeprefix("transformer."): value for key, value in load_file(path).items()}, path, {"format": "pt"}
    )
    result = st.compress_checkpoint(tmp_path / "dense", BODY, data=tokens(), out=tmp_path / "small")
    small = loaded(type(dense), tmp_path / "small")
    assert set(low_rank_layers(small)) == {layer.name for layer in result.plan.factored}


def test_padding_changes_nothing(tmp_path: Path) -> None:
    folder_of(llama(), tmp_path / "dense")
    results = []
    for filler in (0, 7):
        data = tokens()
        for batch in data:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            for row, length in enumerate((12, 9, 5, 11)):
                batch["attention_mask"][row, length:] = 0
                batch["input_ids"][row, length:] = filler
        out = tmp_path / f"small{filler}"
        results.append(st.compress_checkpoint(tmp_path / "dense", BODY, data=data, out=out))
    assert results[0].plan == results[1].plan
    first, second = (weights_of(result.folder) for result in results)
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=1e-4, atol=1e-5, equal_nan=True)


def test_a_layer_that_is_left_out_stays_dense(tmp_path: Path) -> None:
    folder_of(llama(), tmp_path / "dense")
    result = st.compress_checkpoint(
        tmp_path / "dense", BODY, data=iter(tokens()), out=tmp_path / "small", exclude=["*.q_proj", "model.layers.1.*"]
    )
    names = {layer.name for layer in result.plan.factored}
    assert names
    assert not any("q_proj" in name or "layers.1" in name for name in names)


def damaged(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    change(config)
    path.write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("rule", "options", "match"),
    [
        (st.Budget(latency=0.5), {}, "has budgets of params or macs"),
        (st.Budget(bytes=0.5), {}, "has budgets of params or macs"),
        (BODY, {"metric": "loss"}, "needs gradients of the whole model"),
        (BODY, {"exclude": "lm_head"}, "matches no layer"),
        (BODY, {"data": []}, "is empty"),
        (BODY, {"data": [{"pixels": torch.eye(3)}]}, "cannot run the calibration data"),
        (st.Rank(40), {}, "full rank 32"),
        (st.Budget(params=0.01), {}, "cannot be reached"),
    ],
)
def test_requests_that_are_refused(
    tmp_path: Path, uninterrupted: tuple[Path, dict[str, str]], rule: Any, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(errors.SpectrimError, match=match):
        st.compress_checkpoint(uninterrupted[0], rule, **{"data": tokens(), "out": tmp_path / "small"} | options)
    assert not (tmp_path / "small" / "config.json").exists()


def test_folders_that_are_refused(tmp_path: Path) -> None:
    dense, data = tmp_path / "dense", tokens()
    folder_of(llama(), dense, max_shard_size="20KB")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "note.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(errors.FileError, match="is there already"):
        st.compress_checkpoint(dense, BODY, data=data, out=taken)
    with pytest.raises(errors.FileError, match="is the folder of the dense model"):
        st.compress_checkpoint(dense, BODY, data=data, out=dense)
    (tmp_path / "small" / ".spectrim-killed").mkdir(parents=True)  # what a command leaves that is killed
    st.compress_checkpoint(dense, BODY, data=data, out=tmp_path / "small")
    with pytest.raises(errors.ModelError, match="was compressed already"):
        st.compress_checkpoint(tmp_path / "small", BODY, data=data, out=tmp_path / "smaller")
    with pytest.raises(errors.FileError, match="is there already"):
        st.compress_checkpoint(dense, BODY, data=data, out=tmp_path / "small")
    index = json.loads((dense / "model.safetensors.index.json").read_text(encoding="utf-8"))
    del index["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    (dense / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(errors.FileError, match=r"lacks 1 of the weights .* first model.layers.1.mlp.up_proj.weight"):
        st.compress_checkpoint(dense, BODY, data=data, out=tmp_path / "new")
    damaged(dense, lambda config: config.update(quantization_config={"quant_method": "awq"}))
    with pytest.raises(errors.ModelError, match=r"quant_method in its config\.json is 'awq'"):
        st.compress_checkpoint(dense, BODY, data=data, out=tmp_path / "new")
    damaged(
        dense, lambda config: config.update(quantization_config=None, architectures=["Own"], auto_map={"A": "own.Own"})
    )
    with pytest.raises(errors.ModelError, match="brings code of its own"):
        st.compress_checkpoint(dense, BODY, data=data, out=tmp_path / "new")
    damaged(dense, lambda config: config.update(architectures=["LlamaForCausalLM"], auto_map=None))
    next(dense.glob("model-00002*")).unlink()
    with pytest.raises(errors.FileError, match="files of weights"):
        st.compress_checkpoint(dense, BODY, data=data, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            lambda weight: weight[:, :8],
            errors.FileError,
            r"float32 \[48, 8\], .* to be \[48, 32\] by config.json",
        ),
        (lambda weight: weight.to(torch.int8), errors.FileError, "is torch.int8 .* to be bfloat16 or wider"),
        (lambda weight: weight * torch.nan, errors.ModelError, r"model.layers.0 gives NaN .* check its weights"),
    ],
    ids=["size", "type", "NaN"],
)
def test_weights_that_do_not_fit_are_refused(
    tmp_path: Path, change: Callable[[Tensor], Tensor], kind: type[Exception], message: str
) -> None:
    dense = tmp_path / "dense"
    folder_of(llama(), dense)
    state, key = weights_of(dense), "model.layers.0.mlp.up_proj.weight"
    save_file(state | {key: change(state[key]).contiguous()}, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(kind, match=message):
        st.compress_checkpoint(dense, BODY, data=tokens(), out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_models_that_are_no_chain_are_refused(tmp_path: Path) -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 24}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))
    folder_of(t5, tmp_path / "t5")
    with pytest.raises(errors.ModelError, match="an encoder and a decoder"):
        st.compress_checkpoint(tmp_path / "t5", BODY, data=tokens(), out=tmp_path / "small")
    sizes = {"vocab_size": 24, "embedding_size": 16, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    albert = transformers.AlbertForMaskedLM(transformers.AlbertConfig(**sizes, num_attention_heads=4))
    folder_of(albert, tmp_path / "albert")
    with pytest.raises(errors.ModelError, match="load it whole with transformers"):
        st.compress_checkpoint(tmp_path / "albert", BODY, data=tokens(), out=tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_too_little_space_or_memory_is_said_before_work(
    tmp_path: Path, uninterrupted: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from spectrim.integrations import checkpoints, work_folders

    def run() -> None:
        st.compress_checkpoint(uninterrupted[0], BODY, data=tokens(), out=tmp_path / "small")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "free_bytes", lambda _: 1000)
        with pytest.raises(errors.ResourceError, match="one block takes about"):
            run()
    usage = work_folders.shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(work_folders.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(errors.ResourceError, match="on another disk"):
            run()
    assert not (tmp_path / "small").exists()
