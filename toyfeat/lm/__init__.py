"""Language models as a library: taps to disk, replacements at a site, their scores."""

from toyfeat.lm.collect import (
    collect,
    fingerprint,
    make_readout,
    site_folder,
    store_moments,
)
from toyfeat.lm.split import SplitDecoder, split_at

__all__ = [
    "SplitDecoder",
    "collect",
    "fingerprint",
    "make_readout",
    "site_folder",
    "split_at",
    "store_moments",
]
