"""Write a page on the dictionaries of a language model: scores, pictures, latents.

    python scripts/report.py examples/smollm2.toml

After ``scripts/evaluate.py``.  Writes ``report.html`` into the job's folder, with
everything in it: what the model keeps, attributions against leaving out, and, for each
kind of dictionary, latents with their contexts in the text.
"""

from toyfeat.cli.main import run_script


def main() -> None:
    """Run the command ``toyfeat report``."""
    run_script("report", __doc__)


if __name__ == "__main__":
    main()
