"""Checks of taps and models that need concrete values and run outside of jit."""

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from toyfeat.checks import check_function, check_key
from toyfeat.tap.probes import infer_batch_size, is_float_array
from toyfeat.types import Array, Inputs, Params, Probed, Taps

# Relative change that counts as rounding: 100 epsilons in float32 and float64.  In a
# narrow dtype that would be most of the value (0.8 in bfloat16), so there it is 4
# epsilons and an offset for what was summed in float32 before it was rounded.
_ROUNDINGS = 1e2
_NARROW_ROUNDINGS = 4
_NARROW_OFFSET = 1e-4

# Share of the gradients that are not 0 from which underflow is reported, if that many
# are near it: below that the second moments, sums of squares, lose next to nothing.
_UNDERFLOW_SHARE = 0.1

# Multiple of the smallest float16 up to which rounding is more than 1/16 of a value.
_COARSE_FLOAT16 = 8

# Multiple of the smallest normal number of other types up to which as many entries lie
# as below it, where a device has flushed them to 0: one octave.
_NEAR_UNDERFLOW = 2


def check_taps(taps: Taps | Mapping[str, Taps]) -> None:
    """Raise if taps hold NaN, infinite values or invalid weights.

    Gradients that are all 0, or many of which underflowed, are no error (a site that
    nothing reads has none) but hold nothing to analyse: a warning says so.

    Args:
      taps: taps of one site, or site name to taps.

    Raises:
      ValueError: if the activations or gradients of a site have entries that are
        not finite in examples of positive weight (says how many and where the
        first is), if a weight is negative or not finite, or if no example has
        weight, or shapes do not fit.
      TypeError: inside jit, where values are not known, and for what are no taps.

    Warns:
      UserWarning: if all gradients of a site are 0 in the examples that count, or
        many are as small as its dtype can tell.

    Example:
      >>> import jax.numpy as jnp
      >>> acts = jnp.array([[1.0, jnp.nan]])
      >>> check_taps({"mlp": Taps(acts, None, jnp.ones(1))})
      Traceback (most recent call last):
      ValueError: check_taps: site 'mlp' has 1 non-finite of 2 entries in acts, ...
    """
    by_site = {"": taps} if isinstance(taps, Taps) else taps
    if not isinstance(by_site, Mapping) or not by_site:
        raise TypeError(
            f"check_taps: taps must be Taps or a dict of them, got {taps!r:.80}; pass "
            "what ft.tap returned"
        )
    for name, site_taps in by_site.items():
        who = f"site {name!r}" if name else "the taps"
        if not isinstance(site_taps, Taps):
            raise TypeError(
                f"check_taps: {who} must be Taps, got {type(site_taps).__name__}; pass "
                "what ft.tap returned"
            )
        _check_site(who, site_taps)
        warn_of_lost_grads(f"check_taps: {who}", site_taps, stacklevel=3)


def _check_site(who: str, taps: Taps) -> None:
    """Check the shapes and weights of a site, then its activations and gradients."""
    _check_shapes(who, taps)
    weights = _to_numpy("check_taps", taps.weights)
    if not np.all(np.isfinite(weights)) or np.any(weights < 0):
        raise ValueError(
            f"check_taps: {who} must have finite weights >= 0, got "
            f"{weights[~(weights >= 0) | ~np.isfinite(weights)][:3]}; mend the "
            "readout's mask"
        )
    counted = weights > 0
    if not counted.any():
        raise ValueError(
            f"check_taps: {who} has no example of positive weight among "
            f"{weights.size}; the readout's mask leaves out everything, change it"
        )
    for field in ("acts", "grads", "targets"):
        value = getattr(taps, field)
        if value is None:
            continue
        # Examples of weight 0 may hold anything.
        value = _to_numpy("check_taps", value)
        bad = ~np.isfinite(value) & counted.reshape((-1, *(1,) * (value.ndim - 1)))
        if bad.any():
            first = np.argwhere(bad)[0]
            raise ValueError(
                f"check_taps: {who} has {int(bad.sum())} non-finite of {value.size} "
                f"entries in {field}, the first in example {first[0]}; look at its "
                "input, the readout's scale and the dtype"
            )


