"""Images are given with their channels last in memory where a network gives the same then, and nowhere else."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.core.execution import as_inputs, call
from spectrim.core.layout import ImageLayout


class Flat(nn.Module):
    """As in the tutorials: the maps are viewed as one row a sample, which needs their channels first in memory."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3))
        self.head = nn.Linear(12 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).view(len(x), -1))


class Reshaped(Flat):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


class Raw(Reshaped):
    """Reads the numbers in the order in which they lie in memory."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        return self.head(y.as_strided((len(x), 48), (48, 1)))


class Helped(Reshaped):
    """Has another head while it is trained, as in GoogLeNet."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        return self.head(y.view(len(x), -1) if self.training else y.flatten(1))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient.view(-1).view(x.shape)


class Squared(Reshaped):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(Square.apply(x))


IMAGES = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("kind", "expected"), [(Reshaped, True), (Flat, False), (Raw, False), (Helped, False), (Squared, False)]
)
def test_a_network_is_tried_before(kind: type[nn.Module], expected: bool) -> None:
    model = kind().eval()
    assert ImageLayout((model,)).of(as_inputs(IMAGES)).channels_last is (expected or kind is Helped)
    inputs = ImageLayout((model,), training=True).of(as_inputs(IMAGES))
    assert inputs.channels_last is expected
    assert all(part.channels_last is expected for part in inputs.split(4))
    torch.testing.assert_close(call(model, inputs), model(IMAGES))


def test_a_call_gets_a_copy_and_the_caller_s_tensor_stays() -> None:
    seen: list[Tensor] = []
    model = Reshaped().eval()
    model.features[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    inputs = ImageLayout((model,)).of(as_inputs(IMAGES))
    call(model, inputs)
    assert seen[-1].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(seen[-1], IMAGES)
    assert IMAGES.is_contiguous()


def test_every_network_and_every_shape_counts() -> None:
    assert not ImageLayout((Reshaped().eval(), Flat().eval())).of(as_inputs(IMAGES)).channels_last
    assert ImageLayout((Reshaped().eval(), None)).of(as_inputs(IMAGES)).channels_last

    class Pooled(Flat):
        def forward(self, x: Tensor) -> Tensor:
            y = self.features(x)
            return self.head((y if y.shape[-1] == 1 else y[:, :, :1, :1]).view(len(x), -1).repeat(1, 4))

    layout = ImageLayout((Pooled().eval(),))
    known = [layout.of(as_inputs(torch.randn(4, 3, size, size))).channels_last for size in (6, 8)]
    assert known == [call_succeeds(Pooled().eval(), size) for size in (6, 8)]


def call_succeeds(model: nn.Module, size: int) -> bool:
    try:
        model(torch.randn(4, 3, size, size).contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        return False
    return True


def test_what_training_mode_changes_is_changed_in_a_copy() -> None:
    class Following(Reshaped):
        steps = 0

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.steps += 1
                with torch.no_grad():
                    self.head.weight.mul_(0.5)
            return super().forward(x)

    model = Following().eval()
    before = model.head.weight.detach().clone()
    ImageLayout((model,), training=True).of(as_inputs(IMAGES))
    assert torch.equal(model.head.weight, before)
    assert model.steps == 0


def test_a_branch_on_the_size_of_a_batch_counts() -> None:
    class Branching(Flat):
        def forward(self, x: Tensor) -> Tensor:
            y = self.features(x)
            return self.head(y.view(len(x), -1) if len(x) > 2 else y.flatten(1))

    model = Branching().eval()
    layout = ImageLayout((model,))
    assert [layout.of(as_inputs(IMAGES[:size])).channels_last for size in (2, 8, 2, 1)] == [True, False, True, True]
    small = st.compress(model, st.Budget(macs=0.6), example_inputs=IMAGES[:2], data=IMAGES.split(8))
    assert small.fidelity is not None


def test_few_shapes_are_tried() -> None:
    calls: list[int] = []
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    model.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    layout = ImageLayout((model,))
    known = [layout.of(as_inputs(torch.randn(size, 3, 4, 4))).channels_last for size in range(1, 20)]
    assert known == [True] * 8 + [False] * 11
    assert max(calls) == 8


def test_what_is_no_image_stays_as_it_is() -> None:
    for tensor in (torch.randn(4, 8), torch.randn(4, 3, 8), torch.randint(5, (2, 3, 4, 4))):
        assert not ImageLayout((nn.Identity(),)).of(as_inputs(tensor)).channels_last


def test_trying_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    ImageLayout((model,), training=True).of(as_inputs(IMAGES))
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", [Flat, Reshaped, Raw])
def test_networks_are_compressed_and_trained_either_way(kind: type[nn.Module]) -> None:
    model = kind().eval()
    data = [*IMAGES.split(8)]
    small = st.compress(model, st.Budget(macs=0.6), example_inputs=data[0], data=data)
    assert small.fidelity is not None
    same = st.compress(Reshaped().eval(), st.Budget(macs=0.6), example_inputs=data[0], data=data)
    assert [layer.ranks for layer in small.plan] == [layer.ranks for layer in same.plan]
    torch.testing.assert_close(small.model(IMAGES), same.model(IMAGES), rtol=1e-3, atol=1e-4)
    labelled = [(batch, torch.zeros(len(batch), dtype=torch.long)) for batch in data]
    tuned, other = (st.finetune(network.model, labelled, epochs=2, seed=1) for network in (small, same))
    assert [epoch.loss for epoch in tuned.history] == pytest.approx([epoch.loss for epoch in other.history], rel=1e-3)
    assert all(parameter.is_contiguous() for parameter in tuned.model.parameters())


def test_a_try_leaves_no_trace() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), Reshaped())
    before = [tensor.clone() for tensor in model.state_dict().values()]
    drawn = torch.random.get_rng_state()
    assert ImageLayout((model,)).of(as_inputs(IMAGES)).channels_last
    assert all(map(torch.equal, before, model.state_dict().values()))
    assert torch.equal(drawn, torch.random.get_rng_state())
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
