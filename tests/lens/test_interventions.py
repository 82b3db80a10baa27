"""Steering, ablation and swaps, and the defects that they must not have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_lens_model import Linen

import toyfeat as ft
from toyfeat import lens as lenses

DIM, SITES = 6, ["a", "b", "c", "d"]


def passing(params, x, tap):
    """Streams that are passed on as they are."""
    for site in SITES:
        x = tap(site, x)
    return x


MODEL = lenses.from_probed(
    ft.from_function(passing),
    sites=SITES,
    unembed=lambda p, resid: resid @ p["head"],
    head=lambda p: p["head"],
)
DRAW = np.random.default_rng(0)
PARAMS = {"head": DRAW.normal(size=(DIM, 9)).astype(np.float32)}
X = DRAW.normal(size=(2, 3, DIM)).astype(np.float32)
ROWS = DRAW.normal(size=(2, DIM)).astype(np.float32)


def coordinates(x, rows=ROWS):
    return x @ np.linalg.pinv(rows)


def close(logits, stream):
    np.testing.assert_allclose(logits, stream @ PARAMS["head"], atol=2e-5)


def test_steering_adds_the_vector_where_it_is_told():
    places = np.array([[1, 0, 0], [0, 0, 1]])
    logits = lenses.steer(
        MODEL, PARAMS, X, {"b": ROWS[0]}, strength=3.0, positions=places
    )
    close(logits, X + 3 * places[..., None] * ROWS[0])


def test_ablation_takes_the_span_to_its_mean():
    mean = DRAW.normal(size=DIM).astype(np.float32)
    for means, centre in ((None, np.zeros(DIM)), ({"c": mean}, mean)):
        logits = lenses.ablate(MODEL, PARAMS, X, {"c": ROWS}, means=means)
        stream = X - coordinates(X - centre) @ ROWS
        close(logits, stream)
        np.testing.assert_allclose(
            coordinates(stream),
            np.broadcast_to(coordinates(centre), (2, 3, 2)),
            atol=1e-5,
        )


@pytest.mark.parametrize("strength", [1.0, 0.3, 2.0])
def test_a_swap_at_one_site_is_the_published_one(strength):
    logits = lenses.swap(MODEL, PARAMS, X, {"b": ROWS}, [1, 0], strength=strength)
    change = coordinates(X)[..., [1, 0]] - coordinates(X)
    close(logits, X + strength * change @ ROWS)


@pytest.mark.parametrize("strength", [1.0, 2.0])
@pytest.mark.parametrize("num", [2, 3, 4])
def test_swaps_at_several_layers_neither_cancel_nor_diverge(num, strength):
    """A live swap undoes itself at every second layer, and doubles with strength 2."""
    vectors = dict.fromkeys(SITES[:num], ROWS)
    logits = lenses.swap(MODEL, PARAMS, X, vectors, [1, 0], strength=strength)
    alone = lenses.swap(MODEL, PARAMS, X, {"a": ROWS}, [1, 0], strength=strength)
    np.testing.assert_allclose(logits, alone, atol=1e-4)
    clean = MODEL.unembed(PARAMS, X)
    assert np.abs(logits - clean).max() > 0.1


def test_raw_vectors_are_nearly_parallel_and_centred_ones_are_not():
    """An offset that all tokens share: the swap of centred vectors does not see it."""
    head = PARAMS["head"] + 50.0
    params = {"head": head}
    plain = lenses.logit_lens(MODEL, params)
    raw = plain.vectors([0, 1], centred=False)["a"]
    centred = plain.vectors([0, 1])["a"]

    def cosine(pair):
        return pair[0] @ pair[1] / np.linalg.norm(pair[0]) / np.linalg.norm(pair[1])

    assert cosine(raw) > 0.99
    assert abs(cosine(centred)) < 0.9
    wanted = PARAMS["head"][:, [0, 1]].T - PARAMS["head"].mean(1)
    np.testing.assert_allclose(centred, wanted, atol=1e-4)


def test_dropout_is_refused():
    net, tokens = Linen(dropout=0.5), jnp.arange(6).reshape(2, 3)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    model = lenses.from_probed(
        ft.from_linen(net, rngs={"dropout": jax.random.key(1)}),
        sites=["drop", "drop#1"],
        unembed=lambda p, resid: resid,
    )
    with pytest.raises(ValueError, match=r"steer: .*evaluation mode"):
        lenses.steer(model, net.init(keys, tokens), tokens, {"drop": jnp.ones(6)})


def test_the_control_keeps_lengths_and_angles():
    drawn = lenses.random_control(jax.random.key(0), {"a": ROWS, "b": ROWS})
    for rows in drawn.values():
        np.testing.assert_allclose(rows @ rows.T, ROWS @ ROWS.T, rtol=1e-4)
    assert np.abs(drawn["a"] - drawn["b"]).max() > 0.1
    assert np.abs(drawn["a"] - ROWS).max() > 0.1


@pytest.mark.parametrize(
    ("vectors", "options", "error", "match"),
    [
        ({"z": ROWS}, {}, ValueError, r"has the streams \['a', .* got 'z'"),
        ({"a": ROWS[:, 1:]}, {}, ValueError, r"must be \[n, 6\], got shape \(2, 5\)"),
        ({"a": ROWS[0]}, {}, ValueError, r"must be \[n, 6\], got shape \(6,\)"),
        (ROWS, {}, TypeError, "vectors must be arrays by site, got ndarray"),
        ({"a": [1.0]}, {}, TypeError, "vectors must be arrays by site"),
        (
            {"a": ROWS},
            {"order": [0]},
            ValueError,
            r"permutation of .*got \[0\]",
        ),
        ({"a": ROWS}, {"order": [1, 1]}, ValueError, r"got \[1, 1\]; \[1, 0\] swaps"),
        ({"a": ROWS}, {"strength": np.nan}, ValueError, "strength must be a finite"),
        ({"a": ROWS}, {"positions": np.ones(3)}, ValueError, r"positions .* \(2, 3\)"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(vectors, options, error, match):
    options = {"order": [1, 0], **options}
    with pytest.raises(error, match=f"swap: .*{match}"):
        lenses.swap(MODEL, PARAMS, X, vectors, **options)
