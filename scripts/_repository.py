"""Puts the repository on the path of modules, for ``examples``, which no wheel has.

Scripts import this module before ``examples``.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
