"""Rules of the readouts: from the outputs of a batch to cotangents at the outputs.

The rule of ``readouts.NAME`` is ``NAME`` here, in :mod:`toyfeat.tap.label_rules` if it
has labels, or in :mod:`toyfeat.tap.random_rules` if it draws random numbers.
Every rule has the signature ``rule(options, outputs, chunk) -> cotangents``.
Integer leaves of the outputs carry no gradient; a rule may return anything in their
place.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from toyfeat.checks import as_real, check_function
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


@struct.dataclass
class Readout:
    """A readout, which is differentiated: cotangents at outputs, weights of examples.

    Build one with a function of :mod:`toyfeat.readouts`, or of a ``rule`` of your own.

    Attributes:
      rule: ``rule(options, outputs, chunk) -> cotangents``, with the structure
        of ``outputs`` and leaves ``[K, *leaf.shape]``.  Static.
      options: hashable arguments of the rule.  Static.
      labels: pytree with leading axis ``B``, split into chunks with the inputs.
      shared: pytree that is the same for all inputs.
      key: random key, folded with the index of each input.
      mask: ``[B]`` or ``[B, positions...]``, the weights of the examples.
      scales: ``[S]``, the points of a path at which the gradient is taken (see
        :func:`toyfeat.readouts.along_path`), or ``None``.
    """

    rule: Rule = struct.field(pytree_node=False)
    options: tuple[Any, ...] = struct.field(pytree_node=False, default=())
    labels: Any = None
    shared: Any = None
    key: Array | None = None
    mask: Array | None = None
    scales: Array | None = None


def make_chunk(readout: Readout, labels: Any, index: Array) -> Chunk:
    """Make what the rule of a readout gets with a chunk of inputs.

    Args:
      readout: whose rule it is.
      labels: of the chunk.
      index: ``[B]``, places of the inputs in the batch, from which their keys are made,
        so that these do not depend on the chunk.

    Returns:
      Labels and keys of the chunk.
    """
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    keys = None if readout.key is None else fold(readout.key, index)
    return Chunk(labels, readout.shared, keys)


def check_select(who: str, select: Any) -> None:
    """Check that a selection of outputs is a function or ``None``."""
    if select is not None:
        check_function(who, "select", select, "of the outputs (or None)")


def check_mask(who: str, mask: Any) -> Any:
    """Convert a mask to an array, after checking that it holds weights.

    Values are looked at unless it lies on a device: :func:`toyfeat.check_taps` does.

    Raises:
      TypeError: if it does not hold real numbers.
      ValueError: if a weight is negative or not finite.
    """
    if mask is None:
        return None
    mask = as_real(who, "mask", mask)
    if isinstance(mask, np.ndarray) and not np.all(np.isfinite(mask) & (mask >= 0)):
        raise ValueError(
            f"{who}: mask must be finite weights >= 0, got {mask.min()}; "
            "0 leaves an example out"
        )
    return mask


def apply_select(select: Select | None, outputs: Outputs) -> Outputs:
    """Apply the user's selection, if there is one."""
    return outputs if select is None else select(outputs)


def split_floats(
    outputs: Outputs,
) -> tuple[list[Array], Callable[[list[Array]], Outputs]]:
    """Return the leaves that carry gradients, and a function to put them back."""
    leaves, structure = jax.tree.flatten(outputs)

    def join(floats: list[Array]) -> Outputs:
        queue = iter(floats)
        joined = [next(queue) if is_float_array(leaf) else leaf for leaf in leaves]
        return jax.tree.unflatten(structure, joined)

    return [leaf for leaf in leaves if is_float_array(leaf)], join


def pull_to_outputs(
    select: Select | None,
    outputs: Outputs,
    cotangents: Callable[[list[Array]], list[Array]],
) -> Outputs:
    """Pull the cotangents of the selected leaves back to all outputs."""
    floats, join = split_floats(outputs)
    if select is None:
        return join(cotangents(floats))
    # The rule sees what is selected; its cotangents are pulled back to all outputs.
    selected, pullback = jax.vjp(lambda f: split_floats(select(join(f)))[0], floats)
    size = jax.tree.leaves(outputs)[0].shape[:1]
    if not selected or any(y.shape[:1] != size for y in selected):
        raise ValueError(
            "readout: select must return floating-point arrays with leading axis "
            f"{size[0]}, got {[y.shape for y in selected]}; it is given the outputs of "
            "the whole batch"
        )
    typed = [
        jnp.asarray(c, y.dtype)
        for c, y in zip(cotangents(selected), selected, strict=True)
    ]
    return join(jax.vmap(lambda c: pullback(c)[0])(typed))


