"""Model cards say what was kept and how to load it, are true when the model has changed, and spare other files."""

import copy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_llama import IDS, llama, transformers

import spectrim as st


@cache
def _compressed(*, on_data: bool = True) -> st.Compressed:
    model = llama(layers=2)
    data = [{"input_ids": torch.randint(0, 24, (8, 12))} for _ in range(2)]
    return st.compress(model, st.Ratio(0.25), example_inputs=IDS, data=data if on_data else None, include="*mlp*")


def _card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_a_card_says_what_was_kept_and_how_to_load_it(tmp_path: Path) -> None:
    small = _compressed()
    small.model.save_pretrained(tmp_path)
    card = _card(tmp_path)
    factors, dense = 6 * 8 * (48 + 32), 6 * 48 * 32
    assert f"{factors:,} parameters of the\n{dense:,} of the dense weights ({factors / dense:.1%})" in card
    assert f"The model has {small.measurement.params:,} in all" in card
    assert "| `model.layers.*.mlp.up_proj` (2) | 48\u00d732 | linear | 8 |" in card
    assert card.index("import spectrim") < card.index("LlamaForCausalLM.from_pretrained")
    assert "How good" not in card
    assert "tags:\n- spectrim" in card


def test_measured_quality_is_in_it_until_the_model_is_saved_again(tmp_path: Path) -> None:
    small = _compressed()
    small.model.save_pretrained(tmp_path)
    score = st.evaluate(small.model, [IDS["input_ids"]], "perplexity")
    assert st.write_model_card(small.model, tmp_path, fidelity=small.fidelity, scores={"Of the text": score})
    assert f"- Of the text: {score}" in _card(tmp_path)
    assert str(small.fidelity) in _card(tmp_path)
    small.model.save_pretrained(tmp_path)
    assert "How good" not in _card(tmp_path)
    st.merge(_compressed(on_data=False).model).save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_a_card_of_somebody_else_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Mine\n")
    model = copy.deepcopy(_compressed().model)
    model.save_pretrained(tmp_path)
    assert not st.write_model_card(model, tmp_path)
    assert _card(tmp_path) == "# Mine\n"
    st.merge(_compressed(on_data=False).model).save_pretrained(tmp_path)
    assert _card(tmp_path) == "# Mine\n"


def test_a_card_of_narrowed_layers_says_how_many_neurons_are_left(tmp_path: Path) -> None:
    dense = llama(layers=2)
    data = [{"input_ids": torch.randint(0, 24, (8, 12))} for _ in range(2)]
    small = st.compress(dense, st.Budget(params=0.7), example_inputs=IDS, data=data, include="*mlp*", forms="width")
    small.model.save_pretrained(tmp_path)
    ranks = [small.plan[f"model.layers.{number}.mlp.down_proj"].rank for number in (0, 1)]
    span = f"{min(ranks)} to {max(ranks)}" if len(set(ranks)) > 1 else f"{ranks[0]}"
    assert f"| `model.layers.*.mlp.up_proj` (2) | 48\u00d732 | narrowed | {span} |" in _card(tmp_path)


@pytest.mark.parametrize("how", ["push", "save"])
def test_what_goes_to_the_hub_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    hub = pytest.importorskip("huggingface_hub")
    uploaded = []

    class Api:
        def create_repo(self, repo_id: str, **options: Any) -> Any:
            return SimpleNamespace(repo_id=repo_id)

        def create_branch(self, *args: Any, **options: Any) -> None: ...

        def create_commit(self, *args: Any, operations: Any, **options: Any) -> str:
            uploaded.extend((file.path_in_repo, Path(file.path_or_fileobj).read_bytes()) for file in operations)
            return "done"

    def without_card(*args: Any, **options: Any) -> Any:
        general = "This model card has been automatically generated."
        return hub.ModelCard(f"---\ntags:\n- mine\nlibrary_name: transformers\n---\n{general}")

    for module in (transformers.utils.hub, transformers.modeling_utils):
        monkeypatch.setattr(module, "hf_api", Api, raising=False)
        monkeypatch.setattr(module, "create_and_tag_model_card", without_card)
    for name in ("create_repo", "create_commit", "create_branch"):
        monkeypatch.setattr(transformers.utils.hub, name, getattr(Api(), name), raising=False)
        monkeypatch.setattr(transformers.modeling_utils, name, getattr(Api(), name), raising=False)
    model = _compressed().model
    if how == "push":
        model.push_to_hub("me/small")
    else:
        model.save_pretrained(str(tmp_path / "small"), push_to_hub=True, repo_id="me/small")
    card = dict(uploaded)["README.md"].decode()
    assert "from_pretrained" in card
    assert "- mine\n- spectrim" in card
