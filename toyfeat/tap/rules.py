"""Rules of the readouts: from the outputs of a batch to cotangents at the outputs.

The rule of ``readouts.NAME`` is ``NAME`` here (:func:`scalar_or_loss` serves two).
Every rule has the signature ``rule(options, outputs, chunk) -> cotangents``.
Integer leaves of the outputs carry no gradient; a rule may return anything in their
place.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from toyfeat.tap.probes import is_float_array
from toyfeat.types import Array, Outputs

# A batch size that no other axis is likely to have (the thousandth prime), so that a
# function of a whole batch is recognised by the axis it returns.
_TRIAL_SIZE = 7919


class Chunk(NamedTuple):
    """The labels and random keys of a chunk of inputs, as a rule needs them.

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


def _apply_select(select: Select | None, outputs: Outputs) -> Outputs:
    """Apply the user's selection, if there is one."""
    return outputs if select is None else select(outputs)


def _split_floats(
    outputs: Outputs,
) -> tuple[list[Array], Callable[[list[Array]], Outputs]]:
    """Return the leaves that carry gradients, and a function to put them back."""
    leaves, structure = jax.tree.flatten(outputs)

    def join(floats: list[Array]) -> Outputs:
        queue = iter(floats)
        joined = [next(queue) if is_float_array(leaf) else leaf for leaf in leaves]
        return jax.tree.unflatten(structure, joined)

    return [leaf for leaf in leaves if is_float_array(leaf)], join


def _pull_to_outputs(
    select: Select | None,
    outputs: Outputs,
    cotangents: Callable[[list[Array]], list[Array]],
) -> Outputs:
    """Pull the cotangents of the selected leaves back to all outputs."""
    floats, join = _split_floats(outputs)
    if select is None:
        return join(cotangents(floats))
    selected, pullback = jax.vjp(lambda f: _split_floats(select(join(f)))[0], floats)
    typed = [
        jnp.asarray(c, y.dtype)
        for c, y in zip(cotangents(selected), selected, strict=True)
    ]
    return join(jax.vmap(lambda c: pullback(c)[0])(typed))


def _grad_of_sum(terms: Callable[[Outputs], Array], outputs: Outputs) -> Outputs:
    """Differentiate the sum of all terms by the outputs; ``K = 1``."""
    floats, join = _split_floats(outputs)

    def total(floats: list[Array]) -> Array:
        return jnp.sum(_to_float32(jnp.asarray(terms(join(floats)))))

    return join([g[None] for g in jax.grad(total)(floats)])


def _to_float32(x: Array) -> Array:
    """Widen narrow floats to float32."""
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x


def scalar_or_loss(options: tuple[Any, ...], outputs: Outputs, chunk: Chunk) -> Outputs:
    """Differentiate a user's scalar, or loss against labels."""
    (fn,) = options
    labels = () if chunk.labels is None else (chunk.labels,)
    batched = _as_batch_function(fn, (outputs, *labels))
    return _grad_of_sum(lambda y: batched(y, *labels), outputs)


def _as_batch_function(
    fn: Callable[..., Array], args: tuple[Any, ...]
) -> Callable[..., Array]:
    """Map ``fn`` over inputs, or return it if it only works on a whole batch."""
    mapped = jax.vmap(fn)
    # Try it on a single input.
    try:
        terms_of_input = jax.eval_shape(mapped, *args).shape[1:]
    except Exception as error:
        size = jax.tree.leaves(args)[0].shape[0]
        if _terms_of_batch(fn, args, size) is None:  # nor does it take a batch
            error.add_note(
                "readout: the function is given the output (and the label) of one "
                "input, without the batch axis"
            )
            raise
        return fn
    # If it takes a batch too, both readings must agree, whatever the batch size.
    terms_of_batch = _terms_of_batch(fn, args, _TRIAL_SIZE)
    if terms_of_batch is not None and terms_of_batch != terms_of_input:
        raise ValueError(
            "readout: the function can be read as one of a single input (terms "
            f"{terms_of_input}) and as one of a batch (terms {terms_of_batch}), which "
            "differ; it is given a single input, so index from the last axis: y[..., i]"
        )
    return mapped


