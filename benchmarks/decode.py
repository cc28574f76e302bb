"""Tokens per second that a decoder reads and writes with its cache, dense and compressed in turn in one process.

    python benchmarks/decode.py --dense SMOLLM2 --compressed SMALL --batch 1,8
    python benchmarks/decode.py --dense SMOLLM2 --compressed SMALL --batch 1 --compile
    python benchmarks/decode.py --dense SMOLLM2 --compressed SMALL --batch 1 --runtime openvino

Both are folders of Hugging Face. A prompt of random tokens is read in one pass (prefill), and tokens are written after
it one by one, the likeliest of each step (decode). `products` are as many steps of nothing but torch's products with
the weights, which decoding in torch cannot be faster than unless it is compiled. Ratios are compressed over dense, of
paired rounds, with their 95 % interval; one thread. With `--compile` steps are compiled by torch, and the cache has a
fixed length; it takes minutes. `--runtime` measures decoding in ONNX Runtime or OpenVINO as well; these are given keys
and values as tensors, and have to write the tokens that torch writes.
"""

import argparse
import copy
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import StaticCache

from spectrim.layers.caches import bytes_per_token
from spectrim.models.folders import load_pretrained
from spectrim.runtimes.timing import Timing, compare, interleaved, medians_ms, pass_timer

PHASES = ("prefill", "decode", "products")