def _check_shapes(who: str, taps: Taps) -> None:
    """Raise unless the arrays of a site have the shapes of taps."""
    num, width = jnp.shape(taps.acts)[:1], jnp.shape(taps.acts)[1:]
    outputs = width if taps.targets is None else jnp.shape(taps.targets)[1:]
    fits = len(width) == 1 and len(outputs) == 1 and jnp.shape(taps.weights) == num
    if taps.targets is not None:
        fits = fits and jnp.shape(taps.targets)[:1] == num
    if taps.grads is not None:
        shape = jnp.shape(taps.grads)
        fits = fits and len(shape) == 3 and shape[:1] == num and shape[2:] == outputs
    if not fits:
        named = taps._asdict().items()
        got = ", ".join(f"{k} {list(jnp.shape(v))}" for k, v in named if v is not None)
        raise ValueError(
            f"check_taps: {who} must have acts [N, D], grads [N, K, D] and weights "
            f"[N], got {got}; flatten positions to examples as ft.tap does"
        )


def warn_of_lost_grads(who: str, taps: Taps, *, stacklevel: int) -> None:
    """Warn of gradients that are all 0, or many of which underflowed.

    Args:
      who: the function and what it looks at, which begin the message.
      taps: of a site; concrete.
      stacklevel: as of ``warnings.warn``, seen from the caller of this function.
    """
    if taps.grads is None or isinstance(taps.grads, Tracer):
        return
    # Magnitudes of the entries that are not 0 in examples that count.
    grads = np.asarray(taps.grads)[np.asarray(taps.weights) > 0]
    sizes = np.abs(grads[grads != 0].astype(np.float64))
    if not grads.size:
        return
    advice = "scale the readout up, or take gradients in float32 or bfloat16"
    if not sizes.size:
        narrow = grads.dtype.itemsize < np.dtype(np.float32).itemsize
        warnings.warn(
            f"{who} wants gradients, got {grads.size} that are all 0: nothing that is "
            "differentiated reads the site (behind a stop_gradient, a head of 0, "
            "another branch)"
            + (f", or all underflowed in {grads.dtype}; {advice}" if narrow else "")
            + "; take another site or readout",
            stacklevel=stacklevel + 1,
        )
        return
    # Entries of which few digits are left, or as many as were flushed to 0.
    info = jnp.finfo(grads.dtype)
    limit = _NEAR_UNDERFLOW * float(info.tiny)
    if info.dtype == np.float16:
        limit = _COARSE_FLOAT16 * float(info.smallest_subnormal)
    share = np.mean(sizes < limit)
    if share > _UNDERFLOW_SHARE:
        warnings.warn(
            f"{who} wants gradients of full precision, got {grads.dtype} of which "
            f"{share:.0%} of those but 0 are below {limit:.2g}, so that others "
            f"underflowed to 0; {advice}",
            stacklevel=stacklevel + 1,
        )


def _to_numpy(who: str, value: Any) -> np.ndarray:
    """Convert a concrete array to float32 or float64 NumPy."""
    if isinstance(value, Tracer):
        raise TypeError(f"{who}: looks at values, so call it outside of jit and grad")
    value = jnp.asarray(value)
    return np.asarray(value, np.float64 if value.dtype == np.float64 else np.float32)


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
        noise[site] = (1 + largest) * draw
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
        nan = np.atleast_1d(np.isnan(_to_numpy("check_no_mixing", value)))
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
    a = _to_numpy("check_no_mixing", before)[fixed].astype(np.float64)
    b = _to_numpy("check_no_mixing", after)[fixed].astype(np.float64)
    # Equal entries do not differ, infinite ones and NaN included.
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    change = np.abs(np.where(same, 0.0, a) - np.where(same, 0.0, b))
    change = np.where(np.isnan(change), np.inf, change)
    # Rounding is relative to the largest finite entry.
    finite = np.abs(a[np.isfinite(a)])
    rounding = min(_ROUNDINGS * eps, _NARROW_ROUNDINGS * eps + _NARROW_OFFSET)
    allowed = rounding * np.max(finite, initial=0.0)
    return float(np.max(np.where(change > allowed, change, 0.0), initial=0.0))
