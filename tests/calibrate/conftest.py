import sys
from pathlib import Path

# The tests of discovery, of the walk and of the whole run share one set of tiny models.
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
