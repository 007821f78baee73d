"""A synthetic report of realistic shape: 30 blocks of 7 layers. No figure in it was measured."""

import math
from dataclasses import replace

import pytest

from rarefy.core.results import CalibrationInfo, LayerResult, Metric, RunReport, Spread, UntouchedLayer

SHAPES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}


def build_report(num_blocks: int = 30) -> RunReport:
    layers: list[LayerResult] = []
    for block in range(num_blocks):
        for index, (role, (rows, columns)) in enumerate(SHAPES.items()):
            num_weights = rows * columns
            packed = num_weights // 8 + num_weights // 4 + rows * -(-columns // 64) * 3
            error = (0.012 + 0.004 * index) * (1 + 0.03 * block) * (1.3 + math.sin(block * 1.7 + index))
            layers.append(
                LayerResult(
                    name=f"model.layers.{block}.{role}",
                    shape=(rows, columns),
                    format="bitmask-int4-v1",
                    steps=("sparsegpt",),
                    sparsity=0.5,
                    num_bits=4,
                    group_size=64,
                    bits_per_weight=packed * 8 / num_weights,
                    error=error,
                    error_metric="output",
                    dense_bytes=num_weights * 2,
                    packed_bytes=packed,
                    seconds=0.2 + 0.1 * index,
                )
            )
    norms = tuple(
        UntouchedLayer(
            f"model.layers.{block}.{which}", "LlamaRMSNorm", (576,), 2304, "one-dimensional: nothing to gain"
        )
        for block in range(num_blocks)
        for which in ("input_layernorm", "post_attention_layernorm")
    )
    head = UntouchedLayer(
        "model.embed_tokens",
        "Embedding",
        (49152, 576),
        49152 * 576 * 2,
        "no step of the recipe targets it; tied with lm_head",
    )

    def metric(name: str, unit: str, higher: bool, before: float, after: float, runs: int = 1, how: str = "") -> Metric:
        width = 0.03 if runs > 1 else 0.0
        sides = [Spread(v, v * (1 - width), v * (1 + width), runs) for v in (before, after)]
        return Metric(name, unit, higher, sides[0], sides[1], how)

    return RunReport(
        model="SmolLM2-135M-Instruct.Q4_1.gguf",
        architecture="LlamaForCausalLM",
        num_parameters=134_515_008,
        num_blocks=num_blocks,
        recipe={
            "steps": [
                {
                    "method": "sparsegpt",
                    "pattern": {"sparsity": 0.5},
                    "values": {"num_bits": 4, "group_size": 64, "symmetric": False},
                }
            ],
            "rest_dtype": "bfloat16",
        },
        seed=0,
        calibration=CalibrationInfo("wikitext-2/valid.txt", 128, 512, 65536, "windows drawn with seed 0"),
        machine={
            "cpu": "Example CPU 3000 @ 2.0 GHz",
            "num_cores": 2,
            "memory_bytes": 24_000_000_000,
            "isa": "avx512 vnni vbmi2",
        },
        versions={"rarefy": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "numpy": "2.4.6", "python": "3.11.7"},
        layers=tuple(layers),
        untouched=(head, *norms),
        metrics=(
            metric("disk_bytes", "bytes", False, 269_060_552, 98_400_000, how="every file of the directory, summed"),
            metric(
                "perplexity", "", False, 26.04, 41.87, how="60 windows of 512 tokens of wikitext-2/test.txt, stride 512"
            ),
            metric(
                "decode_tokens_per_s",
                "tokens/s",
                True,
                18.2,
                96.4,
                runs=5,
                how="64 tokens after a prompt of 64, 2 threads",
            ),
            metric("prompt_tokens_per_s", "tokens/s", True, 512.0, 498.0, runs=5, how="128 tokens, 2 threads"),
            metric(
                "peak_memory_bytes",
                "bytes",
                False,
                812_000_000,
                240_000_000,
                how="largest resident set of a fresh process",
            ),
        ),
        warnings=(),
        seconds={"load": 4.1, "calibration": 2.2, "compress": 96.0, "measure": 74.0, "write": 0.6},
        peak_memory_bytes=1_400_000_000,
    )


@pytest.fixture
def report() -> RunReport:
    return build_report()


@pytest.fixture
def hostile_report() -> RunReport:
    """Every text that a checkpoint's author can choose carries markup."""
    evil = "<script>alert(1)</script>\"'&|`\n# x"
    plain = build_report(2)
    return replace(
        plain,
        model=evil,
        architecture=evil,
        recipe={evil: evil + "```"},
        calibration=CalibrationInfo(evil, 1, 2, 2, evil),
        machine={evil: evil},
        versions={evil: evil},
        layers=(replace(plain.layers[0], name=evil, format=evil, steps=(evil,)),),
        untouched=(UntouchedLayer(evil, evil, (1,), 4, evil),),
        metrics=tuple(replace(metric, name=evil, how=evil) for metric in plain.metrics),
        warnings=(evil,),
        seconds={evil: 1.0},
    )
