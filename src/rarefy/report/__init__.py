"""What users read after a run: HTML page, model card and terminal verdict, all from one RunReport."""

from rarefy.report.html import render_html
from rarefy.report.model_card import render_model_card
from rarefy.report.terminal import render_verdict

__all__ = ["render_html", "render_model_card", "render_verdict"]
