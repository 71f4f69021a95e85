"""Server strategies, one per file.

In a wheel the files lie in this folder. In a checkout they lie in `strategies/` at the top level,
where this package finds them; a foreign package called `strategies` is never looked at.
"""

from pathlib import Path

_inside = Path(__file__).parent
_checkout = _inside.parents[1] / "strategies"
if not (_inside / "fedavg.py").is_file():
    __path__ = [str(_checkout)]
