"""Several processes of one program: joining them, comparing, failing together.

JAX's distributed runtime does the work.  Nothing here is called on import, and in one
process nothing here waits or communicates.
"""

import contextlib
import functools
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

ADDRESS = "JAX_COORDINATOR_ADDRESS"
"""Variable: ``host:port`` of the process 0."""
NUM = "JAX_NUM_PROCESSES"
"""Variable: how many processes there are; 1 keeps a process alone on a cluster."""
INDEX = "JAX_PROCESS_ID"
"""Variable: which of them this is, from 0."""

_HEARTBEAT = 30
"""Seconds without a sign of life after which a process counts as dead, and the others
are ended by JAX.  Its default of 100 is for congested networks of thousands."""
_JOIN = 300
"""Seconds that a process waits for the others to start: JAX's default."""


_PATIENCE = 24 * 3600 * 1000
"""Milliseconds that a process waits for a word of another that lives."""


class ProcessError(RuntimeError):
    """Processes that cannot work together; the message says what to do."""


def join_processes(*, heartbeat: int = _HEARTBEAT, timeout: int = _JOIN) -> bool:
    """Join the other processes of a job, if that is asked for or on a cluster.

    Asked for: the variables :data:`ADDRESS`, :data:`NUM` and :data:`INDEX` are set, as
    ``scripts/launch_local.py`` does.  A cluster: several processes of SLURM, Open MPI,
    Cloud TPU or an indexed Kubernetes job, as JAX detects them.  Call it before
    anything that uses a device; it does nothing the second time.

    Args:
      heartbeat: seconds after which a process that died is noticed.
      timeout: seconds to wait for the others.

    Returns:
      Whether there are several processes.

    Raises:
      ValueError: if the variables do not fit each other.
      ProcessError: if a device was used before, or the others do not come in time.
    """
    if jax.distributed.is_initialized():
        return num_processes() > 1
    options = _asked_for()
    if options is None:
        if not _is_cluster():
            return False
        options = {}
    if options.get("num_processes") == 1:
        return False
    if _has_backends():
        raise ProcessError(
            "processes: a device was used before this process joined the others; call "
            "join_processes() first of all, before any array is made"
        )
    # JAX's own handler of SIGTERM would keep a process alive outside of its loops.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **options,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=heartbeat,
        )
    except RuntimeError as error:
        raise ProcessError(
            f"processes: could not join the others within {timeout} s ({error}); see "
            f"that all are started, with the same {ADDRESS} and {NUM}"
        ) from error
    # The others wait for one that ends by an error, unless it ends at once.
    if num_processes() > 1:
        sys.excepthook = _end_by_exception
    return num_processes() > 1


def _asked_for() -> dict[str, Any] | None:
    """Read the variables; ``None`` if there are none."""
    values = {name: os.environ.get(name) for name in (ADDRESS, NUM, INDEX)}
    if values[NUM] is None and values[INDEX] is None:
        return None  # an address alone may serve a cluster
    counts = {}
    for name in (NUM, INDEX):
        text = values[name]
        if text is None or not text.isascii() or not text.isdigit():
            raise ValueError(
                f"processes: {name} must be a number, got {text!r}; set {ADDRESS}, "
                f"{NUM} and {INDEX}, or none of them"
            )
        counts[name] = int(text)
    if not counts[INDEX] < counts[NUM]:
        raise ValueError(
            f"processes: {INDEX} must be 0 .. {NUM} - 1, got {counts[INDEX]} of "
            f"{counts[NUM]}; number the processes from 0"
        )
    if counts[NUM] > 1 and ":" not in (values[ADDRESS] or ""):
        raise ValueError(
            f"processes: {ADDRESS} must be host:port of process 0, got "
            f"{values[ADDRESS]!r}; give all processes the same"
        )
    return {
        "coordinator_address": values[ADDRESS],
        "num_processes": counts[NUM],
        "process_id": counts[INDEX],
    }


def _is_cluster() -> bool:
    """Tell whether JAX detects a cluster on which this job has several processes."""
    clusters = importlib.import_module("jax._src.clusters")
    for kind in clusters.ClusterEnv._cluster_types:
        # A pod that is not of an indexed job has no other process to find, and JAX
        # would ask the cluster about it.
        if "k8s" in kind.__module__ and "JOB_COMPLETION_INDEX" not in os.environ:
            continue
        if not kind.opt_in_only_method and kind.is_env_present():
            return kind.get_process_count() > 1
    return False


def _has_backends() -> bool:
    """Tell whether JAX has looked for devices already."""
    bridge = importlib.import_module("jax._src.xla_bridge")
    return bool(bridge.backends_are_initialized())


def num_processes() -> int:
    """Number of processes of this job; starts no device."""
    state = importlib.import_module("jax._src.distributed").global_state
    return state.num_processes if jax.distributed.is_initialized() else 1


def process_index() -> int:
    """Number of this process, from 0; starts no device."""
    state = importlib.import_module("jax._src.distributed").global_state
    return state.process_id if jax.distributed.is_initialized() else 0


