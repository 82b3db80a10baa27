"""Check that the examples of a batch do not influence each other."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from toyfeat.checks import check_function, check_key
from toyfeat.tap.checks import to_numpy
from toyfeat.tap.probes import infer_batch_size, is_float_array
from toyfeat.types import Array, Inputs, Params, Probed

# Relative change that counts as rounding: 100 epsilons in float32 and float64.  In a
# narrow dtype that would be most of the value (0.8 in bfloat16), so there it is 4
# epsilons and an offset for what was summed in float32 before it was rounded.
_ROUNDINGS = 1e2
_NARROW_ROUNDINGS = 4
_NARROW_OFFSET = 1e-4


def check_no_mixing(
    probed: Probed, params: Params, inputs: Inputs, *, key: Array | None = None
) -> None:
    """Raise if the examples of a batch influence each other.

    Per-example gradients come from one backward pass of a whole batch, which is
    right only if example ``i`` of the outputs depends on example ``i`` of the
    inputs alone.  Batch normalisation in training mode breaks this, as does any
    attention or routing across the batch.  Some examples are changed (other inputs,
    noise at every site) while the others must keep their values, for splits of the
    batch that separate every pair of examples: ``2 log2(B)`` runs.

    Args:
      probed: the model.
      params: its parameters.
      inputs: at least two inputs.
      key: for the noise; a fixed key by default.

    Raises:
      ValueError: if the batch has fewer than two inputs, if examples mix (the message
        names the sites, or the outputs), or if values of an example are all NaN, in
        which no change can be seen.
      TypeError: inside jit, or if an argument has the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> import toyfeat as ft
      >>> centred = ft.from_split(
      ...     lambda p, x: x - x.mean(0, keepdims=True), lambda p, a: a
      ... )
      >>> check_no_mixing(centred, None, jnp.arange(6.0).reshape(3, 2))
      Traceback (most recent call last):
      ValueError: check_no_mixing: examples of a batch influence each other at site...
    """
    check_function("check_no_mixing", "probed", probed, "from ft.from_linen, ...")
    if key is not None:
        check_key("check_no_mixing", key)
    size = infer_batch_size(inputs)
    if size < 2:
        raise ValueError(
            f"check_no_mixing: needs at least two inputs to compare, got {size}; "
            "give a larger batch"
        )
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((params, inputs))):
        raise TypeError("check_no_mixing: looks at values, so call it outside of jit")
    inputs = jax.tree.map(jnp.asarray, inputs)
    run, order = _compiled(probed, params)
    # The sites, without running the model, and their values without noise.
    shapes = jax.eval_shape(run, inputs, np.arange(size), {})
    _check_output_axes(shapes[0], size)
    sites = {s: shapes[1][s] for s in order if shapes[1][s].shape[:1] == (size,)}
    no_noise = {s: np.zeros(a.shape, np.float32) for s, a in sites.items()}
    before = jax.device_get(run(inputs, np.arange(size), no_noise))
    _check_comparable(before, sites)
    draws = _draw_noise(key, before[1], sites)
    # Two rows differ in some bit of their index, so every pair is told apart.
    for bit in range((size - 1).bit_length()):
        for value in (0, 1):
            fixed = ((np.arange(size) >> bit) & 1) == value
            # The other rows get the inputs of a neighbour, and noise at every site.
            rows = np.where(fixed, np.arange(size), np.roll(np.arange(size), 1))
            noise = {
                s: np.where(fixed.reshape(-1, *(1,) * (d.ndim - 1)), np.float32(0), d)
                for s, d in draws.items()
            }
            after = jax.device_get(run(inputs, rows, noise))
            _check_fixed_rows(before, after, fixed, sites)


def _compiled(probed: Probed, params: Params) -> tuple[Any, list[str]]:
    """Compile a model whose arrays are arguments, not constants of the program.

    Returns:
      The function of inputs, the rows of them to run and probes; the names of the
      sites in the order of the model, which are there once it was traced.
    """
    leaves, tree = jax.tree.flatten(params)
    # What a model may look at while it is traced (sizes, keys, arrays of NumPy) stays
    # as it is.
    traced = [
        isinstance(leaf, jax.Array) and is_float_array(leaf) and leaf.ndim > 0
        for leaf in leaves
    ]
    arrays = [x for x, is_traced in zip(leaves, traced, strict=True) if is_traced]
    order: list[str] = []

    @jax.jit
    def run(arrays: list[Array], inputs: Any, rows: Array, noise: Any) -> Any:
        inputs = jax.tree.map(lambda leaf: leaf[rows], inputs)
        given = iter(arrays)
        pairs = zip(leaves, traced, strict=True)
        merged = [next(given) if is_traced else x for x, is_traced in pairs]
        outputs, acts = probed(jax.tree.unflatten(tree, merged), inputs, noise)
        order[:] = acts
        return outputs, acts

    return partial(run, arrays), order


def _draw_noise(
    key: Array | None, acts: dict[str, np.ndarray], sites: Any
) -> dict[str, np.ndarray]:
    """Draw noise for every site, at least of the size of its values.

    On the host: a program per shape would take longer to compile than all the rest.
    """
    words = np.zeros(1, np.uint32) if key is None else jax.random.key_data(key)
    rng = np.random.default_rng(np.asarray(words).ravel())
    noise = {}
    for site in sites:
        act = np.abs(np.asarray(acts[site], np.float32))
        largest = np.max(act, initial=0.0, where=np.isfinite(act))
        draw = rng.standard_normal(act.shape, np.float32)
        # Masked scores may be as large as the type goes; a draw is less than 8.
        noise[site] = np.minimum(1 + largest, np.finfo(np.float32).max / 16) * draw
    return noise


def _check_output_axes(outputs: Any, size: int) -> None:
    """Raise if an output does not have the leading batch axis."""
    for leaf in jax.tree.leaves(outputs):
        if jnp.shape(leaf)[:1] != (size,):
            raise ValueError(
                f"check_no_mixing: the outputs must have leading batch axis {size}, "
                f"got shape {jnp.shape(leaf)}; do not reduce over the batch"
            )


def _check_comparable(before: Any, sites: Any) -> None:
    """Raise if all values of an example are NaN, which is never seen to change."""
    outputs, acts = before
    named = [(f"site {site!r}", acts[site]) for site in sites]
    named += [("the outputs", leaf) for leaf in jax.tree.leaves(outputs)]
    for name, value in named:
        nan = np.atleast_1d(np.isnan(to_numpy("check_no_mixing", value)))
        blind = nan.reshape(len(nan), -1).all(axis=1) & (nan.size > 0)
        if blind.any():
            raise ValueError(
                f"check_no_mixing: wants finite values to compare, got {name} all NaN "
                f"in {int(blind.sum())} of {len(nan)} examples, the first of them "
                f"{int(np.argmax(blind))}; look at the parameters and the inputs"
            )


def _check_fixed_rows(before: Any, after: Any, fixed: np.ndarray, sites: Any) -> None:
    """Raise if a site or an output changed in the rows whose inputs did not."""
    (outputs, acts), (outputs2, acts2) = before, after
    changes = {f"site {s!r}": _change(acts[s], acts2[s], fixed) for s in sites}
    pairs = zip(jax.tree.leaves(outputs), jax.tree.leaves(outputs2), strict=True)
    changes["the outputs"] = max(_change(a, b, fixed) for a, b in pairs)
    wrong = [name for name, change in changes.items() if change > 0]
    if wrong:
        raise ValueError(
            "check_no_mixing: examples of a batch influence each other at "
            f"{', '.join(wrong[:8])}: changing some examples moved others by up to "
            f"{max(changes.values()):.3g}; per-example gradients would be wrong. "
            "Switch batch statistics to evaluation mode, or map the model over examples"
        )


def _change(before: Array, after: Array, fixed: np.ndarray) -> float:
    """Return the largest change in the fixed rows that is no rounding, or 0."""
    eps = float(jnp.finfo(before.dtype).eps) if is_float_array(before) else 0.0
    a = to_numpy("check_no_mixing", before)[fixed].astype(np.float64)
    b = to_numpy("check_no_mixing", after)[fixed].astype(np.float64)
    # Equal entries do not differ, infinite ones and NaN included.
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    change = np.abs(np.where(same, 0.0, a) - np.where(same, 0.0, b))
    change = np.where(np.isnan(change), np.inf, change)
    # Rounding is relative to the largest finite entry.
    finite = np.abs(a[np.isfinite(a)])
    rounding = min(_ROUNDINGS * eps, _NARROW_ROUNDINGS * eps + _NARROW_OFFSET)
    allowed = rounding * np.max(finite, initial=0.0)
    return float(np.max(np.where(change > allowed, change, 0.0), initial=0.0))
