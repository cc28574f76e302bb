"""What follows a layer's output is read off one pass, and claimed only where nothing else uses it."""

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from spectrim.core.execution import as_inputs
from spectrim.fitting.successors import Successor, find_successors, following
from spectrim.models import resnet20


class Block(nn.Module):
    """conv, BatchNorm, ReLU, conv, BatchNorm, plus a projected shortcut, ReLU; in place where torchvision is."""

    def __init__(self, *, inplace: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, affine=False)
        self.project = nn.Conv2d(3, 8, 1)
        self.relu = nn.ReLU(inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.project(x)
        return self.relu(y)


class Uses(nn.Module):
    """Layers whose outputs are used in ways that are no successor, or only in part."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.joined, self.doubled = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.scaled, self.broadcast, self.called = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.twice(x)
        a = torch.relu(a) + a
        b = torch.cat([self.joined(a), x], dim=1)
        c = self.doubled(x)
        c = c + c
        d = torch.relu(2 * self.scaled(x)) + torch.relu(self.broadcast(x) + x[:1])
        e = self.called(self.called(d))
        return self.last(b) + c[:, :2] + e[:, :2]


def with_statistics(model: nn.Module) -> nn.Module:
    """With BatchNorm statistics that are not the first ones."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean, module.running_var = (
                torch.randn(len(module.running_mean)),
                0.5 + torch.rand(len(module.running_var)),
            )
    return model.eval()


@pytest.mark.parametrize("inplace", [False, True])
def test_a_residual_block_is_read(inplace: bool) -> None:
    model = with_statistics(nn.Sequential(Block(inplace=inplace), nn.Conv2d(8, 2, 1)))
    successors = find_successors(model, as_inputs(torch.randn(2, 3, 5, 5)), {"0.conv1", "0.conv2", "0.project", "1"})
    kinds = {name: (successor.residual, successor.relu) for name, successor in successors.items()}
    assert kinds == {
        "0.conv1": (False, True),
        "0.conv2": (True, True),
        "0.project": (True, True),
        "1": (False, False),
    }
    scale = 1 / (model[0].bn2.running_var + model[0].bn2.eps).sqrt()
    torch.testing.assert_close(successors["0.conv2"].scale, scale)
    torch.testing.assert_close(successors["0.conv2"].shift, -scale * model[0].bn2.running_mean)
    assert bool((successors["0.project"].scale == 1).all())


@pytest.mark.parametrize("inplace", [False, True])
def test_a_successor_says_what_comes_out(inplace: bool) -> None:
    model = with_statistics(Block(inplace=inplace))
    x = torch.randn(2, 3, 5, 5)
    successor = find_successors(model, as_inputs(x), {"conv2"})["conv2"]
    seen: dict[str, Tensor] = {}
    with following(
        model,
        {"conv2"},
        on_call=lambda _, __, ___, output: seen.update(z=output.clone()),
        on_residual=lambda _, __, branch: seen.update(s=branch.clone()),
    ):
        output = model(x.clone())
    before = seen["z"] * successor.scale[:, None, None] + successor.shift[:, None, None] + seen["s"]
    torch.testing.assert_close(functional.relu(before), output)


def test_uses_that_are_no_successor() -> None:
    names = {"twice", "joined", "doubled", "scaled", "broadcast", "called"}
    successors = find_successors(Uses().eval(), as_inputs(torch.randn(3, 4)), names)
    assert "called" not in successors
    assert not any(successor.residual or successor.relu for successor in successors.values())


def test_a_whole_network_and_no_trace_left() -> None:
    model = resnet20().eval()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    successors = find_successors(
        model, as_inputs(torch.randn(2, 3, 32, 32)), {name for name, _ in model.named_modules()}
    )
    assert sum(successor.residual for successor in successors.values()) == 9
    assert sum(successor.relu for successor in successors.values()) == 19
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_a_functional_batch_norm_is_followed_like_a_module() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            norm = self.norm
            y = functional.batch_norm(self.conv(x), norm.running_mean, norm.running_var, eps=1e-3)
            return functional.relu(y)

    model = with_statistics(Functional())
    successor = find_successors(model, as_inputs(torch.randn(2, 3, 4, 4)), {"conv"})["conv"]
    scale = 1 / (model.norm.running_var + 1e-3).sqrt()
    torch.testing.assert_close(successor.scale, scale)
    torch.testing.assert_close(successor.shift, -scale * model.norm.running_mean)
    assert successor.relu


def test_batch_norm_that_looks_at_the_batch_is_not_an_affine_map() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()).eval()
    successor: Successor = find_successors(model, as_inputs(torch.randn(2, 3, 4, 4)), {"0"})["0"]
    assert (successor.residual, successor.relu) == (False, False)


def test_nothing_that_is_followed_is_kept() -> None:
    """Of a large network all that every function gives in a pass would be as much as training it takes."""
    model = resnet20().eval()
    outputs: list[weakref.ref[Tensor]] = []
    for block in (module for module in model.modules() if isinstance(module, nn.Conv2d)):
        block.register_forward_hook(lambda *args: outputs.append(weakref.ref(args[2])))
    alive: list[int] = []
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    last.register_forward_pre_hook(lambda *_: alive.append(sum(output() is not None for output in outputs)))
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    with following(model, names, on_call=lambda *_: None, on_residual=lambda *_: None):
        model(torch.randn(2, 3, 32, 32))
    assert len(outputs) == 19
    assert alive == [0]
