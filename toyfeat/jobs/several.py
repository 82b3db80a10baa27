"""Jobs in several processes: the same job in each, files of one, a mesh of all."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from toyfeat.data.parts import batch_part
from toyfeat.jobs.config import Job
from toyfeat.jobs.results import claim_folder
from toyfeat.jobs.taps import TapSource, from_store, open_collected
from toyfeat.jobs.workspace import Workspace, open_job
from toyfeat.meshes import copy_everywhere
from toyfeat.processes import (
    call_in_first,
    check_same,
    describe_devices,
    is_global,
    num_processes,
    to_host,
    together,
    versions,
)
from toyfeat.types import Params

_ADVICE = "give all of them the same job file and the same versions"


def check_same_job(job: Job) -> None:
    """Raise in every process if they have different jobs or versions.

    Raises:
      ValueError: with the entry that differs.
      ProcessError: if a process has no device, or others than the rest.
    """
    describe_devices()  # raises if there is none
    settings = json.loads(json.dumps(asdict(job)))
    check_same("job", {"versions": versions(), **settings}, _ADVICE)


def claim_together(job: Job, *parts: str) -> Path:
    """Claim the folder of a job, as :func:`claim_folder` does, in the first process."""
    call_in_first("job", claim_folder, job, *parts)
    return Path(job.out)


def training_mesh(job: Job) -> Mesh | None:
    """Make the mesh that dictionaries of a job are trained on, or ``None`` for none.

    It has all devices of all processes; one process alone has none, unless latents are
    to be split.

    Raises:
      ValueError: for a job without a store, or a batch or latents that do not divide.
    """
    num, parts = num_processes(), job.train.latent_devices
    if num == parts == 1:
        return None
    if job.source != "store":
        got = f"{num} processes" if num > 1 else f"train.latent_devices = {parts}"
        raise ValueError(
            f"job: source is {job.source!r}, which one process trains on one device, "
            f'got {got}; collect, and set source = "store"'
        )
    if job.train.latents % parts:
        raise ValueError(
            f"job: the {parts} devices of train.latent_devices must divide "
            f"train.latents, got {job.train.latents}; make it "
            f"{-(-job.train.latents // parts) * parts}"
        )
    return _make_mesh("job", job.train.batch, parts)


def _make_mesh(who: str, batch: int, parts: int = 1) -> Mesh:
    """Make a mesh of all devices, ``parts`` of them for latents, or raise."""
    devices = jax.device_count()
    if devices % parts:
        raise ValueError(
            f"job: train.latent_devices must divide the {devices} devices of all "
            f"processes, got {parts}; lower it, or start on more devices"
        )
    shape, auto = (devices // parts, parts), (AxisType.Auto,) * 2
    mesh = jax.make_mesh(shape, ("data", "latents"), axis_types=auto)
    batch_part(who, batch, mesh, "data")  # raises before any work
    return mesh


class Spread(NamedTuple):
    """Parameters and batches of prompts, on the devices of all processes.

    Attributes:
      params: of the model, on every device.
      lay_out: puts batches ``(tokens, mask)`` of the host on the devices, their first
        axis split; each process gives all of it.
    """

    params: Params
    lay_out: Callable[[Sequence[tuple[np.ndarray, np.ndarray]]], list[Any]]


def lens_mesh(job: Job) -> Mesh | None:
    """Make a mesh of the devices of all processes, ``None`` for one process.

    Raises:
      ValueError: if it does not divide the windows of a batch.
    """
    if num_processes() == 1:
        return None
    return _make_mesh("lens.batch", job.lens.batch)


def spread_prompts(work: Workspace, batch: int, mesh: Mesh | None) -> Spread:
    """Spread the model of a job and batches of its windows over a mesh.

    Without a mesh all stays as it is.

    Args:
      work: the same in every process.
      batch: windows of all processes in a batch.
      mesh: of all devices, or ``None``.

    Returns:
      :class:`Spread`.
    """
    if mesh is None:
        return Spread(work.model.params, list)
    part = batch_part("job", batch, mesh, "data")

    def lay_out(batches: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Any]:
        own: Any = [tuple(x[part.rows] for x in pair) for pair in batches]
        return [part.assemble(pair) for pair in own]

    return Spread(copy_everywhere(work.model.params, mesh), lay_out)


def open_job_together(job: Job) -> Workspace:
    """Open a job in every process, as :func:`open_job` does in one.

    Raises:
      ValueError: if the weights or the windows of text are not the same in all.
      ProcessError: if another process could not open it.
    """
    with together("job"):
        work = open_job(job)
    if num_processes() > 1:
        read = {"weights of the model": work.weights}
        read |= {"windows of text": _digest(work.tokens, work.held_out)}
        advice = f"give all of them the same {job.model} and {job.text}"
        check_same("job", read, advice)
    return work


def _digest(*arrays: np.ndarray) -> str:
    """SHA-256 of arrays of tokens and their shapes."""
    digest = hashlib.sha256()
    for array in arrays:
        tokens = np.ascontiguousarray(array, np.int32)
        digest.update(f"{tokens.shape}".encode())
        digest.update(tokens.data)
    return digest.hexdigest()


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
