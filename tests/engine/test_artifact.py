"""The engine on packed layers, and in a process where nothing but its own dependencies can be imported."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rarefy.artifact import read_artifact, write_artifact
from rarefy.core.errors import DamagedFileError
from rarefy.core.grids import IntGrid, dequantize, fit_minmax, quantize
from rarefy.core.patterns import NM, Pattern, Unstructured
from rarefy.core.solution import Factors, Solution
from rarefy.engine import Engine
from rarefy.layouts import AnyLayout, pack

Models = Callable[[str], Any]  # name -> TinyModel of conftest.py
Rounding = Callable[[torch.nn.Module, tuple[torch.Tensor]], tuple[torch.Tensor]]


def packed(weight_OI: np.ndarray, pattern: Pattern | None, num_bits: int | None) -> AnyLayout:
    mask = None
    if isinstance(pattern, NM):
        mask = np.arange(weight_OI.shape[1])[None, :] % pattern.group < pattern.keep
        mask = np.broadcast_to(mask, weight_OI.shape).copy()
    elif pattern is not None:
        mask = np.abs(weight_OI) > np.quantile(np.abs(weight_OI), pattern.sparsity)
    if mask is not None:
        weight_OI = weight_OI * mask
    fitted = None
    if num_bits is not None:
        fitted = fit_minmax(weight_OI, IntGrid(num_bits, 32, False))
        weight_OI = dequantize(quantize(weight_OI, fitted), fitted)
        weight_OI = weight_OI if mask is None else weight_OI * mask
    return pack(Solution(weight_OI.astype(np.float32), mask, pattern, fitted))


def write_packed(
    source: Path, target: Path, layout_of: Callable[[str, np.ndarray], AnyLayout | None], **config: object
) -> dict[str, np.ndarray]:
    """Write a directory with packed linear layers; return the weights that it stands for."""
    artifact = read_artifact(source)
    layers: dict[str, AnyLayout] = {}
    tensors, dense = {}, {}
    for name in artifact.names():
        tensor = np.array(artifact.tensor(name))
        layout = layout_of(name, tensor) if tensor.ndim == 2 else None
        if layout is None:
            tensors[name] = tensor
        else:
            layers[name.removesuffix(".weight")] = layout
            dense[name] = layout.to_dense()
    tied = {"lm_head": "model.embed_tokens"} if artifact.config.get("tie_word_embeddings") else {}
    if "model.embed_tokens" not in layers:
        tied = {}
    write_artifact(
        target, config={**artifact.config, **config}, layers=layers, tied=tied, tensors=tensors, extra_files={}
    )
    return dense


def rounded_input(module: torch.nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """What integer kernels do to activations: 8 bits in blocks of 64 columns."""
    (x,) = arguments
    blocks = [b * (127 / b.abs().amax(-1, keepdim=True)) for b in x.split(64, dim=-1)]
    steps = [b.abs().amax(-1, keepdim=True) / 127 for b in x.split(64, dim=-1)]
    return (torch.cat([b.round() * step for b, step in zip(blocks, steps, strict=True)], dim=-1),)


def bfloat16_input(module: torch.nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """What bfloat16 kernels do to activations."""
    return (arguments[0].to(torch.bfloat16).float(),)


def expected_output(tiny: Any, dense: dict[str, np.ndarray], tokens: list[int], rounding: Rounding) -> np.ndarray:
    model = type(tiny.model)(tiny.model.config).eval()
    model.load_state_dict(tiny.model.state_dict())
    heads = {"lm_head.weight"} if "model.embed_tokens.weight" in dense and model.config.tie_word_embeddings else set()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and f"{name}.weight" in dense.keys() | heads:
                module.register_forward_pre_hook(rounding)
        for name, weight in dense.items():
            model.get_parameter(name).copy_(torch.from_numpy(weight))
        output = model(torch.tensor([tokens]))
    return (output.logits if hasattr(output, "logits") else output.last_hidden_state)[0].numpy()


def run(engine: Engine, tokens: list[int]) -> np.ndarray:
    return engine.logits(tokens) if engine.kind == "decoder" else engine.hidden_states([tokens])[0]


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "gemma3", "bert", "distilbert"])
@pytest.mark.parametrize(
    ("pattern", "num_bits"),
    [
        (Unstructured(0.5), None),
        (NM(2, 4), None),
        (None, 8),
        (None, 4),
        (None, 3),
        (None, 2),
        (Unstructured(0.5), 4),
        (NM(4, 8), 8),
    ],
)
def test_packed_layers(
    tiny_models: Models, tmp_path: Path, name: str, pattern: Pattern | None, num_bits: int | None
) -> None:
    tiny = tiny_models(name)

    def layout_of(tensor: str, weight: np.ndarray) -> AnyLayout | None:
        if "embed" in tensor:
            return packed(weight, pattern, num_bits) if "embed_tokens" in tensor else None
        return None if "lm_head" in tensor or "pooler" in tensor else packed(weight, pattern, num_bits)

    dense = write_packed(tiny.path, tmp_path / "out", layout_of)
    tokens = np.random.default_rng(0).integers(0, 97, 60).tolist()
    engine = Engine(tmp_path / "out")
    found, expected = (
        run(engine, tokens),
        expected_output(tiny, dense, tokens, bfloat16_input if num_bits is None else rounded_input),
    )
    # Where a value lies between two steps of 8 bits, the last bit of float32 decides, and the step is 1/127 of the
    # largest value, or 1/128 of itself: some differ, most do not.
    tolerance = 2e-3 if num_bits is None else 5e-3
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)
    assert np.median(np.abs(found - expected)) <= 1e-3 * np.abs(expected).max()
    assert engine.nbytes < Engine(tiny.path).nbytes


def factorized(weight_OI: np.ndarray, *, beside: bool) -> AnyLayout:
    u, s, vt = np.linalg.svd(weight_OI.astype(np.float64), full_matrices=False)
    factors = Factors((u[:, :8] * s[:8]).astype(np.float32), np.ascontiguousarray(vt[:8], np.float32))
    if not beside:
        return pack(Solution.low_rank(factors))
    rest_OI = weight_OI - factors.product_OI
    mask_OI = np.abs(rest_OI) > np.quantile(np.abs(rest_OI), 0.7)
    return pack(Solution(rest_OI * mask_OI, mask_OI, Unstructured(0.7), None, factors))


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("name", ["llama-tied", "llama", "bert"])
def test_a_factorized_embedding(tiny_models: Models, tmp_path: Path, name: str, beside: bool) -> None:
    tiny = tiny_models(name)

    def layout_of(tensor: str, weight: np.ndarray) -> AnyLayout | None:
        return factorized(weight, beside=beside) if "embed_tokens" in tensor or "word_embeddings" in tensor else None

    dense = write_packed(tiny.path, tmp_path / "out", layout_of)
    specs = read_artifact(tmp_path / "out").specs
    assert [spec.format_name for spec in specs.values()] == ["sum-v1" if beside else "lowrank-bf16-v1"]
    tokens = np.random.default_rng(0).integers(0, 97, 60).tolist()
    engine = Engine(tmp_path / "out")
    found, expected = run(engine, tokens), expected_output(tiny, dense, tokens, bfloat16_input)
    # What comes out of the first factor of the head is rounded too, by at most 2^-8.
    assert np.linalg.norm(found - expected) <= 2.0**-8 * np.linalg.norm(expected)
    assert engine.nbytes < Engine(tiny.path).nbytes


def test_a_damaged_layer_names_the_layer(tiny_models: Models, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_packed(
        tiny_models("llama").path,
        out,
        lambda tensor, weight: packed(weight, Unstructured(0.5), None) if "up_proj" in tensor else None,
    )
    file = read_artifact(out).files["model.layers.1.mlp.up_proj.mask"]
    offset = file.entries["model.layers.1.mlp.up_proj.mask"].offset
    content = bytearray((out / "model.safetensors").read_bytes())
    content[offset] ^= 1
    (out / "model.safetensors").write_bytes(bytes(content))
    with pytest.raises(DamagedFileError, match=r"model\.layers\.1\.mlp\.up_proj"):
        Engine(out)


ALONE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
import rarefy
engine = rarefy.Engine(sys.argv[1])
print(engine.generate("The small river", 8) if engine.kind == "decoder" else engine.embed("a").shape, end="")
if len(sys.argv) > 2:
    try:
        engine.generate([{{"role": "user", "content": "a"}}], 1)
    except rarefy.RarefyError as error:
        print("|", error, end="")
"""
BLOCKED = {
    "torch",
    "transformers",
    "typer",
    "rich",
    "jinja2",
    "pydantic",
    "scipy",
    "yaml",
    "accelerate",
    "huggingface_hub",
}


def run_alone(*arguments: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", ALONE.format(blocked=BLOCKED), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_runs_with_numpy_safetensors_and_tokenizers_alone(tiny_llama_dir: Path, tiny_bert_dir: Path) -> None:
    assert run_alone(str(tiny_llama_dir)) == Engine(tiny_llama_dir).generate("The small river", 8)
    assert run_alone(str(tiny_bert_dir)) == "(1, 64)"


def test_messages_without_jinja2_say_what_to_install(tiny_llama_dir: Path) -> None:
    assert "pip install jinja2" in run_alone(str(tiny_llama_dir), "chat").split("|")[-1]
