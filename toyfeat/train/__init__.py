"""Training dictionaries: one, a population of them, and the loop around it."""

from toyfeat.train.fit import fit
from toyfeat.train.outliers import check_outliers
from toyfeat.train.population import population
from toyfeat.train.scales import folded, scales
from toyfeat.train.sweeps import final_metrics, grid, pareto_front, sweep_table
from toyfeat.train.trainer import trainer

__all__ = [
    "check_outliers",
    "final_metrics",
    "fit",
    "folded",
    "grid",
    "pareto_front",
    "population",
    "scales",
    "sweep_table",
    "trainer",
]
