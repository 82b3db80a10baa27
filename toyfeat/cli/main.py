"""The command ``toyfeat``: the steps of a job, fetching, and the state of things."""

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from toyfeat.cli.doctor import describe_installation
from toyfeat.jobs import cache_folder, read_job
from toyfeat.jobs.hub import FetchError
from toyfeat.processes import ProcessError, join_processes, leave, together

# What a user can mend, so that a line says enough; a traceback is for anything else.
_ERRORS = (
    ValueError,
    OSError,
    ImportError,
    FloatingPointError,
    FetchError,
    ProcessError,
)
# Measured once on two cores beside other work (docs/smollm2.md).
_TIMES = "with examples/smollm2.toml on two cores"
_JOBS = {
    "collect": f"store activations and gradients of a model on a text; three minutes "
    f"{_TIMES}",
    "decompose": "bases of activations and gradients, and what each direction is "
    f"worth; seven minutes {_TIMES}",
    "train": f"train dictionaries of activations and gradients; a minute for each "
    f"{_TIMES}",
    "evaluate": f"score the dictionaries on held-out text; half an hour {_TIMES}",
    "finetune": "train dictionaries further by what they do to the model, and score "
    "them; minutes per dictionary, as finetune.steps says",
    "report": f"write the page and records of latents; a minute {_TIMES}",
    "lens": "fit or train a lens and write what it reads in a text; four minutes with "
    "examples/smollm2_lens.toml on one free core",
}
_COMMANDS = {
    "fetch": "fetch models, texts and dictionaries; the only command that downloads",
    **_JOBS,
    "doctor": "versions, devices, memory, missing extras",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
      arguments: instead of those of the process.

    Raises:
      SystemExit: with the message of an error that a user can mend.
    """
    parser = argparse.ArgumentParser(
        prog="toyfeat",
        description="Features of a model, from its activations and their gradients.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in _COMMANDS.items():
        _add_arguments(name, commands.add_parser(name, help=text, description=text))
    args = parser.parse_args(arguments)
    _run(args, f"toyfeat {args.command}: ")


def run_script(name: str, description: str | None) -> None:
    """Run one command as a script of its own.

    Args:
      name: of the command.
      description: printed by ``--help``, as it stands.

    Raises:
      SystemExit: with the message of an error that a user can mend.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_arguments(name, parser)
    _run(parser.parse_args(), "")


def _add_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a command, and the function that runs it."""
    run: Callable[[Any], None] = _doctor
    if name == "fetch":
        run = _fetch
        parser.add_argument(
            "names",
            nargs="*",
            help="such as smollm2, or hub:OWNER/NAME or a folder of it, "
            "hub:OWNER/NAME/FOLDER; without names: lists what there is",
        )
    elif name in _JOBS:
        run = partial(_run_job, name)
        parser.add_argument(
            "job", type=Path, help="a TOML file, such as examples/smollm2.toml"
        )
    parser.set_defaults(run=run)


def _run(args: Any, prefix: str) -> None:
    """Run a command; what a user can mend is one line."""
    try:
        args.run(args)
    except _ERRORS as error:
        leave(f"{prefix}{error}")


def _keep_programs() -> None:
    """Keep compiled programs on disk from run to run, unless the user says where."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = cache_folder() / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _fetch(args: Any) -> None:
    """Fetch what is named."""
    # Imported here: --help and doctor must work without any extra.
    from toyfeat.cli import steps

    steps.fetch_all(args.names)


def _run_job(name: str, args: Any) -> None:
    """Run one step of the job in a file."""
    from toyfeat.cli import steps

    _keep_programs()
    join_processes()
    with together("job"):
        job = read_job(args.job)
    getattr(steps, name)(job)


def _doctor(args: Any) -> None:
    """Print the state of the installation."""
    del args
    for line in describe_installation():
        print(line)


if __name__ == "__main__":
    main()
