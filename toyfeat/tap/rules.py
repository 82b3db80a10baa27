"""Rules of the readouts: outputs of a batch to cotangents at the outputs.

Every rule has the signature ``rule(options, outputs, chunk) -> cotangents``.
Integer leaves of the outputs carry no gradient; what a rule returns at their
place is ignored.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from toyfeat.tap.probes import is_float_array
from toyfeat.types import Array, Outputs


class Chunk(NamedTuple):
    """What a rule sees of the inputs at hand.

    Attributes:
      labels: pytree with leading axis ``B``, or ``None``.
      shared: pytree that does not depend on the input, or ``None``.
      keys: ``[B]``, one random key per input, or ``None``.
    """

    labels: Any
    shared: Any
    keys: Any


Rule = Callable[[tuple[Any, ...], Outputs, Chunk], Outputs]
Select = Callable[[Outputs], Outputs]


def _selected(select: Select | None, outputs: Outputs) -> Outputs:
    return outputs if select is None else select(outputs)


def _split(outputs: Outputs) -> tuple[list[Array], Callable[[list[Array]], Outputs]]:
    """The leaves that can carry a gradient, and how to put them back."""
    leaves, structure = jax.tree.flatten(outputs)

    def join(floats: list[Array]) -> Outputs:
        rest = iter(floats)
        parts = [next(rest) if is_float_array(leaf) else leaf for leaf in leaves]
        return jax.tree.unflatten(structure, parts)

    return [leaf for leaf in leaves if is_float_array(leaf)], join


def _at_outputs(
    select: Select | None,
    outputs: Outputs,
    cotangents: Callable[[list[Array]], list[Array]],
) -> Outputs:
    """Cotangents of the selected leaves, pulled back to all outputs."""
    floats, join = _split(outputs)
    if select is None:
        return join(cotangents(floats))
    picked, pull = jax.vjp(lambda f: _split(select(join(f)))[0], floats)
    typed = [
        jnp.asarray(c, y.dtype) for c, y in zip(cotangents(picked), picked, strict=True)
    ]
    return join(jax.vmap(lambda c: pull(c)[0])(typed))


def _of_sum(terms: Callable[[Outputs], Array], outputs: Outputs) -> Outputs:
    """``K = 1`` cotangent: the gradient of the sum of all terms."""
    floats, join = _split(outputs)
    gradient = jax.grad(lambda f: jnp.sum(_wide(jnp.asarray(terms(join(f))))))(floats)
    return join([g[None] for g in gradient])


def _wide(x: Array) -> Array:
    """At least float32."""
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x


def terms(options: tuple[Any, ...], outputs: Outputs, chunk: Chunk) -> Outputs:
    """The gradient of a user's scalar or loss."""
    (fn,) = options
    labels = () if chunk.labels is None else (chunk.labels,)
    batched = _batched(fn, (outputs, *labels))
    return _of_sum(lambda y: batched(y, *labels), outputs)


def _batched(fn: Callable[..., Array], args: tuple[Any, ...]) -> Callable[..., Array]:
    """Read ``fn`` as a function of one input, or else of a batch."""
    mapped = jax.vmap(fn)
    try:
        one = jax.eval_shape(mapped, *args).shape[1:]
    except Exception as error:
        size = jax.tree.leaves(args)[0].shape[0]
        if _terms_of_batch(fn, args, size) is None:
            error.add_note(
                "readout: the function is given the output (and the label) of one "
                "input, without the batch axis"
            )
            raise
        return fn
    # A size that no other axis has, so that the answer does not depend on the batch.
    whole = _terms_of_batch(fn, args, 7919)
    if whole is not None and whole != one:
        raise ValueError(
            "readout: the function can be read as one of a single input (terms "
            f"{one}) and as one of a batch (terms {whole}), which differ; it is given "
            "a single input, so index from the last axis: y[..., i]"
        )
    return mapped


