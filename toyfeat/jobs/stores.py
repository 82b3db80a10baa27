"""Stores and moments of a job: where they are, and whether they are whole."""

import json
from collections.abc import Callable
from pathlib import Path

from toyfeat.checkpoint import save_tree
from toyfeat.checkpoint.files import DamagedFileError
from toyfeat.data.store import Store, open_store, verify_store
from toyfeat.files.atomic import write_whole
from toyfeat.files.json import read_json
from toyfeat.jobs.config import Job
from toyfeat.jobs.taps import load_moments
from toyfeat.lm.collect import site_folder
from toyfeat.types import Moments


def open_collected(job: Job, site: str) -> Store:
    """Open the store of a site, after verifying its checksums.

    Raises:
      FileNotFoundError: if nothing was collected there.
      ValueError: if a shard is damaged; names it.
    """
    require_collected(job, site)
    store = open_store(store_path(job, site))
    verify_once(store)
    return store


def verify_once(store: Store) -> None:
    """Verify the checksums of a store, unless its files are as they were verified.

    A file beside the store says which sizes and times of change its shards had when
    they were verified.  Reading 1 GB for the checksums takes one to five seconds.

    Args:
      store: an open one.

    Raises:
      ValueError: if a shard is damaged; names it and says what to do.
    """
    marker = store.path.with_name(f"{store.path.name}.verified.json")
    shards = {}
    for shard in store.shards:
        status = (store.path / shard.file).stat()
        shards[shard.file] = [status.st_size, status.st_mtime_ns, shard.sha256]
    try:
        is_verified = read_json(marker, "job") == {"shards": shards}
    except (ValueError, FileNotFoundError):  # to be written again
        is_verified = False
    if is_verified:
        return
    try:
        verify_store(store.path)
    except ValueError as error:
        fault = str(error).partition("; ")[0]  # without its advice
        raise ValueError(
            f"job: the store must hold what was collected, got {fault}; delete the "
            f"folder {store.path} and run scripts/collect.py again, which collects "
            "this site anew"
        ) from error
    write_whole(marker, json.dumps({"shards": shards}) + "\n")


def open_moments(
    job: Job, site: str, dim: int, compute: Callable[[], Moments], log: Callable
) -> Moments:
    """Read the moments of a site, or compute and keep them.

    Moments whose file is damaged are computed again: what they are computed from is
    verified or the model itself.

    Args:
      job: settings.
      site: name.
      dim: width of the site.
      compute: makes them, if there are none.
      log: called with a line if a file is damaged.

    Raises:
      ValueError: if the file holds something else than moments of this width.
    """
    path = moments_path(job, site)
    if path.exists():
        try:
            return load_moments(path, dim)
        except DamagedFileError as error:
            log(f"{error}: computed again")
    stats = compute()
    save_tree(path, stats)
    return stats


def store_path(job: Job, site: str) -> Path:
    """Folder of the store of a site."""
    return Path(job.out) / "stores" / site_folder(site)


def moments_path(job: Job, site: str) -> Path:
    """File of the second moments of a site."""
    folder = "moments" if job.source == "store" else "moments of the model"
    return Path(job.out) / folder / site_folder(site)


def require_collected(job: Job, site: str) -> None:
    """Refuse a step that comes before collecting.

    Raises:
      FileNotFoundError: if nothing was collected, of a job with a store.
    """
    missing = not moments_path(job, site).exists() or not store_path(job, site).exists()
    if job.source == "store" and missing:
        raise FileNotFoundError(
            f"job: {job.out} has nothing of {site!r} yet; run scripts/collect.py first"
        )


def require_store(job: Job) -> None:
    """Refuse to collect for a job without a store.

    Raises:
      ValueError: for a job without a store.
    """
    if job.source != "store":
        raise ValueError(
            f"job: source is {job.source!r}, so that nothing is stored; leave this "
            'step out, or set source = "store"'
        )
