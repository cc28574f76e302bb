"""Models with adapters of PEFT: merged ones are ordinary models, others are left as they are, with the way out."""

import pytest
import torch
from torch import Tensor, nn

import spectrim as st

peft = pytest.importorskip("peft")
X = torch.randn(32, 24, generator=torch.Generator().manual_seed(0))


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.up, self.down = nn.Embedding(40, 24), nn.Linear(24, 48), nn.Linear(48, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def with_adapter(targets: list[str]) -> nn.Module:
    torch.manual_seed(0)
    model = peft.get_peft_model(Body(), peft.LoraConfig(target_modules=targets, r=2)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def test_a_merged_adapter() -> None:
    adapted = with_adapter(["up"])
    expected = adapted(X)
    model = adapted.merge_and_unload()
    small = st.compress(model, st.Ratio(1.0), example_inputs=X, allow_growth=True)
    assert [layer.name for layer in small.plan.factored] == ["up", "down"]
    torch.testing.assert_close(small.model(X), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_is_not_merged_keeps_its_layer_and_says_what_to_do() -> None:
    adapted = with_adapter(["up"])
    small = st.compress(adapted, st.Rank(3), example_inputs=X)
    assert [layer.name for layer in small.plan.factored] == ["base_model.model.down"]
    reasons = {layer.reason for layer in small.plan if ".up." in layer.name}
    assert len(reasons) == 1
    assert "merge_and_unload()" in reasons.pop()


def test_where_all_layers_have_adapters_the_warning_says_what_to_do() -> None:
    with pytest.warns(UserWarning, match="merge_and_unload"):
        st.compress(with_adapter(["up", "down"]), st.Rank(3), example_inputs=X)
