"""Studies made with toyfeat: trained networks, measurements and their pages.

None of it is in the wheel.  Scripts import it from the repository
(``scripts/_repository.py``), tests through ``pythonpath`` in ``pyproject.toml``.
"""
