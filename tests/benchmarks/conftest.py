"""Makes the modules of the benchmark importable, as they are when its script runs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
