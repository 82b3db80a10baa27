"""Activations and gradients at several sites from one forward and backward pass."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from toyfeat.checks import check_function, check_int
from toyfeat.meshes import by_rows, run_automatic, split_like
from toyfeat.tap.chunks import check_chunks, map_chunks
from toyfeat.tap.probes import (
    check_params,
    check_sites,
    infer_batch_size,
    is_float_array,
)
from toyfeat.tap.rules import Chunk, Readout, check_readout, make_chunk
from toyfeat.types import Acts, Array, Inputs, Outputs, Params, Probe, Probed, Taps


def tap(
    probed: Probed,
    params: Params,
    inputs: Inputs,
    *,
    sites: str | Sequence[str],
    readout: Readout | None,
    batch_size: int | None = None,
) -> dict[str, Taps]:
    r"""Return activations and activation gradients at the sites of a model.

    Zero probes are added at the sites and differentiated, all in one backward
    pass, so no gradient of a parameter is ever formed.  All axes of a site but
    the first (batch) and the last (width ``D``) are positions; the gradient of
    an input's readout is read at each of its positions, and the ``N`` examples
    are inputs times positions, input-major.

    The function is pure and is not jitted here; wrap the call in ``jax.jit``
    with ``params``, ``inputs`` and ``readout`` as arguments, and it is traced
    once for all batches of a shape.

    Args:
      probed: the model, from one of the ``from_*`` adapters.
      params: its parameters.
      inputs: pytree whose leaves have leading axis ``B``.
      sites: one name or several (see :func:`toyfeat.site_shapes`).
      readout: which gradients (see :mod:`toyfeat.tap.readouts`); ``None`` for
        activations only.
      batch_size: how many inputs to run at a time, to bound memory.  The
        result does not depend on it: a model that draws random numbers for a whole
        batch (dropout), or that computes statistics over it, is refused.

    Returns:
      For each site ``Taps(acts [N, D], grads [N, K, D], weights [N])``, acts and
      grads in the dtype of the site.  Small gradients are 0 in float16, which
      :func:`toyfeat.check_taps` warns of; scale the readout up.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: for an unknown site, a site without batch or feature axis,
        labels, masks or cotangents of the wrong shape, several outputs or none where
        the readout needs one, labels that the outputs do not have (where they are
        concrete), or a ``batch_size`` that would change the result.

    Example:
      >>> import jax.numpy as jnp
      >>> import toyfeat as ft
      >>> probed = ft.from_split(lambda p, x: x @ p, lambda p, a: a.sum(-1))
      >>> taps = ft.tap(
      ...     probed, jnp.eye(3), jnp.ones((4, 3)),
      ...     sites="acts", readout=ft.readouts.scalar(lambda y: y**2),
      ... )["acts"]
      >>> taps.acts.shape, taps.grads.shape, taps.grads[0, 0].tolist()
      ((4, 3), (4, 1, 3), [6.0, 6.0, 6.0])
    """
    names = _check_names(sites)
    hint = "pass one; from_nnx, from_equinox and from_penzai return a pair, "
    hint += "probed, params = from_nnx(model)"
    where = "from ft.from_linen, ft.from_function, ..."
    check_function("tap", "probed", probed, where, hint=hint)
    run = partial(_tap_batch, probed, names, batch_size)
    taps = run_automatic(run, by_rows(inputs), params, inputs, readout)
    return {name: taps[name] for name in names}  # a mesh sorts names


def _tap_batch(
    probed: Probed,
    names: tuple[str, ...],
    batch_size: int | None,
    params: Params,
    inputs: Inputs,
    readout: Readout | None,
) -> dict[str, Taps]:
    """Check what is tapped, and tap it, in chunks if need be."""
    size = infer_batch_size(inputs)
    if batch_size is not None:
        batch_size = check_int("tap", "batch_size", batch_size)
    check_readout(readout, size)
    # Check sites, mask and outputs by shape, before anything runs.
    outputs, shapes = _model_shapes(probed, params, inputs)
    shapes = _select_sites(names, shapes, size, readout)
    if readout is not None:
        _check_outputs(outputs, size)
    # What is split into chunks: one row per input.
    per_input = (
        inputs,
        None if readout is None else readout.labels,
        None if readout is None else readout.mask,
        jnp.arange(size),
    )

    def taps_of(chunk: Any) -> dict[str, Taps]:
        inputs, labels, mask, index = chunk
        return _tap_chunk(probed, params, inputs, shapes, readout, labels, mask, index)

    if batch_size is None or batch_size >= size:
        return taps_of(per_input)
    # In chunks labels are traced, so concrete ones are checked with the shapes.
    check_chunks(probed, params, inputs, size, batch_size)
    if readout is not None and readout.key is None:
        chunk = Chunk(readout.labels, readout.shared, None)
        jax.eval_shape(lambda y: readout.rule(readout.options, y, chunk), outputs)
    return map_chunks(taps_of, per_input, size, batch_size)


def _check_names(sites: Any) -> tuple[str, ...]:
    """Return the names of the sites, or raise."""
    try:
        names = (sites,) if isinstance(sites, str) else tuple(sites)
    except TypeError:
        names = (sites,)
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise TypeError(
            f"tap: sites must be a name or several names, got {wrong[0]!r:.80}; "
            "ft.site_shapes lists them"
        )
    if not names:
        raise ValueError(
            "tap: sites must be a name or several names, got none, sites is empty; "
            "name at least one site"
        )
    return names


def _model_shapes(probed: Probed, params: Params, inputs: Inputs) -> tuple[Any, Any]:
    """Return the shapes of the outputs and of the sites of a model."""
    check_params(params, "tap")
    order: list[str] = []  # of the sites, which a dict that leaves a trace loses

    def run(params: Params, inputs: Inputs) -> Any:
        result = probed(params, inputs, {})
        if isinstance(result, tuple) and isinstance(result[-1], dict):
            order[:] = result[-1]
        return result

    result = jax.eval_shape(run, params, inputs)
    pair = isinstance(result, tuple) and len(result) == 2
    if not pair or not isinstance(result[1], dict):
        raise TypeError(
            "tap: probed must return outputs and a dict of activations, got "
            f"{jax.tree.structure(result)}; make it with ft.from_linen, ft.from_nnx or "
            "ft.from_function"
        )
    return result[0], {site: result[1][site] for site in order}


def _tap_chunk(
    probed: Probed,
    params: Params,
    inputs: Inputs,
    shapes: dict[str, Any],
    readout: Readout | None,
    labels: Any,
    mask: Array | None,
    index: Array,
) -> dict[str, Taps]:
    """Run one chunk of inputs with zero probes and differentiate its readout."""
    zeros = {
        site: jnp.zeros((index.size, *shape.shape[1:]), shape.dtype)
        for site, shape in shapes.items()
    }
    sites = tuple(zeros)

    def run(probes: Any) -> tuple[Outputs, Acts]:
        outputs, acts = probed(params, inputs, probes)
        return outputs, {s: acts[s] for s in sites}

    grads: dict[str, Array] = {}
    if readout is None:
        acts = run({})[1]
    else:
        chunk = make_chunk(readout, labels, index)

        def cotangents(outputs: Outputs) -> Outputs:
            return readout.rule(readout.options, outputs, chunk)

        # One backward pass for all sites; along a path one per site and scale.
        if readout.scales is None:
            grads, acts = _gradients(run, zeros, cotangents)
        else:
            acts = run({})[1]
            grads = _path_gradients(run, zeros, cotangents, readout.scales)
    return {
        site: _as_examples(acts[site], grads.get(site), mask, inputs) for site in sites
    }


def _as_examples(acts: Array, grads: Any, mask: Any, inputs: Inputs) -> Taps:
    """Flatten inputs and positions; the K readouts go before the width."""
    split = partial(split_like, tree=inputs)
    if grads is not None:
        grads = split(_flatten(jnp.moveaxis(grads, 0, -2), 2))
    return Taps(split(_flatten(acts)), grads, split(_example_weights(mask, acts.shape)))


def _flatten(x: Array, trailing: int = 1) -> Array:
    """Flatten all axes but the ``trailing`` last."""
    return x.reshape((-1, *x.shape[x.ndim - trailing :]))


def _gradients(
    run: Callable[[Any], tuple[Outputs, Acts]],
    zeros: dict[str, Array],
    cotangents: Callable[[Outputs], Outputs],
) -> tuple[dict[str, Array], Acts]:
    """Differentiate by zero probes: gradients ``[K, B, ..., D]``, and the acts."""

    # A zero added to an activation has the gradient of the activation itself.
    def forward(probes: dict[str, Array]) -> tuple[list[Array], tuple[Outputs, Acts]]:
        outputs, acts = run(probes)
        floats = [leaf for leaf in jax.tree.leaves(outputs) if is_float_array(leaf)]
        return floats, (outputs, acts)

    # One forward pass, then one pullback per readout: g = J^T cotangent.
    _, pullback, (outputs, acts) = jax.vjp(forward, zeros, has_aux=True)
    floats = _float_cotangents(cotangents(outputs), outputs)
    return jax.vmap(lambda c: pullback(c)[0])(floats), acts


def _float_cotangents(cotangents: Outputs, outputs: Outputs) -> list[Array]:
    """Select and check the cotangents of float outputs, in the outputs' dtypes."""
    # Integer outputs have no gradient, so that their cotangents are left out.
    leaves, structure = jax.tree.flatten(outputs)
    if jax.tree.structure(cotangents) != structure:
        raise ValueError(
            "tap: the readout's cotangents must have the structure of the outputs "
            f"{structure}, got {jax.tree.structure(cotangents)}"
        )
    pairs = [
        (c, y)
        for c, y in zip(jax.tree.leaves(cotangents), leaves, strict=True)
        if is_float_array(y)
    ]
    # One K for all outputs, and the shape of each output behind it.
    num = {jnp.shape(c)[:1] for c, _ in pairs}
    wrong = [(jnp.shape(c), y.shape) for c, y in pairs if jnp.shape(c)[1:] != y.shape]
    if wrong or len(num) != 1:
        raise ValueError(
            "tap: a readout needs cotangents [K, *output.shape] with one K for all "
            f"outputs, got {[jnp.shape(c) for c, _ in pairs]} for outputs "
            f"{[y.shape for _, y in pairs]}"
        )
    return [jnp.asarray(c).astype(y.dtype) for c, y in pairs]