class Products(TorchFunctionMode):
    """Inputs, weight and bias of every linear layer that is called within this."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is functional.linear:
            self.calls.append(tuple(args))
        return function(*args, **(kwargs or {}))

    def repeat(self, times: int) -> None:
        """Multiply again."""
        for _ in range(times):
            for call in self.calls:
                functional.linear(*call)


class Decoder:
    """A model after a prompt, with a cache for so many tokens in all if its steps are compiled."""

    def __init__(self, model: nn.Module, prompt: Tensor, *, compiled_for: int | None = None) -> None:
        self.model, self.prompt = model.eval(), prompt
        self.step = model if compiled_for is None else torch.compile(model, dynamic=False)
        cache = None if compiled_for is None else StaticCache(config=model.config, max_cache_len=compiled_for)
        outputs = self.read() if cache is None else model(prompt, past_key_values=cache)
        self.bytes_per_token = bytes_per_token(outputs)
        # the name of the cache depends on the version of transformers
        self.name = next(name for name, value in outputs.items() if hasattr(value, "get_seq_length"))
        self.after, self.first = outputs[self.name], outputs.logits[:, -1:].argmax(dim=-1)
        self.renew()

    def read(self) -> Any:
        """One pass of the prompt."""
        return self.model(self.prompt, use_cache=True, logits_to_keep=1)

    def renew(self) -> None:
        """Go back to the end of the prompt."""
        self.cache = copy.deepcopy(self.after)

    def write(self, length: int) -> list[Tensor]:
        """So many tokens."""
        tokens = [self.first]
        for _ in range(length):
            outputs = self.step(tokens[-1], use_cache=True, **{self.name: self.cache})
            tokens.append(outputs.logits[:, -1:].argmax(dim=-1))
        return tokens[1:]

    def timer(self, phase: str, length: int) -> Callable[[], Timing]:
        """Times a phase."""
        if phase in RUNTIMES:
            step = RUNTIMES[phase](self)
            require_same_tokens(self, step, length)
            return pass_timer(lambda: list(step.tokens(length)), cpu=True)
        if phase == "prefill":
            return pass_timer(self.read, cpu=True)
        if phase == "products":
            self.renew()
            with Products() as products:
                self.model(self.first, use_cache=True, **{self.name: self.cache})
            return pass_timer(lambda: products.repeat(length), cpu=True)
        return pass_timer(lambda: self.write(length), cpu=True, between=self.renew)


class Step(nn.Module):
    """A step of one token, which is given keys and values as tensors, and gives them one token longer."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.model, self.name, self.cache = decoder.model, decoder.name, copy.deepcopy(decoder.after)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Keys and values of every layer."""
        return tuple(part for layer in self.cache.layers for part in (layer.keys, layer.values))

    def forward(self, token: Tensor, position: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The next token, and keys and values."""
        for layer, keys, values in zip(self.cache.layers, tensors[::2], tensors[1::2], strict=True):
            layer.keys, layer.values = keys, values
        outputs = self.model(token, position_ids=position, use_cache=True, **{self.name: self.cache})
        return outputs.logits[:, -1:].argmax(dim=-1), *self.tensors


class RuntimeStep(ABC):
    """The same in another runtime."""

    def __init__(self, decoder: Decoder) -> None:
        step = Step(decoder).eval()
        self.first, self.length = decoder.first, decoder.prompt.shape[1]
        self.before = tuple(part.contiguous() for part in step.tensors)
        self.prepare(step, (self.first, torch.full_like(self.first, self.length), *self.before))

    @abstractmethod
    def prepare(self, step: Step, example: tuple[Tensor, ...]) -> None:
        """Convert it."""

    @abstractmethod
    def tokens(self, length: int) -> Iterator[int]:
        """So many tokens after the prompt, of the first sample."""


class OpenVinoStep(RuntimeStep):
    """In OpenVINO, in float32; two requests take turns, so that one reads what the other has written."""

    def prepare(self, step: Step, example: tuple[Tensor, ...]) -> None:
        """Convert it."""
        traced = torch.jit.trace(step, example, check_trace=False)
        options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.compile_model(openvino.convert_model(traced, example_input=example), "CPU", options)
        self.requests = [compiled.create_infer_request() for _ in range(2)]

    def tokens(self, length: int) -> Iterator[int]:
        """So many tokens after the prompt, of the first sample."""
        outputs: list[Any] = [part.numpy() for part in (self.first, *self.before)]
        for place, request in zip(range(self.length, self.length + length), cycle(self.requests), strict=False):
            position = np.full_like(self.first.numpy(), place)
            results = request.infer([outputs[0], position, *outputs[1:]], share_inputs=True, share_outputs=True)
            outputs = [results[number] for number in range(len(outputs))]
            yield int(outputs[0][0, 0])


class OnnxStep(RuntimeStep):
    """In ONNX Runtime; values stay where it has put them."""

    def prepare(self, step: Step, example: tuple[Tensor, ...]) -> None:
        """Convert it."""
        shapes = ({}, {}, tuple({2: torch.export.Dim("before")} for _ in self.before))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "step.onnx"
            torch.onnx.export(
                step, example, path, dynamo=True, dynamic_shapes=shapes, external_data=True, verbose=False
            )
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.names = [
            [part.name for part in parts] for parts in (self.session.get_inputs(), self.session.get_outputs())
        ]

    def tokens(self, length: int) -> Iterator[int]:
        """So many tokens after the prompt, of the first sample."""
        value = onnxruntime.OrtValue.ortvalue_from_numpy
        outputs = [value(part.numpy()) for part in (self.first, *self.before)]
        for place in range(self.length, self.length + length):
            position = value(np.full_like(self.first.numpy(), place))
            inputs = dict(zip(self.names[0], (outputs[0], position, *outputs[1:]), strict=True))
            outputs = self.session.run_with_ort_values(self.names[1], inputs)
            yield int(outputs[0].numpy()[0, 0])


RUNTIMES: dict[str, type[RuntimeStep]] = {"openvino": OpenVinoStep, "onnxruntime": OnnxStep}


def require_same_tokens(decoder: Decoder, step: RuntimeStep, length: int) -> None:
    """Stop where a runtime writes other tokens than torch."""
    decoder.renew()
    expected, written = [int(token[0, 0]) for token in decoder.write(length)], list(step.tokens(length))
    if written != expected:
        raise SystemExit(f"{type(step).__name__} writes tokens {written}, and torch {expected}")


def main() -> None:
    """Print a line for every batch size and phase."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", required=True)
    parser.add_argument("--compressed", required=True)
    parser.add_argument("--batch", default=(1, 8), type=lambda text: tuple(map(int, text.split(","))))
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=8, help="tokens that are written")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="compile the steps")
    parser.add_argument("--runtime", choices=tuple(RUNTIMES), help="decode in this runtime as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models = [load_pretrained(folder) for folder in (arguments.compressed, arguments.dense)]
    table = Table("batch", "phase", "dense, tokens/s", "compressed, tokens/s", "ratio", "95 % interval", "verdict")
    with torch.inference_mode():
        for batch in arguments.batch:
            vocabulary = min(model.config.vocab_size for model in models)
            prompt = torch.randint(vocabulary, (batch, arguments.prompt), generator=torch.Generator().manual_seed(0))
            whole = arguments.prompt + arguments.tokens + 1
            decoders = [Decoder(model, prompt, compiled_for=whole if arguments.compile else None) for model in models]
            for phase in (*PHASES, *([arguments.runtime] if arguments.runtime else [])):
                runs = [decoder.timer(phase, arguments.tokens) for decoder in decoders]
                own, reference = interleaved(runs, rounds=arguments.rounds)
                compared, tokens = compare(own, reference), arguments.prompt if phase == "prefill" else arguments.tokens
                small, dense = (f"{1e3 * batch * tokens / ms:.1f}" for ms in medians_ms(own, reference))
                ratio = compared.ratio
                bounds = f"{ratio.low:.2f} to {ratio.high:.2f}"
                table.add_row(str(batch), phase, dense, small, f"{ratio.value:.2f}", bounds, compared.verdict)
    Console(width=110).print(table)
    small, dense = (decoder.bytes_per_token for decoder in decoders)
    print(f"cache of a token: {dense:,} bytes dense, {small:,} compressed ({small / dense:.1%})")


if __name__ == "__main__":
    main()
