"""The three renderings: complete, self-contained, and deaf to hostile names."""

import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

from rarefy.core.results import NATS, PairedDifference, RunReport
from rarefy.report import facts, render_html, render_model_card, render_verdict
from rarefy.report.charts import error_heatmap, layer_strips, nice_ceiling

VOID = {"meta", "input", "br", "link", "img"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in {"script", "style"}:
            self.text.append(data)


def verdict_text(report: RunReport, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(render_verdict(report))
    return out.getvalue()


def test_the_page_shows_every_fact_of_the_run(report: RunReport) -> None:
    page = Page(render_html(report))
    text = " ".join(page.text)
    for layer in report.layers:
        assert layer.name in text
    for expected in (
        "98.4 MB",
        "41.87",
        "5.3x faster",
        "no step of the recipe targets it",
        "avx512 vnni",
        "1 min 36 s",
    ):
        assert expected in text
    assert "sparsegpt" in text
    assert len([tag for tag, _ in page.tags if tag == "tr"]) == 1 + len(report.layers) + 1 + 2


def test_the_page_asks_for_nothing_from_outside(report: RunReport) -> None:
    page = render_html(report)
    assert not re.search(r"https?://|url\(|@import|//[a-z]", page.replace("// Sorting", ""))
    assert not [tag for tag, attrs in Page(page).tags if attrs.get("src") or attrs.get("href")]


def test_hostile_texts_stay_texts(hostile_report: RunReport) -> None:
    page = Page(render_html(hostile_report))
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not [attrs for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert "<script>alert(1)</script>" in " ".join(page.text)


def test_hostile_texts_cannot_leave_their_place_in_the_card(hostile_report: RunReport) -> None:
    card = render_model_card(hostile_report)
    before_code, _, code = card.partition("````json")
    assert code, "the fence must be longer than the backticks inside"
    assert "<script>" not in before_code
    assert not [line for line in before_code.splitlines() if line.startswith("# x")]


def test_the_verdict_drives_no_terminal(hostile_report: RunReport) -> None:
    evil = "\x1b[2J\x07evil"
    text = verdict_text(replace(hostile_report, warnings=(evil,), notes=(evil,)))
    assert text.count("evil") >= 2
    assert "\x1b" not in text
    assert "\x07" not in text


def test_notes_are_told_and_are_no_warnings(report: RunReport) -> None:
    noted = replace(report, notes=("step 1: 20 % to <80> % zeros",))
    assert "note: step 1" in verdict_text(noted)
    assert "> **Note:** step 1" in render_model_card(noted)
    assert '<p class="note">step 1: 20 % to &lt;80&gt; % zeros</p>' in render_html(noted)
    assert RunReport.from_json(noted.to_json()) == noted
    assert "20 %" not in "".join(facts.warnings(noted))


def test_the_verdict_fits_80_columns_and_names_all(report: RunReport) -> None:
    text = verdict_text(report)
    assert max(map(len, text.splitlines())) <= 80
    for expected in (
        "269 MB",
        "98.4 MB",
        "2.7x smaller",
        "26.04",
        "41.87",
        "warning:",
        "60 LlamaRMSNorm",
        "and 57 more",
    ):
        assert expected in text


def test_every_reader_is_told_how_quality_was_judged(report: RunReport) -> None:
    paired = PairedDifference(math.log(41.87 / 26.04), 0.02, 8, NATS)
    judged = [replace(metric, paired=paired) if metric.name == "perplexity" else metric for metric in report.metrics]
    for render in (render_html, render_model_card, verdict_text):
        assert "±" not in render(report)
        text = " ".join(render(replace(report, metrics=tuple(judged))).split())
        assert "+60.8 % ± 3.2 %" in text
        assert "is its standard error, and what is within two of them is no measurable change" in text


def test_a_report_without_layers_or_metrics_renders(report: RunReport) -> None:
    empty = replace(report, layers=(), untouched=(), metrics=(), calibration=None)
    assert "No layer was compressed" in render_html(empty)
    assert "Untouched: none." in verdict_text(empty)
    assert render_model_card(empty).startswith("---\n")


def test_non_finite_figures_render(report: RunReport) -> None:
    broken = replace(report, layers=(replace(report.layers[0], error=float("nan")), *report.layers[1:]))
    page = render_html(broken)
    assert "not finite" in page
    assert 'NaN"' not in page


def test_reports_survive_json(report: RunReport) -> None:
    again = RunReport.from_json(json.loads(json.dumps(report.to_json())))
    assert render_html(again) == render_html(report)


def test_model_card_front_matter_and_loading_code(report: RunReport) -> None:
    card = render_model_card(report)
    assert re.match(r"---\nlibrary_name: rarefy\ntags:\n(- \w+\n)+pipeline_tag: text-generation\n---\n", card)
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert "rarefy embed" in render_model_card(replace(report, architecture="BertModel"))


def test_bars_have_the_heights_of_their_values(report: RunReport) -> None:
    half = [replace(layer, sparsity=0.25) for layer in report.layers[:2]]
    first = re.search(r'class="bars" d="M[\d.]+ [\d.]+v-([\d.]+)', layer_strips(half))
    assert first is not None
    # a quarter of the strip's 78 units, the axis of a sparsity being 0 to 100 %
    assert float(first.group(1)) == pytest.approx(19.5)


def test_one_huge_layer_does_not_flatten_the_others(report: RunReport) -> None:
    huge = replace(report.layers[0], name="embed", dense_bytes=10**9, packed_bytes=10**9)
    page = layer_strips([huge, *report.layers])
    assert page.count('class="cut"') == 1
    assert "1 bar is cut" in page
    assert "cut" not in layer_strips(report.layers)


def test_heatmap_needs_blocks(report: RunReport) -> None:
    assert error_heatmap(report.layers).count('class="cell"') == len(report.layers)
    assert error_heatmap([replace(report.layers[0], name="fc1")]) == ""


@pytest.mark.parametrize(
    ("value", "ceiling"), [(0.15, 0.2), (3.375, 4), (8, 8), (1, 1), (0, 1), (1.77e6, 2e6), (96, 100)]
)
def test_axes_end_on_round_numbers(value: float, ceiling: float) -> None:
    assert nice_ceiling(value) == pytest.approx(ceiling)
