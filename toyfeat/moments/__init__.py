"""First and second moments of taps, whole or reduced to their leading directions."""

from toyfeat.moments.exact import MomentsState, moments, moments_of
from toyfeat.moments.sketched import SketchedMoments, SketchState, sketched_moments

__all__ = [
    "MomentsState",
    "SketchState",
    "SketchedMoments",
    "moments",
    "moments_of",
    "sketched_moments",
]
