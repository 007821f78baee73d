"""Chunked attention against torch's own, and inside models against themselves."""

import pytest
import tiny
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rarefy.calibrate.attention import chunked_attention, fast_attention

IDS_NL = torch.randint(3, 99, (5, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("num_heads", "num_groups"), [(6, 2), (4, 4), (3, 1)])
# around the size of a chunk of queries
@pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 600])
def test_equals_the_fused_kernel(is_causal, num_heads, num_groups, length):
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(2, num_heads, length, 16, generator=generator)
    key, value = torch.randn(2, 2, num_groups, length, 16, generator=generator)
    expected = scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=0.3, enable_gqa=True)
    found = chunked_attention(query, key, value, scaling=0.3, is_causal=is_causal)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("num_groups", [1, 2, 6])
@pytest.mark.parametrize("length", [1, 255, 256, 257, 600])
def test_gradients_are_those_of_the_fused_kernel(is_causal, num_groups, length):
    generator = torch.Generator().manual_seed(length)
    shapes = (2, 6, length, 8), (2, num_groups, length, 8), (2, num_groups, length, 12)
    given = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    query, key, value = given
    output = chunked_attention(query, key, value, scaling=0.3, is_causal=is_causal)
    expected = scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=0.3, enable_gqa=True)
    ends = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    for found, own in zip(
        torch.autograd.grad(output, given, ends),
        torch.autograd.grad(expected.transpose(1, 2), given, ends),
        strict=True,
    ):
        torch.testing.assert_close(found, own, rtol=1e-9, atol=1e-10)


def test_gradients_of_some_arguments_alone():
    query, key, value = torch.randn(3, 1, 2, 5, 4)
    value.requires_grad_()
    chunked_attention(query, key, value, scaling=0.5, is_causal=True).sum().backward()
    assert value.grad is not None
    expected = torch.softmax((0.5 * query @ key.mT).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf), -1).sum(2)
    torch.testing.assert_close(value.grad, expected[..., None].expand_as(value))


def test_other_lengths_of_keys_and_widths_of_values():
    query, key, value = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 11, 8), torch.randn(2, 3, 11, 4)
    expected = scaled_dot_product_attention(query, key, value)
    found = chunked_attention(query, key, value, scaling=8**-0.5, is_causal=False)
    torch.testing.assert_close(found, expected.transpose(1, 2))


@pytest.mark.parametrize("build", [tiny.llama, tiny.gemma3, tiny.bert, tiny.distilbert, tiny.t5])
def test_models_give_the_same_outputs_and_the_setting_does_not_leak(build):
    model = build()
    fused = ALL_ATTENTION_FUNCTIONS["sdpa"]
    arguments = {"input_ids": IDS_NL} | ({"decoder_input_ids": IDS_NL[:, :5]} if build is tiny.t5 else {})
    with torch.no_grad():
        expected = model(**arguments)[0]
        with fast_attention():
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not fused
            torch.testing.assert_close(model(**arguments)[0], expected, rtol=1e-4, atol=1e-5)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is fused


def test_padding_is_still_masked():
    model = tiny.llama()
    mask = torch.ones_like(IDS_NL)
    mask[:, :4] = 0
    with torch.no_grad():
        expected = model(IDS_NL, attention_mask=mask).logits[:, 4:]
        with fast_attention():
            torch.testing.assert_close(model(IDS_NL, attention_mask=mask).logits[:, 4:], expected, rtol=1e-4, atol=1e-5)
