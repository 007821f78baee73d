"""Print the JSON schema of recipes: `python -m rarefy.recipe > docs/recipe.schema.json`."""

import json
import sys

from rarefy.recipe.schema import json_schema

sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")
