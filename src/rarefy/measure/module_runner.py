"""A model under transformers, ready to be timed. The engine's counterpart is in `rarefy.measure.runners`."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch

from rarefy.core.errors import UnsupportedModelError
from rarefy.measure.latency import check_output
from rarefy.measure.opening import open_with_transformers
from rarefy.measure.runners import Kind


def open_module_runner(model: str | Path, dtype: str, num_threads: int | None) -> "ModuleRunner":
    """Load a model to be timed, computing in "float32" or "bfloat16"."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    return ModuleRunner(open_with_transformers(model, dtype=getattr(torch, dtype)).model)


@final
class ModuleRunner:
    """A transformers model on the CPU: a decoder or an encoder."""

    def __init__(self, model: Any) -> None:
        self._model = model
        config = model.config
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError(type(model).__name__, "an encoder-decoder", allowed="a decoder or an encoder")
        self.kind: Kind = "decoder" if model.can_generate() else "encoder"
        # The time of a classification head or a masked-language-model head is not the encoder's.
        if self.kind == "encoder":
            self._model = getattr(model, model.base_model_prefix, model)
        self.vocabulary_size = int(config.get_text_config().vocab_size)

    def cast(self, dtype: str) -> None:
        """Compute in "float32" or "bfloat16" from now on; buffers (rotary frequencies) stay as they are."""
        for parameter in self._model.parameters():
            parameter.data = parameter.data.to(getattr(torch, dtype))

    def decode(self, prompt: list[int], num_tokens: int) -> Mapping[str, float]:
        """Process a prompt, then generate greedily."""
        with torch.inference_mode():
            start = time.perf_counter()
            output = self._model(input_ids=torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
            middle = time.perf_counter()
            for _ in range(num_tokens):
                token = output.logits[:, -1:].argmax(-1)
                output = self._model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
            end = time.perf_counter()
        check_output(type(self._model).__name__, output.logits.float().numpy())
        return {"prompt": middle - start, "decode": end - middle}

    def encode(self, batch: list[list[int]]) -> Mapping[str, float]:
        """Encode a batch."""
        ids_BT = torch.tensor(batch)
        with torch.inference_mode():
            start = time.perf_counter()
            hidden = self._model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).last_hidden_state
            end = time.perf_counter()
        check_output(type(self._model).__name__, hidden.float().numpy())
        return {"encode": end - start}
