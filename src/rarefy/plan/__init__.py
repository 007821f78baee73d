"""What a run will do, take and give, before it starts."""

from rarefy.plan.cost import Rates, measure_rates
from rarefy.plan.make import make_plan
from rarefy.plan.records import Plan, PlannedLayer, UntouchedRow

__all__ = ["Plan", "PlannedLayer", "Rates", "UntouchedRow", "make_plan", "measure_rates"]
