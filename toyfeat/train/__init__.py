"""Training of dictionaries: one or a whole population, in compiled chunks."""

from toyfeat.train.fit import fit

__all__ = ["fit"]