def _terms_of_batch(
    fn: Callable[..., Array], args: tuple[Any, ...], size: int
) -> tuple[int, ...] | None:
    """Shape of the terms of one input if ``fn`` takes a batch, else ``None``."""
    resized = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype), args
    )
    try:
        shape = jax.eval_shape(fn, *resized).shape
    except Exception:
        return None
    return shape[1:] if shape[:1] == (size,) else None


def next_token(options: tuple[Any, ...], outputs: Outputs, chunk: Chunk) -> Outputs:
    """Cross-entropy of the next token at every position that has one."""
    (select,) = options
    targets, valid = chunk.labels

    def residuals(floats: list[Array]) -> list[Array]:
        shapes = [leaf.shape for leaf in floats]
        if [shape[:-1] for shape in shapes] != [targets.shape]:
            raise ValueError(
                f"next_token_loss: tokens {targets.shape} need logits "
                f"{(*targets.shape, 'V')}, got {', '.join(map(str, shapes))}"
            )
        residual = _label_residual(targets, _wide(floats[0]))
        return [(valid[..., None].astype(residual.dtype) * residual)[None]]

    return _at_outputs(select, outputs, residuals)


def _label_residual(label: Array, logits: Array) -> Array:
    return jax.nn.softmax(logits) - jax.nn.one_hot(
        label, logits.shape[-1], dtype=logits.dtype
    )


def _categorical_residual(key: Array, logits: Array) -> Array:
    return _label_residual(jax.random.categorical(key, logits), logits)


def _bernoulli_residual(key: Array, logits: Array) -> Array:
    mean = jax.nn.sigmoid(logits)
    return mean - jax.random.bernoulli(key, mean).astype(mean.dtype)


def _gaussian_residual(key: Array, mean: Array) -> Array:
    return -jax.random.normal(key, mean.shape, mean.dtype)


# Gradient of the negative log-likelihood of a drawn label in the natural parameter.
RESIDUALS = {
    "categorical": _categorical_residual,
    "bernoulli": _bernoulli_residual,
    "gaussian": _gaussian_residual,
}

DRAWS: dict[str, Callable[..., Array]] = {
    "rademacher": jax.random.rademacher,
    "gaussian": jax.random.normal,
}


def _drawn(
    keys: Array, num: int, outputs: list[Array], draw: Callable[[Array, Array], Array]
) -> list[Array]:
    """``draw(key, leaf of one input)`` as ``[num, B, ...]``, over sqrt(num)."""

    def of_input(key: Array, output: list[Array]) -> list[Array]:
        split = jax.random.split(key, (num, len(output)))
        many = jax.vmap(draw, in_axes=(0, None))
        return [
            many(split[:, i], _wide(leaf)) / num**0.5 for i, leaf in enumerate(output)
        ]

    return jax.vmap(of_input, out_axes=1)(keys, outputs)


def sampled(options: tuple[Any, ...], outputs: Outputs, chunk: Chunk) -> Outputs:
    """Residuals of labels drawn from the model."""
    num, family, select = options
    return _at_outputs(
        select, outputs, lambda y: _drawn(chunk.keys, num, y, RESIDUALS[family])
    )


def random(options: tuple[Any, ...], outputs: Outputs, chunk: Chunk) -> Outputs:
    """Independent entries of zero mean and unit variance."""
    num, kind, select, over = options

    def draw(key: Array, leaf: Array) -> Array:
        return DRAWS[kind](key, leaf.shape, leaf.dtype)

    def drawn(outputs: list[Array]) -> list[Array]:
        if over == "all":
            return _drawn(chunk.keys, num, outputs, draw)
        if len(outputs) != 1 or outputs[0].ndim < 2:
            raise ValueError(
                f"random_directions: over={over!r} wants one output [B, ..., units], "
                f"got shapes {[leaf.shape for leaf in outputs]}"
            )
        return [_one_by_one(chunk.keys, num, outputs[0], draw, over)]

    return _at_outputs(select, outputs, drawn)


