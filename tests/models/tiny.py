"""Tiny random models of every kind that discovery and the block walk must get right."""

import torch
import transformers as tf
from torch import nn


def llama() -> nn.Module:
    config = tf.LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return _seeded(tf.LlamaForCausalLM, config)


def qwen2() -> nn.Module:
    config = tf.Qwen2Config(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return _seeded(tf.Qwen2ForCausalLM, config)


def gemma3() -> nn.Module:
    config = tf.Gemma3TextConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        max_position_embeddings=64,
    )
    return _seeded(tf.Gemma3ForCausalLM, config)


def gpt2() -> nn.Module:
    return _seeded(tf.GPT2LMHeadModel, tf.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2, n_positions=64))


def bert() -> nn.Module:
    config = tf.BertConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return _seeded(tf.BertModel, config)


def distilbert() -> nn.Module:
    config = tf.DistilBertConfig(vocab_size=99, dim=32, hidden_dim=48, n_layers=2, n_heads=4)
    return _seeded(tf.DistilBertModel, config)


def albert() -> nn.Module:
    config = tf.AlbertConfig(
        vocab_size=99,
        embedding_size=16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    return _seeded(tf.AlbertModel, config)


def t5() -> nn.Module:
    config = tf.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=2, num_heads=4)
    return _seeded(tf.T5ForConditionalGeneration, config)


def whisper() -> nn.Module:
    config = tf.WhisperConfig(
        vocab_size=99,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return _seeded(tf.WhisperForConditionalGeneration, config)


def resnet() -> nn.Module:
    config = tf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
    return _seeded(tf.ResNetForImageClassification, config)


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 16), nn.ReLU(),
        nn.Linear(16, 10),
    )  # fmt: skip


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(12, 20)
        self.fc2 = nn.Linear(20, 16)
        self.fc3 = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return MLP()


def torch_encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _seeded(model_class: type, config: object) -> nn.Module:
    torch.manual_seed(0)
    return model_class(config).eval()
