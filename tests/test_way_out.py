"""What people bring along: each wrong input is refused by a message whose way out works when it is pasted."""

import re
import warnings
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import spectrim as st

SAVED = r"(torch\.save\(.+, 'weights\.pt'\))"
"""The line of a message that writes a file which can be read."""
RUNS = r"can run (.+?)(?:\.$|, normalised)"
LOADED = "same(st.load('weights.pt', network()))"


def network() -> nn.Sequential:
    """12-16-4, untrained."""
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))


class Images(nn.Module):
    """Convolutions before a head: it needs its batch dimension."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.head = nn.Linear(128, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(images).flatten(1))


class Named(nn.Module):
    """Takes and gives entries with names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"scores": self.net(image)}


class Whole(Named):
    """Takes the batch itself."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        return {"scores": self.net(batch["image"])}


@dataclass(frozen=True)
class Case:
    """A wrong call, what its message says, and what makes it right.

    Attributes:
        call: Python, with the names of `names`.
        error: What it raises.
        says: In the message.
        way_out: A pattern; its group is the Python that the message states.
        then: What works after that.
        make: Writes the files of the call.
    """

    call: str
    says: str
    error: type[Exception] = st.errors.FileError
    way_out: str = RUNS
    then: str = LOADED
    make: str = ""


def names() -> dict[str, Any]:
    """What the code of a case may use."""
    torch.manual_seed(0)
    trained, x = network().eval(), torch.randn(8, 12)
    images = torch.rand(4, 3, 8, 8)

    def same(model: nn.Module) -> None:
        assert torch.equal(model.eval()(x), trained(x))

    return {
        **globals(),
        **{module: import_module(module) for module in ("numpy", "os", "pathlib", "pickle", "spectrim")},
        **{"Compressed": st.Compressed, "safetensors": safetensors, "save_file": safetensors.torch.save_file},
        **{"trained": trained, "model": trained, "state": trained.state_dict(), "same": same},
        **{"x": x, "y": torch.arange(8) % 4, "images": images, "pixels": (images * 255).byte(), "rank": st.Rank(2)},
    }


FileError, ArgumentError, ModelError = st.errors.FileError, st.errors.ArgumentError, st.errors.ModelError
DataError, RuleError = st.errors.DataError, st.errors.RuleError
PICKLED = r"without running code that it may hold"

FILES = {
    "a whole model in the old format": Case(
        make="torch.save(trained, 'old.pt', _use_new_zipfile_serialization=False)",
        call="st.load('old.pt', network())",
        says=PICKLED,
        way_out=SAVED,
    ),
    "a pickle": Case(
        make="Path('weights.pkl').write_bytes(pickle.dumps(dict(state)))",
        call="st.load('weights.pkl', network())",
        says=PICKLED,
        way_out=SAVED,
    ),
    "a state of NumPy arrays": Case(
        make="torch.save({name: value.numpy() for name, value in state.items()}, 'arrays.pt')",
        call="st.load('arrays.pt', network())",
        says=r"holds a dict .*, not one state",
        way_out=SAVED,
    ),
    "NumPy's archive": Case(
        make="numpy.savez('weights.npz', **{name: value.numpy() for name, value in state.items()})",
        call="st.load('weights.npz', network())",
        says="NumPy",
        way_out=SAVED,
    ),
    "TorchScript": Case(
        make="torch.jit.trace(trained, x).save('script.pt')",
        call="st.load('script.pt', network())",
        says="TorchScript",
        way_out=SAVED,
    ),
    "a program of torch.export": Case(
        make="torch.export.save(torch.export.export(trained, (x,)), 'program.pt2')",
        call="st.load('program.pt2', network())",
        says=r"torch\.export",
        way_out=SAVED,
    ),
    "an ONNX graph": Case(
        make="st.export_onnx(trained, 'net.onnx', x)",
        call="st.load('net.onnx', network())",
        says="ONNX",
        way_out=SAVED,
    ),
    "a Keras file": Case(
        make="linear, kernel = nn.Linear(12, 16), numpy.ones((12, 16), numpy.float32)\n"
        r"Path('net.h5').write_bytes(b'\x89HDF\r\n\x1a\n' + bytes(100))",
        call="st.load('net.h5', network())",
        says="Keras",
        way_out=r"(linear\.weight\.data = \S+) ",
        then="linear.bias.data.zero_(); assert torch.allclose(linear(x), torch.from_numpy(x.numpy() @ kernel))",
    ),
    "a Keras file under another name": Case(
        make="linear, kernel = nn.Linear(12, 16), numpy.ones((12, 16), numpy.float32)\n"
        r"Path('net.bin').write_bytes(b'\x89HDF\r\n\x1a\n' + bytes(100))",
        call="st.load('net.bin', network())",
        says="Keras",
        way_out=r"(linear\.weight\.data = \S+) ",
        then="linear.bias.data.zero_(); assert torch.allclose(linear(x), torch.from_numpy(x.numpy() @ kernel))",
    ),
    "two networks in one file": Case(
        make="torch.save({'generator': state, 'discriminator': {'weight': torch.ones(3)}}, 'gan.pt')",
        call="st.load('gan.pt', network())",
        says="'generator', 'discriminator'",
        way_out=SAVED,
    ),
    "parts of a large file": Case(
        make="Path('hf').mkdir(); parts = list(state.items()); save_file(dict(parts[:2]), 'hf/model-00001-of-00002."
        "safetensors'); save_file(dict(parts[2:]), 'hf/model-00002-of-00002.safetensors'); "
        "Path('hf/model.safetensors.index.json').write_text('{}')",
        call="st.load('hf/model.safetensors.index.json', network())",
        says="several files",
        way_out=SAVED,
    ),
    "a folder with another file": Case(
        make="Path('runs').mkdir(); torch.save(state, 'runs/best.pt')",
        call="st.load('runs', network())",
        says="a folder",
        way_out=r"name a file in it: ('\S+')",
        then="same(st.load(pasted, network()))",
    ),
    "a folder of Hugging Face": Case(
        make="import transformers; transformers.logging.disable_progress_bar(); config = transformers.BertConfig("
        "vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)\n"
        "transformers.BertModel(config).save_pretrained('hf')",
        call="st.load('hf', network())",
        says="a folder of Hugging Face",
        way_out=r"(transformers\.\w+\.from_pretrained\('hf'\))",
        then="assert isinstance(pasted, transformers.BertModel)",
    ),
    "a folder of Hugging Face as the model": Case(
        make="import transformers; transformers.logging.disable_progress_bar(); config = transformers.BertConfig("
        "vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)\n"
        "transformers.BertModel(config).save_pretrained('hf')",
        call="st.compress('hf', rank, example_inputs=x)",
        error=ArgumentError,
        says="a folder of Hugging Face",
        way_out=r"(transformers\.\w+\.from_pretrained\('hf'\))",
        then="assert isinstance(pasted, transformers.BertModel)",
    ),
    "a name that is not there": Case(
        make="torch.save(state, 'best.pt')",
        call="st.load('bets.pt', network())",
        says="missing",
        way_out=r"did you mean ('\S+')\?",
        then="same(st.load(pasted, network()))",
    ),
    "a path from the home folder": Case(
        make="torch.save(state, 'mine.pt')",
        call="st.load('~/mine.pt', network())",
        says="missing",
        way_out=r"(os\.path\.expanduser\('\S+'\))",
        then="same(st.load(pasted, network()))",
    ),
    "an address": Case(
        make="torch.save(state, 'there.pt'); address = Path('there.pt').resolve().as_uri()",
        call="st.load(address, network())",
        says="an address",
        way_out=r"(torch\.hub\.download_url_to_file\(.+?\))",
    ),
    "saved under the name of a pickle": Case(
        call="st.save(trained, 'small.pt')",
        says="safetensors",
        way_out=r"(st\.save\(model, '\S+'\))",
        then="assert not Path('small.pt').exists(); same(st.load('small.safetensors', network()))",
    ),
    "saved under the number of a version": Case(
        call="st.save(trained, 'small.v2')",
        says="safetensors",
        way_out=r"(st\.save\(model, '\S+'\))",
        then="same(st.load('small.v2.safetensors', network()))",
    ),
}

MODELS = {
    "a state": Case(
        call="st.compress(state, rank, example_inputs=x)",
        error=ArgumentError,
        says="is a state",
        way_out=r"(model\.load_state_dict\(.+\))",
        then="same(model)",
        make="model = network()",
    ),
    "a state to measure": Case(
        call="st.measure(state, x)",
        error=ArgumentError,
        says="is a state",
        way_out=r"(model\.load_state_dict\(.+\))",
        then="same(model)",
        make="model = network()",
    ),
    "a checkpoint": Case(
        call="st.compress(checkpoint, rank, example_inputs=x)",
        error=ArgumentError,
        says="is a state",
        way_out=r"(model\.load_state_dict\(.+\))",
        then="same(model)",
        make="model = network(); checkpoint = {'epoch': 3, 'model': state}",
    ),
    "the path of weights": Case(
        call="st.compress('mine.pt', rank, example_inputs=x)",
        error=ArgumentError,
        says="'mine.pt'",
        way_out=r"(st\.load\('mine\.pt', model\))",
        then="same(pasted)",
        make="model = network(); torch.save(state, 'mine.pt')",
    ),
    "a Path of weights": Case(
        call="st.accuracy(Path('mine.pt'), [(x, y)])",
        error=ArgumentError,
        says="'mine.pt'",
        way_out=r"(st\.load\('mine\.pt', model\))",
        then="same(pasted)",
        make="model = network(); torch.save(state, 'mine.pt')",
    ),
    "the path of an ONNX graph": Case(
        call="st.compress('net.onnx', rank, example_inputs=x)",
        error=ArgumentError,
        says="ONNX",
        way_out=SAVED,
        make="Path('net.onnx').write_bytes(bytes(9))",
    ),
    "the name of a network": Case(
        call="st.compress('spectrim:mlp', rank, example_inputs=x)",
        error=ArgumentError,
        says="'spectrim:mlp'",
        way_out=r"(spectrim\.models\.resolve\('\S+'\))",
        then="assert isinstance(pasted, nn.Module)",
        make="import spectrim.models",
    ),
    "a name that transformers knows": Case(
        call="st.compress('bert-base-uncased', rank, example_inputs=x)",
        error=ArgumentError,
        says="no such file",
        way_out=r"(transformers\.AutoModel\.from_pretrained\('bert-base-uncased'\))",
        then="assert pasted == 'bert-base-uncased'",
        make="import types; give = types.SimpleNamespace(from_pretrained=str)\n"
        "transformers = types.SimpleNamespace(AutoModel=give)  # the real one would download",
    ),
    "a class": Case(
        call="st.compress(Images, rank, example_inputs=images)",
        error=ArgumentError,
        says="this is the class",
        way_out=r"make one: (Images)\(\.\.\)",
        then="st.measure(pasted(), images, latency=False)",
    ),
    "a function that makes the model": Case(
        call="st.compress(network, rank, example_inputs=x)",
        error=ArgumentError,
        says="function",
        way_out=r"(network\(\))",
        then="st.measure(pasted, x, latency=False)",
    ),
    "the result of compress": Case(
        call="st.measure(result, x)",
        error=ArgumentError,
        says="Compressed",
        way_out=r"(result\.model)",
        then="st.measure(pasted, x, latency=False)",
        make="result = st.compress(trained, rank, example_inputs=x)",
    ),
    "TorchScript as the model": Case(
        call="st.compress(model, rank, example_inputs=x)",
        error=ModelError,
        says="TorchScript",
        way_out=r"(network\.load_state_dict\(.+\))",
        then="same(network)",
        make="model, network = torch.jit.trace(trained, x), network()",
    ),
}

EXAMPLES = {
    "pixels": Case(
        call="st.compress(Images(), rank, example_inputs=pixels)",
        error=ModelError,
        says=r"uint8 \[4, 3, 8, 8\]",
        then="st.compress(Images(), rank, example_inputs=pasted)",
        make="example_inputs = pixels",
    ),
    "pixels of NumPy, channels last": Case(
        call="st.compress(Images(), rank, example_inputs=example_inputs)",
        error=ModelError,
        says=r"uint8 \[4, 8, 8, 3\]",
        then="st.compress(Images(), rank, example_inputs=pasted)",
        make="example_inputs = pixels.movedim(1, -1).numpy()",
    ),
    "an array of doubles": Case(
        call="st.compress(trained, rank, example_inputs=example_inputs)",
        error=ModelError,
        says=r"float64 \[8, 12\]",
        then="st.compress(trained, rank, example_inputs=pasted)",
        make="example_inputs = x.double().numpy()",
    ),
    "one image without a batch": Case(
        call="st.compress(Images(), rank, example_inputs=images[0])",
        error=ModelError,
        says=r"float32 \[3, 8, 8\]",
        then="st.compress(Images(), rank, example_inputs=pasted)",
        make="example_inputs = images[0]",
    ),
    "images without their one channel": Case(
        call="st.compress(Images(channels=1), rank, example_inputs=images[:, 0])",
        error=ModelError,
        says=r"float32 \[4, 8, 8\]",
        then="assert pasted.shape == (4, 1, 8, 8)",
        make="example_inputs = images[:, 0]",
    ),
    "an example with its labels": Case(
        call="st.compress(trained, rank, example_inputs=(x, y))",
        error=ModelError,
        says=r"float32 \[8, 12\], int64 \[8\]",
        then="st.compress(trained, rank, example_inputs=pasted)",
        make="example_inputs = (x, y)",
    ),
    "an example by name with its labels": Case(
        call="st.measure(Named(), example_inputs, latency=False)",
        error=ModelError,
        says="labels=int64",
        then="st.measure(Named(), pasted, latency=False)",
        make="example_inputs = {'image': x, 'labels': y}",
    ),
    "one by a name that the network does not take": Case(
        call="st.compress(trained, rank, example_inputs=example_inputs)",
        error=ModelError,
        says="unexpected keyword argument 'pixels'",
        then="st.compress(trained, rank, example_inputs=pasted)",
        make="example_inputs = {'pixels': x, 'labels': y}",
    ),
    "50 percent": Case(
        call="st.Budget(macs=50)",
        error=RuleError,
        says="between 0 and 1",
        way_out=r": (Budget\(macs=0\.5\))$",
        then="assert pasted == st.Budget(macs=0.5)",
        make="Budget = st.Budget",
    ),
    "the whole network": Case(
        call="st.Budget(macs=1.0)",
        error=RuleError,
        says="between 0 and 1",
        way_out=r": (Budget\(macs=0\.5\))$",
        then="assert pasted == st.Budget(macs=0.5)",
        make="Budget = st.Budget",
    ),
    "a number in the place of a rule": Case(
        call="st.compress(trained, 0.5, example_inputs=x)",
        error=RuleError,
        says="not a rule",
        way_out=r"(Budget\(macs=0\.5\))",
        then="st.compress(trained, pasted, example_inputs=x)",
        make="Budget = st.Budget",
    ),
    "a device that is not there": Case(
        call="st.compress(trained, rank, example_inputs=x, device='gpu')",
        error=st.errors.EngineError,
        says="'gpu'",
        way_out=r"give ('cpu')",
        then="st.compress(trained, rank, example_inputs=x, device=pasted)",
    ),
    "a network that is compressed already": Case(
        call="st.compress(small, st.Budget(macs=0.5), example_inputs=x, data=[x])",
        error=RuleError,
        says="already a low-rank factor",
        way_out=r"(st\.merge\(model\))",
        then="st.compress(pasted, rank, example_inputs=x)",
        make="model = small = st.compress(trained, rank, example_inputs=x).model",
    ),
}

DATA = {
    "one whole tensor": Case(
        call="st.compress(trained, rank, example_inputs=x, data=data)",
        error=DataError,
        says=r"one Tensor, float32 \[8, 12\]",
        way_out=r"(data\.split\(64\))",
        then="st.compress(trained, rank, example_inputs=x, data=pasted)",
        make="data = x",
    ),
    "one whole array": Case(
        call="st.calibrate(trained, data)",
        error=DataError,
        says="one ndarray",
        way_out=r"(numpy\.array_split\(.+\))",
        then="st.calibrate(trained, pasted)",
        make="data = numpy.zeros((128, 12), numpy.float32)",
    ),
    "inputs and labels as two tensors": Case(
        call="st.accuracy(trained, data)",
        error=DataError,
        says="one batch",
        way_out=r"(\[data\])",
        then="st.accuracy(trained, pasted)",
        make="data = (x, y)",
    ),
    "one batch by name": Case(
        call="st.finetune(Named(), data, epochs=1)",
        error=DataError,
        says="one batch",
        way_out=r"(\[data\])",
        then="st.finetune(Named(), pasted, epochs=1)",
        make="data = {'image': x, 'labels': y}",
    ),
    "a data set": Case(
        call="st.compress(trained, rank, example_inputs=x, data=dataset)",
        error=DataError,
        says="single samples",
        way_out=r"(torch\.utils\.data\.DataLoader\(dataset, batch_size=64\))",
        then="st.compress(trained, rank, example_inputs=x, data=pasted)",
        make="dataset = torch.utils.data.TensorDataset(x, y)",
    ),
    "samples in the place of batches": Case(
        call="st.compress(trained, rank, example_inputs=x, data=data)",
        error=DataError,
        says="batch dimension is missing",
        way_out=r"(\[batch\[None\] for batch in data\])",
        then="st.compress(trained, rank, example_inputs=x, data=pasted)",
        make="data = list(x)",
    ),
    "pixels to calibrate with": Case(
        call="st.calibrate(Images(), [inputs])",
        error=DataError,
        says=r"uint8 \[4, 3, 8, 8\](?!.*labels=True)",
        then="st.calibrate(Images(), [pasted])",
        make="inputs = pixels.numpy()",
    ),
    "doubles as data": Case(
        call="st.compress(trained, rank, example_inputs=x, data=[inputs])",
        error=DataError,
        says=r"float64 \[8, 12\](?!.*labels=True)",
        then="st.compress(trained, rank, example_inputs=x, data=[pasted])",
        make="inputs = x.double()",
    ),
    "pairs to calibrate with": Case(
        call="st.calibrate(trained, [(x, y)])",
        error=DataError,
        says="pairs of inputs and labels",
        way_out=r"pass (labels=True)",
        then="st.calibrate(trained, [(x, y)], labels=labels)",
    ),
    "pixels with labels": Case(
        call="st.finetune(Images(), [(inputs, y[:4])], epochs=1)",
        error=ModelError,
        says="uint8",
        then="st.finetune(Images(), [(pasted, y[:4])], epochs=1)",
        make="inputs = pixels",
    ),
    "labels under another name": Case(
        call="st.finetune(Named(), data, epochs=1)",
        error=DataError,
        says="without labels",
        way_out=r": (\[\(.+ for batch in data\])",
        then="st.finetune(Named(), pasted, epochs=1); st.accuracy(Named(), pasted)",
        make="data = [{'image': x, 'target': y}]",
    ),
    "a model that takes the batch itself": Case(
        call="st.accuracy(Whole(), [(inputs, y)])",
        error=ModelError,
        says="image=float32",
        then="st.accuracy(Whole(), [(pasted, y)]); st.finetune(Whole(), [(pasted, y)], epochs=1)",
        make="inputs = {'image': x}",
    ),
    "labels as vectors": Case(
        call="st.accuracy(trained, [(x, labels)])",
        error=DataError,
        says=r"labels int64 \[8, 4\]",
        way_out=r"(labels\.argmax\(dim=1\))",
        then="st.accuracy(trained, [(x, pasted)])",
        make="labels = nn.functional.one_hot(y, 4)",
    ),
    "labels as a column": Case(
        call="st.accuracy(trained, [(x, labels)])",
        error=DataError,
        says=r"labels int64 \[8, 1\]",
        way_out=r"(labels\.flatten\(\))",
        then="st.accuracy(trained, [(x, pasted)])",
        make="labels = y[:, None]",
    ),
    "labels as fractions": Case(
        call="st.finetune(trained, [(x, labels)], epochs=1)",
        error=DataError,
        says=r"float32 \[8\]",
        way_out=r"(labels\.long\(\))",
        then="st.finetune(trained, [(x, pasted)], epochs=1)",
        make="labels = y.float()",
    ),
}

CASES = FILES | MODELS | EXAMPLES | DATA


def test_there_are_enough() -> None:
    assert len(CASES) >= 25


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
def test_the_way_out_works(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    case, scope = CASES[name], names()
    if "import transformers" in case.make:
        pytest.importorskip("transformers")
    exec(case.make, scope)
    with pytest.raises(case.error) as caught:
        exec(case.call, scope)
    message = str(caught.value)
    assert re.search(case.says, message), message
    assert "\n" not in message
    code = re.search(case.way_out, message)
    assert code, message
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(code[1], scope)
        exec(case.then, scope)


def run(code: str, scope: dict[str, Any]) -> None:
    """Statements, or an expression whose value is `pasted` afterwards."""
    try:
        expression = compile(code, "the message", "eval")
    except SyntaxError:
        exec(code, scope)
    else:
        scope["pasted"] = eval(expression, scope)
