"""Jobs on language models: collect, train, evaluate."""

from toyfeat.language.collecting import (
    collect,
    fingerprint,
    readout_of,
    site_folder,
    store_moments,
)
from toyfeat.language.halves import Halves, halves
from toyfeat.language.jobs import (
    Attribution,
    Collect,
    Decompose,
    Evaluate,
    Job,
    Train,
    command,
    read_job,
)
from toyfeat.language.sources import (
    PACKAGES,
    cache_folder,
    fetch,
    located,
    texts_of,
)

__all__ = [
    "PACKAGES",
    "Attribution",
    "Collect",
    "Decompose",
    "Evaluate",
    "Halves",
    "Job",
    "Train",
    "cache_folder",
    "collect",
    "command",
    "fetch",
    "fingerprint",
    "halves",
    "located",
    "read_job",
    "readout_of",
    "site_folder",
    "store_moments",
    "texts_of",
]