def _path_gradients(
    run: Callable[[Any], tuple[Outputs, Acts]],
    zeros: dict[str, Array],
    cotangents: Callable[[Outputs], Outputs],
    scales: Array,
) -> dict[str, Array]:
    """Gradients ``[S * K, B, ..., D]`` at scaled activations, site by site."""

    # Only the site itself is scaled, and what follows from it; then differentiated.
    def gradients_at(site: str, scale: Array) -> Array:
        def run_scaled(deltas: dict[str, Array]) -> tuple[Outputs, Acts]:
            def probe(act: Array) -> Array:
                return act * scale.astype(act.dtype) + deltas[site]

            probes: dict[str, Probe] = {site: probe}
            return run(probes)

        return _gradients(run_scaled, {site: zeros[site]}, cotangents)[0][site]

    # One scale at a time, which bounds the memory to that of one gradient.
    stacked = {
        s: jax.lax.map(lambda scale, s=s: gradients_at(s, scale), scales) for s in zeros
    }
    return {s: g.reshape((-1, *g.shape[2:])) for s, g in stacked.items()}


def _select_sites(
    sites: tuple[str, ...], shapes: Any, size: int, readout: Readout | None
) -> dict[str, Any]:
    """Select the shapes of the sites to tap; check them and the mask."""
    check_sites(sites, shapes, who="tap")
    for site in sites:
        shape = shapes[site].shape
        if len(shape) < 2 or shape[0] != size:
            raise ValueError(
                f"tap: site {site!r} must have shape [B, ..., D] with B = {size}, got "
                f"{shape}; give the model a batch axis there"
            )
        if not shape[-1]:
            raise ValueError(
                f"tap: site {site!r} must have a width of at least 1, got shape "
                f"{shape}; there is nothing to analyse"
            )
        if readout is not None and readout.mask is not None:
            _check_mask(site, jnp.shape(readout.mask), shape)
    return {site: shapes[site] for site in sites}


