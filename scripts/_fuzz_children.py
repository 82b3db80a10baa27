"""Children that load files, each with a clock and a limit of memory."""

import multiprocessing
import os
import resource
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import _fuzz_samples as samples

FAULTS = ("unnamed errors", "crashes", "hangs", "memory")
OUTCOMES = ("loaded", "named errors", *FAULTS)
MEASURED = ("seconds", "MB")
_MAX_MESSAGE = 4000  # characters: more than a page is not read


class Result(NamedTuple):
    """The end of a loading.

    Attributes:
      outcome: one of ``OUTCOMES``.
      text: what was raised.
      where: the innermost line of the library that raised it.
      seconds: time taken.
      megabytes: memory taken at the most.
    """

    outcome: str
    text: str = ""
    where: str = ""
    seconds: float = 0.0
    megabytes: float = 0.0


class Child:
    """Process that loads files of one format, replaced when it dies or hangs."""

    def __init__(self, name: str, valid: list[Path], seconds: float, memory: int):
        self._settings, self._seconds = (name, valid, memory), seconds
        self._start()

    def _start(self) -> None:
        """Fork a child, and wait until it has loaded the valid files."""
        fork = multiprocessing.get_context("fork")
        self._pipe, theirs = fork.Pipe()
        arguments = (theirs, *self._settings)
        self._process = fork.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()

    def load(self, folder: Path) -> Result:
        """Load the files of a folder, or say how the child ended."""
        start = time.perf_counter()
        self._pipe.send(folder)
        result = Result("hangs")
        if self._pipe.poll(self._seconds):
            try:
                result = self._pipe.recv()
            except EOFError:
                self._process.join()
                result = Result("crashes", f"exit code {self._process.exitcode}")
        if result.outcome in FAULTS[1:]:
            self.close()
            self._start()
        return result._replace(seconds=time.perf_counter() - start)

    def close(self) -> None:
        """End the child."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Any, name: str, valid: list[Path], memory: int) -> None:
    """Load the folders that come through a pipe, and send back how it ended."""
    warnings.simplefilter("ignore")
    # Start JAX, compile what loading needs, and see that valid files load.
    for folder in valid:
        samples.READERS[name](folder)
    pipe.send("ready")
    while True:
        folder = pipe.recv()
        before = _megabytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        limit = int((_megabytes("VmSize") + memory) * 2**20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        result = _load(name, folder)
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_AS, unlimited)
        pipe.send(result._replace(megabytes=_megabytes("VmHWM") - before))


def _load(name: str, folder: Path) -> Result:
    """Load a folder, and judge what is raised."""
    try:
        samples.READERS[name](folder)
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
        own = [x for x in traceback.extract_tb(error.__traceback__)]
        own = [x for x in own if "toyfeat" in x.filename]
        where = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
        if _is_memory(error):
            return Result("memory", text[:_MAX_MESSAGE], where)
        outcome = "named errors" if _is_named(error, folder) else "unnamed errors"
        return Result(outcome, text[:_MAX_MESSAGE], where)
    return Result("loaded")


def _is_named(error: BaseException, folder: Path) -> bool:
    """Return whether an error is one of the library, and names function and file."""
    message = str(error)
    function = message.split(":", maxsplit=1)[0]
    names = (str(folder), *os.listdir(folder))
    return (
        isinstance(error, ValueError | TypeError | OSError)
        and not isinstance(error, UnicodeError)
        and ": " in message
        and function.isidentifier()
        and any(name in message for name in names)
        and len(message) <= _MAX_MESSAGE
    )


def _is_memory(error: BaseException | None) -> bool:
    """Return whether an error, or one that it was raised from, is for memory."""
    while error is not None:
        if isinstance(error, MemoryError) or "bad_alloc" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _megabytes(field: str) -> float:
    """Read a size of this process from the kernel's status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 2**10
    return 0.0
