"""Jobs on language models: one TOML file, run step by step."""

from toyfeat.jobs.config import (
    Attribution,
    Collect,
    Decompose,
    Evaluate,
    Job,
    Train,
    read_job,
)
from toyfeat.jobs.latents import inspect_latents
from toyfeat.jobs.sites import open_site
from toyfeat.jobs.sources import PACKAGES, cache_folder, fetch, locate, read_texts
from toyfeat.jobs.steps import (
    collect_taps,
    decompose_job,
    evaluate_job,
    train_job,
)
from toyfeat.jobs.workspace import open_job

__all__ = [
    "PACKAGES",
    "Attribution",
    "Collect",
    "Decompose",
    "Evaluate",
    "Job",
    "Train",
    "cache_folder",
    "collect_taps",
    "decompose_job",
    "evaluate_job",
    "fetch",
    "inspect_latents",
    "locate",
    "open_job",
    "open_site",
    "read_job",
    "read_texts",
    "train_job",
]
