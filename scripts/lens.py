"""Fit a Jacobian lens to a language model, and show what it reads in a text.

    python scripts/lens.py examples/smollm2_lens.toml

Writes ``lens.safetensors`` and the page ``lens.html`` to the folder of the job.  A fit
goes on where it was stopped.
"""

from toyfeat.cli.main import run_script


def main() -> None:
    """Run the command ``toyfeat lens``."""
    run_script("lens", __doc__)


if __name__ == "__main__":
    main()
