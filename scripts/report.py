"""One page on the dictionaries of a language model: scores, pictures, latents.

    python scripts/report.py examples/smollm2.toml

After ``scripts/evaluate.py``.  Writes ``report.html`` into the job's folder, with
everything in it: what the model keeps, attributions against leaving out, and, for each
kind of dictionary, latents with their contexts in the text.
"""

import sys
from dataclasses import asdict
from pathlib import Path

from toyfeat.language import pipeline, read_job
from toyfeat.language.results import Rows
from toyfeat.report.language import write_language


def main(path: str) -> None:
    """Gather what there is and write the page."""
    run = pipeline.opened(read_job(path))
    folder = Path(run.job.out)
    evaluation = Rows(folder / "evaluation.jsonl").rows
    decomposition = Rows(folder / "decompose.jsonl").rows
    if not evaluation and not decomposition:
        raise ValueError(f"{folder} has no scores yet; run scripts/evaluate.py first")
    latents = pipeline.looked_at(run)
    header = {
        "model": run.model.name,
        **asdict(run.job.collect),
        **asdict(run.job.train),
        "site": run.job.site,
    }
    page = write_language(folder, evaluation, decomposition, latents, header=header)
    print(f"the page is {page}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("name a job: examples/smollm2.toml")
    try:
        main(sys.argv[1])
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(str(error)) from None
