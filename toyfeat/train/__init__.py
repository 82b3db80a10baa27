"""Training dictionaries: one, a population of them, and the loop around it."""

from toyfeat.train.fit import fit
from toyfeat.train.normalization import Normalization, denormalized, normalization
from toyfeat.train.outliers import OutlierDims, outlier_dims
from toyfeat.train.population import population
from toyfeat.train.sweeps import Row, final_metrics, grid, pareto_front, table
from toyfeat.train.trainer import trainer
from toyfeat.train.types import Trainer, TrainState

__all__ = [
    "Normalization",
    "OutlierDims",
    "Row",
    "TrainState",
    "Trainer",
    "denormalized",
    "final_metrics",
    "fit",
    "grid",
    "normalization",
    "outlier_dims",
    "pareto_front",
    "population",
    "table",
    "trainer",
]
