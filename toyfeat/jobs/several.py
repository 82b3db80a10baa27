"""Jobs in several processes: the same job in each, files of one, a mesh of all."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from toyfeat.data.parts import batch_part
from toyfeat.jobs.config import Job
from toyfeat.jobs.results import claim_folder
from toyfeat.jobs.taps import TapSource, from_store, open_collected
from toyfeat.processes import (
    call_in_first,
    check_same,
    is_global,
    num_processes,
    to_host,
    versions,
)

_ADVICE = "give all of them the same job file and the same versions"


def check_same_job(job: Job) -> None:
    """Raise in every process if they have different jobs or versions.

    Raises:
      ValueError: with the entry that differs.
    """
    settings = json.loads(json.dumps(asdict(job)))
    check_same("job", {"versions": versions(), **settings}, _ADVICE)


def claim_together(job: Job, *parts: str) -> Path:
    """Claim the folder of a job, as :func:`claim_folder` does, in the first process."""
    call_in_first("job", claim_folder, job, *parts)
    return Path(job.out)


def training_mesh(job: Job) -> Mesh | None:
    """Make a mesh of the devices of all processes, ``None`` for one process.

    Raises:
      ValueError: for a job without a store, or a batch that does not divide.
    """
    if num_processes() == 1:
        return None
    if job.source != "store":
        raise ValueError(
            f"job: source is {job.source!r}, which one process trains on, got "
            f'{num_processes()} processes; collect, and set source = "store"'
        )
    shape = (jax.device_count(),)
    mesh = jax.make_mesh(shape, ("data",), axis_types=(AxisType.Auto,))
    batch_part("job", job.train.batch, mesh, "data")  # raises before any work
    return mesh


def open_together(job: Job) -> TapSource:
    """Open the store of a job for training; one process reads all of it to verify it.

    Raises:
      FileNotFoundError: if nothing was collected.
      ValueError: if a shard is damaged, or as :func:`training_mesh`.
    """
    mesh = training_mesh(job)
    call_in_first("job", open_collected, job, job.site)
    return from_store(open_collected(job, job.site), job.train.batch, mesh)


def to_local(tree: Any) -> Any:
    """Copy a tree of arrays of all processes to this one."""
    if not is_global(tree):
        return tree

    def copy(leaf: Any) -> Any:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = jax.numpy.asarray(to_host(jax.random.key_data(leaf)))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        return jax.numpy.asarray(to_host(leaf))

    return jax.tree.map(copy, tree)
