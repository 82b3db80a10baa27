"""A task of your own and a method of your own, scored like those of the leaderboard.

    python examples/own_method.py

docs/extending.md says how either becomes a row of the leaderboard.
"""

# %% A task: squares of sparse features, each with a reader of its own
import jax
import jax.numpy as jnp

import toyfeat as ft


def squares_of_features(key, features=6, dim=16):
    """Make a task whose output is the square of what each reader reads."""
    writer_key, reader_key = jax.random.split(key)
    writers = jax.random.normal(writer_key, (features, dim))
    other = jax.random.normal(reader_key, (features, dim))
    dual = jnp.linalg.pinv(writers).T  # reads a feature and no other one
    readers = dual + other - other @ writers.T @ dual

    def sample(key, num):
        size_key, active_key = jax.random.split(key)
        sizes = jax.random.uniform(size_key, (num, features), minval=0.5, maxval=1.5)
        active = jax.random.bernoulli(active_key, 0.2, (num, features))
        return jnp.where(active, sizes, 0.0)

    return ft.planted.Task(
        probed=ft.from_split(
            lambda params, codes: codes @ params["writers"],
            lambda params, acts: (acts @ params["readers"].T) ** 2,
            site="acts",
        ),
        params={"writers": writers, "readers": readers},
        sample=sample,
        site="acts",
        truth=ft.planted.Truth(readers, writers, jnp.full(features, 0.2)),
        side="readers",
        name="squares of features",
        features=lambda params, codes: codes,
        fit=0.0,
        ignored=None,
        about=f"{features} squares of sparse features in {dim} dimensions.",
        limits="Nothing is hidden.",
    )


# %% A method: the gradients with the largest norms, one after the other
def greedy_gradients(key, subject, *, num=6):
    """Take the longest gradient, remove its direction from all others, and again."""
    inputs = subject.sample(key, 2000)
    readout = ft.readouts.half_squared_norm()
    taps = ft.tap(
        subject.probed, subject.params, inputs, sites=subject.site, readout=readout
    )[subject.site]
    rows, found = jnp.asarray(taps.grads)[:, 0], []
    for _ in range(num):
        length = jnp.linalg.norm(rows, axis=1)
        direction = rows[length.argmax()] / length.max()
        found.append(direction)
        rows = rows - (rows @ direction)[:, None] * direction
    readers = jnp.stack(found)
    return ft.Features(readers, readers)


# %% Scores, beside the consensus
task = squares_of_features(jax.random.key(0))
subject = ft.planted.subject_of(task)
methods = {
    "greedy gradients": greedy_gradients,
    "consensus": lambda key, subject: ft.consensus(key, subject).features,
}
coverage = {}
for name, method in methods.items():
    features = method(jax.random.key(1), subject)
    scores = ft.metrics.score_task(jax.random.key(2), task, features)
    coverage[name] = scores.readers
    print(f"{name}: coverage {scores.readers:.2f}, precision {scores.precision:.2f}")