def describe_devices() -> str:
    """Count the devices of this process, ``"8 x gpu"``, or raise a ProcessError."""
    try:
        devices = jax.local_devices()
    except (RuntimeError, AssertionError) as error:
        wanted = os.environ.get("JAX_PLATFORMS") or "any kind"
        raise ProcessError(
            f"processes: wanted a device of JAX_PLATFORMS, {wanted}, got none "
            f"({error!r}); install the jax of these devices, such as "
            '"toyfeat[cuda]", or set JAX_PLATFORMS=cpu'
        ) from error
    return f"{len(devices)} x {devices[0].platform}"


def versions() -> dict[str, str]:
    """Versions that processes have to share."""
    names = "toyfeat", "jax", "jaxlib", "numpy"
    return {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # run from a folder
        return "unknown"


def gather(value: Any) -> list[Any]:
    """Exchange a JSON value, which every process has to do.

    Args:
      value: of this process.

    Returns:
      The values of all processes, in their order.

    Raises:
      ProcessError: if their devices are not equal; JAX exchanges nothing then.
    """
    if num_processes() == 1:
        return [value]
    _check_devices()
    from jax.experimental.multihost_utils import process_allgather

    # Texts of different lengths travel in the room of the longest.
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(process_allgather(np.int32(len(text)))).reshape(-1)
    room = 64
    while room < sizes.max():
        room *= 2
    filled = np.zeros(room, np.uint8)
    filled[: len(text)] = text
    texts = np.asarray(process_allgather(filled)).reshape(len(sizes), room)
    pairs = zip(texts, sizes, strict=True)
    return [json.loads(bytes(row[:size])) for row, size in pairs]


@functools.cache
def _check_devices() -> None:
    """Raise in every process, once, if they do not have equal devices."""
    client = importlib.import_module("jax._src.distributed").global_state.client
    names = [f"toyfeat/devices/{i}" for i in range(num_processes())]
    client.key_value_set(names[process_index()], describe_devices())
    every = [client.blocking_key_value_get(name, _PATIENCE) for name in names]
    for index, other in enumerate(every):
        if other != every[0]:
            raise ProcessError(
                f"processes: all must have equal devices, got {every[0]} in process 0 "
                f"and {other} in process {index}; see with toyfeat doctor which lacks "
                "one, or start processes of as many each"
            )


def check_same(who: str, values: Mapping[str, Any], advice: str) -> None:
    """Raise in every process if they do not have the same values.

    Args:
      who: the function, for messages.
      values: name to JSON value.
      advice: end of the message.

    Raises:
      ValueError: with the first name whose values differ.
    """
    every = gather(json.loads(json.dumps(values)))
    for index, other in enumerate(every):
        for name in sorted(every[0] | other):
            first, value = every[0].get(name), other.get(name)
            if repr(first) != repr(value):
                raise ValueError(
                    f"{who}: all processes must have the same {name}, got "
                    f"{first!r:.80} in process 0 and {value!r:.80} in process {index}; "
                    f"{advice}"
                )


@contextlib.contextmanager
def together(who: str) -> Iterator[None]:
    """Run a block in which a process may fail alone; then all of them fail.

    Every process must come here, and leave the block by its end or an exception.

    Args:
      who: the function, for messages.

    Raises:
      ProcessError: if the block failed in another process, with its message; a
        process whose own block failed raises what it raised.
    """
    fault: Exception | None = None
    try:
        yield
    except Exception as error:
        fault = error
    if num_processes() > 1:
        text = None if fault is None else f"{type(fault).__name__}: {fault}"
        faults = gather(text)
        for index, other in enumerate(faults):
            if fault is None and other is not None:
                raise ProcessError(
                    f"{who}: process {index} of {len(faults)} failed ({other})"
                )
    if fault is not None:
        raise fault


def call_in_first(who: str, function: Callable[..., object], *arguments: Any) -> None:
    """Call a function in the first process alone; if it fails there, all fail."""
    with together(who):
        if process_index() == 0:
            function(*arguments)


def is_global(tree: Any) -> bool:
    """Tell whether arrays of a tree are spread over several processes."""
    leaves = jax.tree.leaves(tree)
    return any(
        isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in leaves
    )


def to_host(array: Any) -> np.ndarray:
    """Copy an array to the host, all of it in every process."""
    if not is_global(array):
        return np.asarray(array)
    if not array.is_fully_replicated:
        everywhere = NamedSharding(array.sharding.mesh, PartitionSpec())
        array = jax.jit(_identity, out_shardings=everywhere)(array)
    return np.asarray(array)


def _identity(array: Any) -> Any:
    return array


def leave(message: str) -> NoReturn:
    """End this process with status 1 and a message.

    One of several ends at once: a usual end waits for the others, and these notice a
    process that has ended within seconds.

    Args:
      message: to standard error.

    Raises:
      SystemExit: in a process that is alone.
    """
    if num_processes() == 1:
        raise SystemExit(message)
    _print_and_end(message)


def _end_by_exception(kind: Any, error: Any, trace: Any) -> None:
    """Print an exception that nobody caught, and end."""
    lines = traceback.format_exception(kind, error, trace)
    _print_and_end("".join(lines).rstrip())


def _print_and_end(message: str) -> NoReturn:
    head = f"process {process_index()} of {num_processes()}: "
    # What breaks here when another process has gone names a connection only.
    lost = ("Gloo", "NCCL", "closed by peer", "UNAVAILABLE", "coordination service")
    if any(word in message for word in lost):
        message += (
            "\nanother process has ended, and its own message says why; run the same "
            "again to go on from what is saved"
        )
    print(head + message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
