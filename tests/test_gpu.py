"""Networks on a GPU become what they become on the CPU, and stay where they are."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Residual, inputs, small_cnn, small_mlp
from torch import Tensor, nn

import spectrim as st

pytestmark = pytest.mark.gpu

transformers = pytest.importorskip("transformers", reason="the extra 'hf' is not installed")

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = torch.randint(3, 24, (32, 12), generator=torch.Generator().manual_seed(0))
IMAGES = inputs(32, 3, 12, 12, dtype=torch.float32)


def bert() -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(vocab_size=24, **SIZES)).eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=24, num_key_value_heads=2, **SIZES)
    return transformers.LlamaForCausalLM(config).eval()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "mlp": (lambda: small_mlp(dtype=torch.float32), inputs(32, 12, dtype=torch.float32)),
    "cnn": (lambda: small_cnn(dtype=torch.float32), IMAGES),
    "residual": (lambda: Residual().float(), IMAGES),
    "bert": (bert, {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}),
    "llama": (llama, {"input_ids": TOKENS}),
}


@pytest.fixture(autouse=True)
def _plain_float32() -> Iterator[None]:
    """Without TF32, so that both devices compute the same."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def answer(model: nn.Module, batch: Any) -> Tensor:
    device = next(model.parameters()).device
    with torch.no_grad():
        if isinstance(batch, Tensor):
            return model(batch.to(device)).cpu()
        return model(**{name: value.to(device) for name, value in batch.items()})[0].cpu()


def compressed(name: str, *, on: str, rule: Any = None, **options: Any) -> tuple[st.Compressed, Any]:
    make, batch = NETWORKS[name]
    few = batch[:1] if isinstance(batch, Tensor) else {key: value[:1] for key, value in batch.items()}
    rule = rule or st.Budget(macs=0.6)
    return st.compress(make().to(on), rule, example_inputs=few, data=[batch], **options), batch


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("rule", [st.Budget(macs=0.6), st.Budget(params=0.8), st.Rank(3)], ids=str)
def test_the_same_network_comes_out(name: str, rule: Any) -> None:
    there, batch = compressed(name, on="cuda", rule=rule)
    here, _ = compressed(name, on="cpu", rule=rule)
    assert all(parameter.is_cuda for parameter in there.model.parameters())
    assert [(layer.form, layer.ranks) for layer in there.plan] == [(layer.form, layer.ranks) for layer in here.plan]
    torch.testing.assert_close(answer(there.model, batch), answer(here.model, batch), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["residual", "bert", "llama"])
@pytest.mark.parametrize(("on", "device"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_statistics_elsewhere_change_nothing(name: str, on: str, device: str) -> None:
    there, batch = compressed(name, on=on, device=device)
    here, _ = compressed(name, on=on)
    assert {parameter.device.type for parameter in there.model.parameters()} == {on}
    assert [(layer.form, layer.ranks) for layer in there.plan] == [(layer.form, layer.ranks) for layer in here.plan]
    torch.testing.assert_close(answer(there.model, batch), answer(here.model, batch), rtol=1e-3, atol=1e-3)


def test_random_numbers_go_on_as_before() -> None:
    make, batch = NETWORKS["bert"]
    model, before = make().cuda(), torch.cuda.get_rng_state()
    st.compress(model, st.Budget(macs=0.6), example_inputs=batch, data=[batch])
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("name", ["cnn", "bert", "llama"])
def test_a_file_goes_from_one_to_the_other(name: str, tmp_path: Path) -> None:
    small, batch = compressed(name, on="cuda")
    st.save(small.model, tmp_path / "small.safetensors")
    for device in ("cuda", "cpu"):
        again = st.load(tmp_path / "small.safetensors", NETWORKS[name][0]().to(device))
        assert {parameter.device.type for parameter in again.parameters()} == {device}
        torch.testing.assert_close(answer(again, batch), answer(small.model, batch), rtol=1e-3, atol=1e-3)


def test_a_decoder_writes_the_same_text() -> None:
    small, _ = compressed("llama", on="cuda")
    texts = [
        model.generate(TOKENS[:2].to(device), max_new_tokens=8, do_sample=False).cpu()
        for device, model in (("cuda", small.model), ("cpu", copy.deepcopy(small.model).cpu()))
    ]
    assert torch.equal(*texts)


def test_training_resumes_where_it_stood(tmp_path: Path) -> None:
    small, batch = compressed("mlp", on="cuda")
    parts = [(part, torch.zeros(len(part), dtype=torch.long)) for part in batch.split(8)]
    teacher, path = NETWORKS["mlp"][0]().cuda(), tmp_path / "run.safetensors"

    def stop(step: st.training.Step) -> None:
        if (step.epoch, step.step) == (1, 1):
            raise KeyboardInterrupt

    whole = st.finetune(small.model, parts, teacher=teacher, epochs=3)
    with pytest.raises(KeyboardInterrupt):
        st.finetune(small.model, parts, teacher=teacher, epochs=3, checkpoint=path, on_step=stop)
    again = st.finetune(small.model, parts, teacher=teacher, epochs=3, checkpoint=path)
    torch.testing.assert_close(answer(again.model, batch), answer(whole.model, batch), rtol=1e-5, atol=1e-5)
    assert [round(epoch.loss, 5) for epoch in again.history] == [round(epoch.loss, 5) for epoch in whole.history]


@pytest.mark.filterwarnings("ignore:distillation")
@pytest.mark.parametrize("name", ["cnn", "bert", "llama"])
def test_distillation_ends_no_worse(name: str) -> None:
    small, batch = compressed(name, on="cuda", distill=st.Distillation(epochs=2, batch=8))
    plain, _ = compressed(name, on="cuda")
    dense = answer(NETWORKS[name][0](), batch)
    lost = [float((answer(each.model, batch) - dense).square().mean()) for each in (small, plain)]
    assert lost[0] <= 1.05 * lost[1]


@pytest.mark.parametrize("name", ["cnn", "bert"])
def test_a_network_is_exported_as_it_would_be_from_the_cpu(name: str, tmp_path: Path) -> None:
    small, batch = compressed(name, on="cuda")
    st.export_onnx(small.model, tmp_path / "small.onnx", example_inputs=batch)
    with st.runtimes.require_runtime("onnxruntime").prepare(copy.deepcopy(small.model).cpu(), batch) as session:
        torch.testing.assert_close(session.outputs()[0], answer(small.model, batch), rtol=1e-3, atol=1e-3)


def test_a_budget_of_time_is_that_of_the_gpu() -> None:
    layers = [nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 16)]
    wide, x = nn.Sequential(*layers).cuda(), torch.randn(8192, 1024)
    small = st.compress(wide, st.Budget(latency=0.7), example_inputs=x, data=[x[:2048]])
    speedup = st.measure(small.model, x, reference=wide, rounds=11).speedup
    assert speedup is not None
    assert speedup.value > 1