def grad_of_terms(
    terms: Callable[[Outputs], Array], outputs: Outputs
) -> tuple[Outputs, Array]:
    """Differentiate the sum of all terms by the outputs; ``K = 1``.

    Returns:
      The cotangents, and whether a term of an input is NaN, ``[B]``.  The derivative of
      NaN is NaN, which JAX does not say of a value taken from outside of an array.
    """
    floats, join = split_floats(outputs)

    def total(floats: list[Array]) -> tuple[Array, Array]:
        values = to_float32(jnp.asarray(terms(join(floats))))
        undefined = jnp.isnan(values).reshape(values.shape[0], -1).any(axis=1)
        return jnp.sum(values), undefined

    grads, undefined = jax.grad(total, has_aux=True)(floats)
    marked = []
    for grad in grads:
        rows = undefined.reshape((-1, *(1,) * (grad.ndim - 1)))
        nan = jnp.full((), jnp.nan, grad.dtype)
        marked.append(jnp.where(rows, nan, grad)[None])
    return join(marked), undefined


def list_outputs(outputs: Outputs) -> str:
    """List the floating-point arrays of a tree with their shapes, for a message."""
    leaves = jax.tree_util.tree_leaves_with_path(outputs)
    listed = [
        f"outputs{jax.tree_util.keystr(path)} {leaf.shape}"
        for path, leaf in leaves
        if is_float_array(leaf)
    ]
    return ", ".join(listed) or "none"


def check_single_output(who: str, select: Select | None, outputs: Outputs) -> None:
    """Raise if there are several outputs, of which nothing selects one.

    Hidden states and caches that a model returns beside its logits are no logits.
    """
    if select is None and len(split_floats(outputs)[0]) > 1:
        raise ValueError(
            f"{who}: needs one floating-point output, got {list_outputs(outputs)}; "
            "pick with select=lambda outputs: ..., which may also return all of them"
        )


def to_float32(x: Array) -> Array:
    """Widen narrow floats to float32."""
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x


def as_batch_function(
    fn: Callable[..., Array], args: tuple[Any, ...]
) -> Callable[..., Array]:
    """Map ``fn`` over inputs, or return it if it only works on a whole batch."""
    mapped = jax.vmap(fn)
    # Try it on a single input.
    try:
        terms = jax.eval_shape(mapped, *args)
    except Exception as error:
        size = jax.tree.leaves(args)[0].shape[0]
        if _terms_of_batch(fn, args, size) is None:  # nor does it take a batch
            error.add_note(
                "readout: the function is given the output (and the label) of one "
                "input, without the batch axis"
            )
            raise
        return fn
    if not is_float_array(terms):
        got = getattr(terms, "dtype", type(terms).__name__)
        raise TypeError(
            f"readout: the function must return one floating-point array, got {got}; "
            "what is differentiated is the sum of what it returns"
        )
    terms_of_input = terms.shape[1:]
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


def scalar(options: tuple[Any, ...], outputs: Outputs, chunk: Chunk) -> Outputs:
    """Differentiate a user's scalar."""
    (fn,) = options
    return grad_of_terms(as_batch_function(fn, (outputs,)), outputs)[0]


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

    return pull_to_outputs(options[0], outputs, broadcast)


def jacobian(options: tuple[Any, ...], outputs: Outputs, chunk: Chunk) -> Outputs:
    """Build one-hot cotangents, one for each entry of an input's output."""
    check_single_output("jacobian", options[0], outputs)

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

    return pull_to_outputs(options[0], outputs, one_hots)


def check_readout(readout: object, size: int) -> None:
    """Raise if the readout or the leaves of it do not fit the inputs."""
    if size < 1:
        raise ValueError(
            "tap: inputs must hold at least one example, got leading axis 0; leave out "
            "batches without inputs"
        )
    if readout is None:
        return
    if not isinstance(readout, Readout):
        raise TypeError(
            "tap: readout must come from toyfeat.readouts, got "
            f"{type(readout).__name__}; None gives activations alone"
        )
    for name, tree in (("labels", readout.labels), ("mask", readout.mask)):
        for leaf in jax.tree.leaves(tree):
            if jnp.shape(leaf)[:1] != (size,):
                raise ValueError(
                    f"tap: the readout's {name} must have leading axis {size} like the "
                    f"inputs, got shape {jnp.shape(leaf)}; give one row per input"
                )
