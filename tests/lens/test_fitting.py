"""The fit over many batches, its checkpoints, and the sketch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_lens_model import SKIP, hand_written_model, hand_written_params, windows

import toyfeat as ft
from toyfeat import lens as lenses

DIM = 5


def drifting(params, x, tap):
    """A small causal model of one product."""
    resid = tap("a", x)
    mixed = jnp.cumsum(jnp.tanh(resid @ params["w"]), axis=1)
    return tap("b", resid + mixed)


MODEL = lenses.from_probed(
    ft.from_function(drifting),
    sites=["a", "b"],
    unembed=lambda p, resid: resid,
    head=lambda p: jnp.eye(DIM),
)
DRAW = np.random.default_rng(0)
PARAMS = {"w": DRAW.normal(size=(DIM, DIM)).astype(np.float32)}
BATCHES = [(DRAW.normal(size=(2, 4, DIM)).astype(np.float32), None) for _ in range(5)]
ACC = lenses.mean_jacobian(MODEL, DIM, **SKIP)


class Stopped(Exception):
    pass


def test_a_fit_that_was_stopped_goes_on_and_ends_alike(tmp_path):
    seen = []
    whole = lenses.fit(
        MODEL, ACC, PARAMS, BATCHES, checkpoint_every=2, on_progress=seen.append
    )
    assert [(x.step, x.steps, x.prompts) for x in seen] == [
        (2, 5, 4),
        (4, 5, 8),
        (5, 5, 10),
    ]

    def stop(progress):
        if progress.step == 4:
            raise Stopped

    with pytest.raises(Stopped):
        lenses.fit(
            MODEL,
            ACC,
            PARAMS,
            BATCHES,
            checkpoint_every=2,
            on_progress=stop,
            directory=tmp_path,
        )
    rest = []
    state = lenses.fit(
        MODEL,
        ACC,
        PARAMS,
        BATCHES,
        checkpoint_every=2,
        on_progress=rest.append,
        directory=tmp_path,
    )
    assert [x.step for x in rest] == [5]
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), state, whole))
    # Nothing is left to do: the state is that of the checkpoint.
    again = lenses.fit(MODEL, ACC, PARAMS, BATCHES, directory=tmp_path)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), again, whole))
    wider = lenses.mean_jacobian(MODEL, DIM + 1, **SKIP)
    with pytest.raises(ValueError, match="choose another directory, or the same"):
        lenses.fit(MODEL, wider, PARAMS, BATCHES, directory=tmp_path)


def test_prompts_that_are_too_short_are_refused():
    inputs, mask = BATCHES[0][0], np.ones((2, 4))
    mask[0, 2:] = 0
    with pytest.raises(ValueError, match=r"lenses.fit: every prompt .* got 1 of 2"):
        lenses.fit(MODEL, ACC, PARAMS, [(inputs, mask)])
    mask[0] = 0  # a row of padding alone is no prompt
    assert int(lenses.fit(MODEL, ACC, PARAMS, [(inputs, mask)]).prompts) == 1
    with pytest.raises(ValueError, match=r"lenses.fit: batches must .* got none"):
        lenses.fit(MODEL, ACC, PARAMS, [])
    with pytest.raises(TypeError, match=r"accumulator must be a Accumulator"):
        lenses.fit(MODEL, None, PARAMS, BATCHES)


@pytest.mark.slow
def test_a_sketch_of_full_rank_is_exact_and_one_of_less_has_its_error():
    model, params = hand_written_model(), hand_written_params(np.float32)
    tokens = windows(3) % 11
    acc = lenses.mean_jacobian(model, DIM, **SKIP)
    exact = jax.jit(lambda p, x: acc.finish(acc.update(acc.init(), p, x)))(
        params, tokens
    )
    site = "block_1"
    for rank in (DIM, 2):
        sketch = lenses.sketched_jacobian(
            jax.random.key(0), model, params, tokens, rank, sites=(site,), **SKIP
        )
        truth = np.asarray(exact.matrices[site])
        tail = np.linalg.svd(truth - np.eye(DIM))[1][rank:]
        error = np.linalg.norm(sketch.matrices[site] - truth)
        np.testing.assert_allclose(error, np.linalg.norm(tail), rtol=1e-2, atol=1e-4)
        np.testing.assert_allclose(sketch.standard_error[site], error, atol=1e-3)
    assert sketch.prompts == 3
    lens = lenses.jacobian_lens(model, params, sketch)
    assert lens.read(site, np.ones((2, DIM), np.float32)).shape == (2, 11)
    with pytest.raises(ValueError, match="rank must be an int in 1"):
        lenses.sketched_jacobian(jax.random.key(0), model, params, tokens, 6, **SKIP)
    with pytest.raises(ValueError, match=r"longer than the 17 positions"):
        lenses.sketched_jacobian(jax.random.key(0), model, params, tokens, 2)
