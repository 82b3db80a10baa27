"""The command ``toyfeat``: the steps of a job, fetching, and the state of things."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from toyfeat.cli.doctor import describe_installation
from toyfeat.jobs import cache_folder, read_job
from toyfeat.processes import join_processes, leave, together

# What a user can mend, so that a line says enough; a traceback is for anything else.
_ERRORS = (ValueError, OSError, ImportError, FloatingPointError, RuntimeError)
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
    "them; finetune.steps sets the time",
    "report": f"write the page and records of latents; a minute {_TIMES}",
    "lens": "fit a Jacobian lens and write what it reads in a text",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
      arguments: instead of those of the process.

    Raises:
      SystemExit: with the message of an error that a user can mend.
    """
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
    except _ERRORS as error:
        leave(f"toyfeat {args.command}: {error}")


def _parser() -> argparse.ArgumentParser:
    """Make the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="toyfeat",
        description="Features of a model, from its activations and their gradients.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    # Fetching is the only command that downloads.
    fetch = _add(commands, "fetch", "fetch models, texts and dictionaries", _fetch)
    fetch.add_argument(
        "names",
        nargs="*",
        help="such as smollm2, or hub:OWNER/NAME or a folder of it, "
        "hub:OWNER/NAME/FOLDER; without names: lists what there is",
    )
    for name, text in _JOBS.items():
        job = _add(commands, name, text, _run_job)
        job.add_argument(
            "job", type=Path, help="a TOML file, such as examples/smollm2.toml"
        )
    _add(commands, "doctor", "versions, devices, memory, missing extras", _doctor)
    return parser


def _add(
    commands: Any, name: str, text: str, run: Callable[[Any], None]
) -> argparse.ArgumentParser:
    """Add a command with the function that runs it."""
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


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


def _run_job(args: Any) -> None:
    """Run one step of the job in a file."""
    from toyfeat.cli import steps

    _keep_programs()
    join_processes()
    with together("job"):
        job = read_job(args.job)
    getattr(steps, args.command)(job)


def _doctor(args: Any) -> None:
    """Print the state of the installation."""
    del args
    for line in describe_installation():
        print(line)


if __name__ == "__main__":
    main()