def _terms_of_batch(
    fn: Callable[..., Array], args: tuple[Any, ...], size: int
) -> tuple[int, ...] | None:
    """Shape of the terms per input if ``fn`` takes a batch, else ``None``."""
    resized = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype), args
    )
    try:
        shape = jax.eval_shape(fn, *resized).shape
    except Exception:
        return None
    return shape[1:] if shape[:1] == (size,) else None


def next_token_loss(
    options: tuple[Any, ...], outputs: Outputs, chunk: Chunk
) -> Outputs:
    """Differentiate the cross-entropy of the next token where there is one.

    The gradient is written down, softmax minus one-hot: differentiating the loss takes
    two more passes over the logits (docs/decisions/language.md).
    """
    (select,) = options
    targets, valid = chunk.labels

    def residuals(floats: list[Array]) -> list[Array]:
        shapes = [leaf.shape for leaf in floats]
        if [shape[:-1] for shape in shapes] != [targets.shape]:
            raise ValueError(
                f"next_token_loss: tokens {targets.shape} need logits "
                f"{(*targets.shape, 'V')}, got {', '.join(map(str, shapes))}"
            )
        residual = _label_residual(targets, _to_float32(floats[0]))
        return [(valid[..., None].astype(residual.dtype) * residual)[None]]

    return _pull_to_outputs(select, outputs, residuals)


def _label_residual(label: Array, logits: Array) -> Array:
    """Gradient of the cross-entropy of a label in the logits."""
    return jax.nn.softmax(logits) - jax.nn.one_hot(
        label, logits.shape[-1], dtype=logits.dtype
    )


def _categorical_residual(key: Array, logits: Array) -> Array:
    """Probabilities minus a one-hot label drawn from them."""
    return _label_residual(jax.random.categorical(key, logits), logits)


def _bernoulli_residual(key: Array, logits: Array) -> Array:
    """Probabilities minus labels 0 or 1 drawn from them."""
    mean = jax.nn.sigmoid(logits)
    return mean - jax.random.bernoulli(key, mean).astype(mean.dtype)


def _gaussian_residual(key: Array, mean: Array) -> Array:
    """Mean minus a label drawn around it with unit variance."""
    return -jax.random.normal(key, mean.shape, mean.dtype)


# Family to the gradient of the negative log-likelihood of a label drawn from the model,
# in the natural parameter.
RESIDUALS = {
    "categorical": _categorical_residual,
    "bernoulli": _bernoulli_residual,
    "gaussian": _gaussian_residual,
}

# Kind of a random direction to the draw of its entries, zero mean and unit variance.
DRAWS: dict[str, Callable[..., Array]] = {
    "rademacher": jax.random.rademacher,
    "gaussian": jax.random.normal,
}


def _draw_per_input(
    keys: Array, num: int, outputs: list[Array], draw: Callable[[Array, Array], Array]
) -> list[Array]:
    """Draw ``num`` times for every input, ``[num, B, ...]``, divided by sqrt(num)."""

    def draw_for_input(key: Array, output: list[Array]) -> list[Array]:
        # A key for every draw and every leaf.
        split = jax.random.split(key, (num, len(output)))
        draw_num = jax.vmap(draw, in_axes=(0, None))
        return [
            draw_num(split[:, i], _to_float32(leaf)) / num**0.5
            for i, leaf in enumerate(output)
        ]

    return jax.vmap(draw_for_input, out_axes=1)(keys, outputs)


def sampled_labels(options: tuple[Any, ...], outputs: Outputs, chunk: Chunk) -> Outputs:
    """Differentiate the loss against labels that are drawn from the model."""
    num, family, select = options

    def residuals(outputs: list[Array]) -> list[Array]:
        return _draw_per_input(chunk.keys, num, outputs, RESIDUALS[family])

    return _pull_to_outputs(select, outputs, residuals)


def random_directions(
    options: tuple[Any, ...], outputs: Outputs, chunk: Chunk
) -> Outputs:
    """Draw directions with independent entries of zero mean and unit variance."""
    num, kind, select, over = options

    def draw(key: Array, leaf: Array) -> Array:
        return DRAWS[kind](key, leaf.shape, leaf.dtype)

    def cotangents(outputs: list[Array]) -> list[Array]:
        if over == "all":
            return _draw_per_input(chunk.keys, num, outputs, draw)
        if len(outputs) != 1 or outputs[0].ndim < 2:
            raise ValueError(
                f"random_directions: over={over!r} wants one output [B, ..., units], "
                f"got shapes {[leaf.shape for leaf in outputs]}"
            )
        return [_draw_along_axis(chunk.keys, num, outputs[0], draw, over)]

    return _pull_to_outputs(select, outputs, cotangents)