def _one_by_one(
    keys: Array,
    num: int,
    leaf: Array,
    draw: Callable[[Array, Array], Array],
    over: str,
) -> Array:
    """Random over positions with one unit at a time, or the other way round."""
    size, *positions, units = leaf.shape
    flat = leaf.reshape(size, -1, units)
    if over == "positions":
        signs = _drawn(keys, num, [flat[:, :, :1]], draw)[0]
        one = jnp.eye(units, dtype=leaf.dtype)[None, :, None, None, :]
    else:
        signs = _drawn(keys, num, [flat[:, :1, :]], draw)[0]
        one = jnp.eye(flat.shape[1], dtype=leaf.dtype)[None, :, None, :, None]
    return (signs[:, None] * one).reshape(-1, size, *positions, units)


def directions(options: tuple[Any, ...], outputs: Outputs, chunk: Chunk) -> Outputs:
    """The same given cotangents for every input."""
    given = jax.tree.leaves(chunk.shared)

    def spread(outputs: list[Array]) -> list[Array]:
        wanted = [("K", *y.shape[1:]) for y in outputs]
        got = [jnp.shape(c) for c in given]
        if [w[1:] for w in wanted] != [g[1:] for g in got]:
            raise ValueError(
                f"directions: the outputs of one input need cotangents of shapes "
                f"{wanted}, got {got}"
            )
        return [
            jnp.broadcast_to(jnp.asarray(c)[:, None], (len(c), *y.shape))
            for c, y in zip(given, outputs, strict=True)
        ]

    return _at_outputs(options[0], outputs, spread)


def jacobian(options: tuple[Any, ...], outputs: Outputs, chunk: Chunk) -> Outputs:
    """One-hot cotangents, one for each entry of an input's output."""

    def one_hots(outputs: list[Array]) -> list[Array]:
        sizes = [leaf[0].size for leaf in outputs]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        rows = [
            jnp.eye(sum(sizes), size, -start, leaf.dtype)
            for leaf, size, start in zip(outputs, sizes, starts, strict=True)
        ]
        return [
            jnp.broadcast_to(
                r.reshape(sum(sizes), 1, *leaf.shape[1:]), (sum(sizes), *leaf.shape)
            )
            for r, leaf in zip(rows, outputs, strict=True)
        ]

    return _at_outputs(options[0], outputs, one_hots)


def logit_difference(
    options: tuple[Any, ...], outputs: Outputs, chunk: Chunk
) -> Outputs:
    """``logits[..., a] - logits[..., b]``, at one position or summed."""
    position, select = options

    def terms(outputs: Outputs) -> Array:
        logits = _selected(select, outputs)
        if position is not None:
            logits = _at_position(logits, position)
        indices = {**chunk.labels, **chunk.shared}
        picked = [_picked(logits, indices[name]) for name in "ab"]
        return picked[0] - picked[1]

    return _of_sum(terms, outputs)


def _at_position(logits: Array, position: int) -> Array:
    if logits.ndim < 3 or not -logits.shape[1] <= position < logits.shape[1]:
        raise ValueError(
            f"logit_difference: position {position} needs logits [B, T, V] that have "
            f"it, got shape {logits.shape}"
        )
    return logits[:, position]


def _picked(logits: Array, index: Array) -> Array:
    size = logits.shape[-1]
    known = None if isinstance(index, Tracer) else np.asarray(index)
    if known is not None and not np.all((-size <= known) & (known < size)):
        raise ValueError(
            f"logit_difference: index {index} is not one of the {size} entries of "
            f"logits {logits.shape}"
        )
    index = jnp.broadcast_to(index, logits.shape[:1])
    index = index.reshape((-1, *(1,) * (logits.ndim - 1)))
    return jnp.take_along_axis(logits, index, axis=-1)[..., 0]
