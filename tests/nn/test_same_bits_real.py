"""SmolLM2 with int4 layers, and with half of the weights pruned too: transformers and the engine give the same bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rarefy import Engine
from rarefy.run import compress

pytestmark = pytest.mark.slow

INT4 = {"num_bits": 4, "group_size": 64, "symmetric": False}
INT8 = {"num_bits": 8, "group_size": 64, "symmetric": False}
ROUNDED = [{"method": "rtn", "values": INT4}]
PRUNED = [{"method": "magnitude", "pattern": {"sparsity": 0.5}}, *ROUNDED]
EMBEDDING = [{"method": "rtn", "targets": ["model.embed_tokens"], "values": INT8}]


@pytest.fixture(scope="module")
def compressed(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[Any]], Path]:
    """Compress SmolLM2 by steps that need no calibration."""

    def compressed(steps: list[Any]) -> Path:
        out = tmp_path_factory.mktemp("smollm2") / "out"
        compress(smollm2_gguf, {"steps": steps}, out=out, samples=2, sequence_length=64, measure=False)
        return out

    return compressed


@pytest.mark.parametrize("steps", [[*ROUNDED, *EMBEDDING], [*PRUNED, *EMBEDDING]], ids=["int4", "sparse-50-int4"])
@torch.no_grad()
def test_every_layer_compressed(compressed: Callable[[list[Any]], Path], steps: list[Any]) -> None:
    path = compressed(steps)
    model, engine = AutoModelForCausalLM.from_pretrained(path), Engine(path)
    text = "The river Rhine rises in the Swiss Alps, passes Basel and Cologne, and flows north. " * 40
    tokens = AutoTokenizer.from_pretrained(path)(text)["input_ids"][:512]
    assert len(tokens) == 512
    assert np.array_equal(model(torch.tensor([tokens])).logits[0].numpy(), engine.logits(tokens))
    prompt = tokens[:30]
    new = model.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False)[0, 30:].tolist()
    assert list(engine.stream_tokens(prompt, 32)) == [token for token in new if token not in engine.eos_tokens]


@torch.no_grad()
def test_a_dense_head_adds_nothing_but_its_own_rounding(compressed: Callable[[list[Any]], Path]) -> None:
    """The head stays with torch where it is not compressed; what it multiplies still has the same bits.

    The engine multiplies it as it is stored, in bfloat16, and rounds what it meets (ADR 0025).
    """
    path = compressed(ROUNDED)
    model, engine = AutoModelForCausalLM.from_pretrained(path), Engine(path)
    assert type(model.lm_head) is torch.nn.Linear
    model.lm_head.register_forward_pre_hook(lambda _, arguments: (arguments[0].bfloat16().float(),))
    tokens = engine.tokenizer.encode("The river Rhine rises in the Swiss Alps and flows north. " * 20).ids
    got, expected = model(torch.tensor([tokens])).logits[0].numpy(), engine.logits(tokens)
    # sums of 576 products in two orders
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