def _check_mask(site: str, mask: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Raise if a mask does not have the leading axes of the site."""
    if len(mask) >= len(shape) or mask != shape[: len(mask)]:
        raise ValueError(
            f"tap: site {site!r} has the axes {shape[:-1]} (batch, positions), so a "
            f"mask must have shape {shape[:1]} or {shape[:-1]}, got {mask}; tap sites "
            "with other positions in a call of their own"
        )


def _check_outputs(outputs: Outputs, size: int) -> None:
    """Raise if there is no float output, or one does not have the batch axis."""
    if not any(is_float_array(leaf) for leaf in jax.tree.leaves(outputs)):
        got = [f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(outputs)]
        raise ValueError(
            "tap: the model has no floating-point output to differentiate, got "
            f"{', '.join(got) or 'none'}; return logits or losses, or pass readout=None"
        )
    for leaf in jax.tree.leaves(outputs):
        if is_float_array(leaf) and leaf.shape[:1] != (size,):
            raise ValueError(
                f"tap: the outputs need the leading batch axis {size}, got shape "
                f"{leaf.shape}; a readout is per input, so do not reduce over the batch"
            )


def _example_weights(mask: Array | None, shape: tuple[int, ...]) -> Array:
    """Broadcast a mask over the positions that it lacks: weights ``[N]``."""
    if mask is None:
        mask = jnp.ones(shape[:1])
    mask = jnp.asarray(mask).astype(jnp.result_type(float))
    mask = mask.reshape(mask.shape + (1,) * (len(shape) - 1 - mask.ndim))
    return jnp.broadcast_to(mask, shape[:-1]).reshape(-1)
