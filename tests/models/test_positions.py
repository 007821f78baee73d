"""The number of positions is right if a text of that length runs, and one token more does not."""

import sys
from pathlib import Path

import pytest
import torch
import transformers

from rarefy.models.positions import num_positions

sys.path.insert(0, str(Path(__file__).parent))

import tiny

SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("model_class", "config_class", "expected"),
    [
        (transformers.BertModel, transformers.BertConfig, 40),
        (transformers.RobertaModel, transformers.RobertaConfig, 38),
        (transformers.MPNetModel, transformers.MPNetConfig, 38),
    ],
)
def test_a_text_of_so_many_tokens_runs_and_one_of_more_does_not(model_class, config_class, expected):
    model = model_class(config_class(**SIZES, max_position_embeddings=40, pad_token_id=1)).eval()
    assert num_positions(model) == expected
    with torch.no_grad():
        model(input_ids=torch.full((1, expected), 7))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, expected + 1), 7))


def test_rotary_models_have_what_their_configuration_says_and_others_no_limit():
    assert num_positions(tiny.llama()) == 64
    assert num_positions(tiny.t5()) is None
    assert num_positions(tiny.mlp()) is None
