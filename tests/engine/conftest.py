"""Makes `fake_model` importable by its bare name, as the test files lie in no package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
