"""Training dictionaries: one, a population of them, and the loop around it."""

from toyfeat.train.fit import fit
from toyfeat.train.population import population
from toyfeat.train.trainer import folded, trainer

__all__ = ["fit", "folded", "population", "trainer"]
