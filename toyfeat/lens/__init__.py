"""Lenses: what a residual stream says, by the model's own derivatives."""

from toyfeat.lens.model import LensModel, check_model, from_decoder, from_probed

__all__ = ["LensModel", "check_model", "from_decoder", "from_probed"]