def _draw_along_axis(
    keys: Array,
    num: int,
    leaf: Array,
    draw: Callable[[Array, Array], Array],
    over: str,
) -> Array:
    """Draw over the positions of one unit at a time, or over the units of one."""
    size, *positions, units = leaf.shape
    flat = leaf.reshape(size, -1, units)
    # The signs have extent 1 on the other axis, which the one-hot rows spread out:
    # [num, 1, B, positions, units] times [1, K / num, 1, positions, units].
    if over == "positions":
        signs = _draw_per_input(keys, num, [flat[:, :, :1]], draw)[0]
        one_hots = jnp.eye(units, dtype=leaf.dtype)[None, :, None, None, :]
    else:
        signs = _draw_per_input(keys, num, [flat[:, :1, :]], draw)[0]
        one_hots = jnp.eye(flat.shape[1], dtype=leaf.dtype)[None, :, None, :, None]
    return (signs[:, None] * one_hots).reshape(-1, size, *positions, units)


def directions(options: tuple[Any, ...], outputs: Outputs, chunk: Chunk) -> Outputs:
    """Broadcast the user's cotangents to every input."""
    cotangents = jax.tree.leaves(chunk.shared)

    def broadcast(outputs: list[Array]) -> list[Array]:
        wanted = [("K", *y.shape[1:]) for y in outputs]
        got = [jnp.shape(c) for c in cotangents]
        if [w[1:] for w in wanted] != [g[1:] for g in got]:
            raise ValueError(
                f"directions: the outputs of one input need cotangents of shapes "
                f"{wanted}, got {got}"
            )
        return [
            jnp.broadcast_to(jnp.asarray(c)[:, None], (len(c), *y.shape))
            for c, y in zip(cotangents, outputs, strict=True)
        ]

    return _pull_to_outputs(options[0], outputs, broadcast)


def jacobian(options: tuple[Any, ...], outputs: Outputs, chunk: Chunk) -> Outputs:
    """Build one-hot cotangents, one for each entry of an input's output."""

    def one_hots(outputs: list[Array]) -> list[Array]:
        # Entry k of the flattened outputs lies in one leaf, whose block of the
        # identity begins at its start; the other leaves get zeros.
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

    return _pull_to_outputs(options[0], outputs, one_hots)


def logit_difference(
    options: tuple[Any, ...], outputs: Outputs, chunk: Chunk
) -> Outputs:
    """Differentiate ``logits[..., a] - logits[..., b]``, at one position or summed."""
    position, select = options

    def terms(outputs: Outputs) -> Array:
        logits = _apply_select(select, outputs)
        if position is not None:
            logits = _take_position(logits, position)
        indices = {**chunk.labels, **chunk.shared}
        a, b = (_take_entry(logits, indices[name]) for name in "ab")
        return a - b

    return _grad_of_sum(terms, outputs)


def _take_position(logits: Array, position: int) -> Array:
    """Select one position of ``[B, T, V]``, or raise."""
    if logits.ndim < 3 or not -logits.shape[1] <= position < logits.shape[1]:
        raise ValueError(
            f"logit_difference: position {position} needs logits [B, T, V] that have "
            f"it, got shape {logits.shape}"
        )
    return logits[:, position]


def _take_entry(logits: Array, index: Array) -> Array:
    """Select an entry of the last axis, one for all inputs or one per input."""
    size = logits.shape[-1]
    concrete = None if isinstance(index, Tracer) else np.asarray(index)
    if concrete is not None and not np.all((-size <= concrete) & (concrete < size)):
        raise ValueError(
            f"logit_difference: index {index} is not one of the {size} entries of "
            f"logits {logits.shape}"
        )
    index = jnp.broadcast_to(index, logits.shape[:1])
    index = index.reshape((-1, *(1,) * (logits.ndim - 1)))
    return jnp.take_along_axis(logits, index, axis=-1)[..., 0]
