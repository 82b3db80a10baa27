"""Run a script from the command line: positional arguments, errors in one line."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from toyfeat.jobs.config import Job, read_job
from toyfeat.processes import leave

# What a user can mend, so that a line says enough; a traceback is for anything else.
JOB_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)


def run_job_script(main: Callable[[Job], None]) -> None:
    """Run a script on the job file that the command line names.

    ``--help`` prints the docstring of the script.

    Args:
      main: of the script.

    Raises:
      SystemExit: with the message of an error that a user can mend.
    """

    def read_and_run(job: Path) -> None:
        main(read_job(job))

    run_script(
        read_and_run,
        description=sys.modules[main.__module__].__doc__,
        errors=JOB_ERRORS,
    )


def run_script(
    main: Callable[..., None],
    *,
    description: str | None,
    errors: tuple[type[Exception], ...],
) -> None:
    """Run a function on the arguments of the command line.

    Args:
      main: with annotated arguments, all of them positional on the command line.
      description: printed by ``--help``.
      errors: exceptions that are printed as one line.

    Raises:
      SystemExit: with the message of such an exception.
    """
    try:
        tyro = _import_tyro()
        tyro.cli(main, description=description, config=(tyro.conf.Positional,))
    except errors as error:
        leave(str(error))


def _import_tyro() -> Any:
    try:
        return importlib.import_module("tyro")
    except ImportError as error:
        raise ImportError(
            'command: tyro is not installed: pip install "toyfeat[lm]"'
        ) from error
