import math
from dataclasses import replace

import pytest

from rarefy.core.results import NATS, CalibrationInfo, Metric, PairedDifference, RunReport, Spread, UntouchedLayer
from rarefy.report import facts


def metric(name: str, unit: str, higher: bool, before: tuple[float, ...], after: tuple[float, ...]) -> Metric:
    sides = [
        None if not values else Spread(sorted(values)[len(values) // 2], min(values), max(values), len(values))
        for values in (before, after)
    ]
    return Metric(name, unit, higher, sides[0], sides[1], "")


@pytest.mark.parametrize(
    ("subject", "outcome", "text"),
    [
        (metric("disk_bytes", "bytes", False, (200.0,), (50.0,)), "better", "4.0x smaller"),
        (metric("disk_bytes", "bytes", False, (50.0,), (60.0,)), "worse", "1.20x larger"),
        (
            metric("decode_tokens_per_s", "tokens/s", True, (10.0, 11.0, 12.0), (54.0, 55.0, 56.0)),
            "better",
            "5.0x faster",
        ),
        (metric("decode_tokens_per_s", "tokens/s", True, (20.0,), (10.0,)), "worse", "2.0x slower"),
        (metric("latency", "ms", False, (20.0,), (10.0,)), "better", "2.0x faster"),
        (
            metric("decode_tokens_per_s", "tokens/s", True, (9.0, 10.0, 13.0), (12.0, 14.0, 15.0)),
            "same",
            "no measurable change",
        ),
        (metric("perplexity", "", False, (20.0,), (30.0,)), "worse", "+50 %"),
        (metric("perplexity", "", False, (20.0,), (20.01,)), "same", "unchanged"),
        (metric("accuracy", "fraction", True, (0.9,), (0.85,)), "worse", "-5.0 points"),
        (metric("sts_spearman", "", True, (0.82,), (0.8,)), "worse", "-0.0200"),
        (metric("perplexity", "", False, (20.0,), (math.nan,)), "worse", "not finite"),
        (metric("perplexity", "", False, (20.0,), ()), "unknown", ""),
    ],
)
def test_a_change_is_judged_and_worded(subject: Metric, outcome: str, text: str) -> None:
    change = facts.change_of(subject)
    assert (change.outcome, change.text) == (outcome, text)


@pytest.mark.parametrize(
    ("higher_is_better", "after", "paired", "outcome", "text"),
    [
        # 3.8 % of perplexity is far inside of both spreads. It is a loss if it was one in nearly every window ...
        (False, 27.0, PairedDifference(math.log(27 / 26), 0.004, 8, NATS), "worse", "+3.8 % ± 0.42 %"),
        # ... and no finding if it was not.
        (
            False,
            27.0,
            PairedDifference(math.log(27 / 26), 0.02, 8, NATS),
            "same",
            "no measurable change (+3.8 % ± 2.1 %)",
        ),
        (False, 25.0, PairedDifference(math.log(25 / 26), 0.004, 8, NATS), "better", "-3.8 % ± 0.38 %"),
        (False, 26.001, PairedDifference(math.log(26.001 / 26), 1e-6, 8, NATS), "same", "unchanged"),
        (True, 25.9, PairedDifference(-0.1, 0.01, 8, ""), "worse", "-0.1000 ± 0.0100"),
        (True, 25.9, PairedDifference(-0.1, 0.05, 8, ""), "same", "no measurable change (-0.1000 ± 0.0500)"),
        # Too few examples for pairs: what there is decides.
        (False, 27.0, None, "worse", "+3.8 %"),
    ],
)
def test_quality_is_judged_by_the_difference_on_the_same_examples(
    higher_is_better: bool, after: float, paired: PairedDifference | None, outcome: str, text: str
) -> None:
    spreads = Spread(26.0, 22.6, 29.4, 8), Spread(after, after - 3, after + 3, 8)
    change = facts.change_of(Metric("x", "", higher_is_better, *spreads, "", paired))
    assert (change.outcome, change.text) == (outcome, text)


def test_what_stands_behind_a_sign_is_explained_where_it_is_used(report: RunReport) -> None:
    assert facts.paired_note(report) == ""
    metrics = (*report.metrics, Metric("x", "", True, None, None, "", PairedDifference(0.1, 0.2, 8, "")))
    assert "each of the same 8 held-out examples" in facts.paired_note(replace(report, metrics=metrics))


def test_every_metric_that_got_worse_has_a_plain_warning(report: RunReport) -> None:
    assert facts.warnings(report) == (
        "The result is less accurate than the input: perplexity went 26.04 to 41.87 (+60.8 %).",
    )
    slow = metric("decode_tokens_per_s", "tokens/s", True, (20.0,), (10.0,))
    large = metric("disk_bytes", "bytes", False, (1e6,), (2e6,))
    told = facts.warnings(replace(report, metrics=(slow, large), warnings=("Own.", "Own.")))
    assert told == (
        "Own.",
        "The result is larger than the input: size on disk went 1.00 MB to 2.00 MB (2.0x larger).",
        "The result is slower than the input: decode speed went 20.00 to 10.00 tokens/s (2.0x slower).",
    )


def test_the_headline_names_every_measured_change_and_invents_none(report: RunReport) -> None:
    assert facts.headline(report) == (
        "2.7x smaller on disk, 5.3x faster at generating, prompt speed unchanged, perplexity 26.04 to 41.87"
    )
    assert "not measured" in facts.headline(replace(report, metrics=()))


def test_totals_are_weighted_by_the_number_of_weights(report: RunReport) -> None:
    small = replace(report.layers[0], shape=(1, 10), sparsity=1.0, dense_bytes=20, packed_bytes=10)
    large = replace(report.layers[0], shape=(3, 10), sparsity=0.0, dense_bytes=60, packed_bytes=30)
    total = facts.totals(replace(report, layers=(small, large)))
    assert total == facts.Totals(2, 40, 80, 40, 0.25, 8.0)
    assert facts.totals(replace(report, layers=())).bits_per_weight == 0.0


def test_untouched_layers_are_grouped_with_the_heaviest_first() -> None:
    layers = [
        UntouchedLayer("a.norm", "norm", (4,), 16, "small"),
        UntouchedLayer("embed", "embedding", (9, 4), 144, "not targeted"),
        UntouchedLayer("b.norm", "norm", (4,), 16, "small"),
    ]
    groups = facts.group_untouched(layers)
    assert [(group.kind, group.names, group.num_bytes) for group in groups] == [
        ("embedding", ("embed",), 144),
        ("norm", ("a.norm", "b.norm"), 32),
    ]


def test_commands_to_repeat_are_safe_to_paste(report: RunReport) -> None:
    commands = facts.repeat_commands(replace(report, model="my models/x; rm -rf $HOME"))
    assert commands[0].startswith("rarefy compress 'my models/x; rm -rf $HOME' -o OUT-again")
    assert "--calibration wikitext-2/valid.txt --samples 128 --sequence-length 512 --seed 0" in commands[0]
    assert "--metric perplexity" in commands[-1]


def test_a_run_on_inputs_from_python_has_no_shell_commands(report: RunReport) -> None:
    given = CalibrationInfo("example inputs given by the caller", 4, 0, 32, "")
    assert facts.repeat_commands(replace(report, calibration=given)) == ()
    assert facts.samples_text(given) == "4 batches of example inputs"
    built_in = CalibrationInfo("built-in: the language reference", 4, 32, 128, "")
    assert "--calibration" not in facts.repeat_commands(replace(report, calibration=built_in))[0]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.up_proj", (3, "mlp.up_proj")),
        ("encoder.layer.11.attention.self.query", (11, "attention.self.query")),
        ("lm_head", None),
        ("fc.2", None),
        ("x.²3.y", None),
    ],
)
def test_split_block(name: str, place: tuple[int, str] | None) -> None:
    assert facts.split_block(name) == place
