"""Training dictionaries: one, a population of them, and the loop around it."""

from toyfeat.train.fit import fit
from toyfeat.train.population import population
from toyfeat.train.scales import folded, scales
from toyfeat.train.trainer import trainer

__all__ = ["fit", "folded", "population", "scales", "trainer"]
