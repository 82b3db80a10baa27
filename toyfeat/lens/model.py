"""Models that a lens can read: residual streams, what follows them, and the logits.

A lens needs three functions of a model: its residual streams with taps, the run from
one stream to another, and the logits of a final stream.  :func:`from_decoder` has them
for the decoders of this library, :func:`from_probed` makes them for any probed model.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.checks import check_flag, check_function, check_type
from toyfeat.lens.frozen import freeze_backward
from toyfeat.meshes import everywhere, run_automatic, shapes_of
from toyfeat.models.decoder import Decoder, DecoderConfig
from toyfeat.processes import to_host
from toyfeat.tap import from_linen
from toyfeat.tap.probes import check_params, check_sites
from toyfeat.types import Array, Inputs, Params, Probed

_LEAK = 1e-3
"""Share of a change at the last position that may reach earlier ones by rounding.

Rounding in bfloat16 is 2^-8 of a value and in float32 2^-24, but XLA computes rows of
the same program alike, so that a causal model gives 0.
"""


class LensModel(NamedTuple):
    """Model whose residual streams can be tapped, run from and read.

    Attributes:
      probed: ``(params, inputs, probes) -> (outputs, acts)``, with the streams among
        its sites.
      sites: names of the residual streams ``[B, T, D]`` in the order of the depth; the
        last is the final stream, before the final norm.
      run: ``(params, inputs, resid [B, T, D], start, stop) -> [B, T, D]``, the stream
        at the site ``stop`` if that at the earlier site ``start`` is ``resid``.
      unembed: ``(params, resid [..., D]) -> logits [..., V]``, final norm included.
      head: ``params -> [D, V]``, the unembedding matrix as it is stored, without the
        scale of the norm, or ``None``; only vectors of tokens need it.
    """

    probed: Probed
    sites: tuple[str, ...]
    run: Callable[..., Array]
    unembed: Callable[[Params, Array], Array]
    head: Callable[[Params], Array] | None = None


def from_probed(
    probed: Probed,
    *,
    sites: Sequence[str],
    unembed: Callable[[Params, Array], Array],
    head: Callable[[Params], Array] | None = None,
    run: Callable[..., Array] | None = None,
) -> LensModel:
    """Make a lens model of any probed model.

    Args:
      probed: the model, from ``ft.from_linen``, ``ft.from_nnx`` or
        ``ft.from_function``.
      sites: its residual streams ``[B, T, D]`` in the order of the depth; the last is
        the final one, before the final norm.
      unembed: ``(params, resid [..., D]) -> logits [..., V]``, final norm included.
      head: ``params -> [D, V]``, the unembedding matrix, for vectors of tokens.
      run: of :class:`LensModel`.  By default the model is run with the stream at
        ``start`` replaced by a probe; under ``jit`` earlier layers are not computed.

    Returns:
      :class:`LensModel`.

    Raises:
      TypeError: if one of the three functions is missing or no function.
      ValueError: if there are less than two sites, or one is named twice.

    Example:
      >>> import jax.numpy as jnp, toyfeat as ft
      >>> def chain(params, x, tap):
      ...     for name, matrix in params.items():
      ...         x = tap(name, x @ matrix)
      ...     return x
      >>> model = from_probed(
      ...     ft.from_function(chain), sites=["a", "b"], unembed=lambda p, h: h
      ... )
      >>> params = {"a": jnp.eye(2), "b": 3 * jnp.eye(2)}
      >>> model.run(params, jnp.ones((1, 1, 2)), jnp.ones((1, 1, 2)), "a", "b").tolist()
      [[[3.0, 3.0]]]
    """
    who = "lenses.from_probed"
    check_function(who, "probed", probed, "from ft.from_linen, ft.from_function, ...")
    check_function(who, "unembed", unembed, "(params, resid [..., D]) -> [..., V]")
    for name, value in (("head", head), ("run", run)):
        if value is not None:
            check_function(who, name, value, "as LensModel has it")
    names = (sites,) if isinstance(sites, str) else tuple(sites)
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(
            f"{who}: sites must be two or more different residual streams, got "
            f"{list(names)}; name those that the lens is to read, and the final one"
        )

    def replay(
        params: Params, inputs: Inputs, resid: Array, start: str, stop: str
    ) -> Array:
        if start == stop:
            return resid
        return probed(params, inputs, {start: lambda _: resid})[1][stop]

    return LensModel(
        probed=probed, sites=names, run=run or replay, unembed=unembed, head=head
    )


def from_decoder(
    config: DecoderConfig, *, dtype: Any = jnp.float32, frozen: bool = False
) -> LensModel:
    """Make a lens model of a decoder of this library.

    Its sites are the outputs of the blocks, ``"blocks_<i>/resid_post"``, which the
    published lenses count as layer ``i``.  Inputs are tokens ``[B, T]``, or
    ``(tokens, mask)`` with padding.

    Args:
      config: of the decoder, of two blocks or more; its parameters are not scanned.
      dtype: of the matrix products.
      frozen: whether derivatives hold attention patterns and norms fixed, as
        relevance propagation does (:mod:`toyfeat.lens.frozen`); values stay the same.

    Returns:
      :class:`LensModel`; ``run`` traces only the blocks that are run.

    Raises:
      TypeError: if ``config`` is something else.
      ValueError: if it has one block only, so that there is nothing to fit.

    Example:
      >>> from toyfeat.models.decoder import llama
      >>> from_decoder(llama(vocab=5, layers=2, dim=4, heads=1, hidden=6)).sites
      ('blocks_0/resid_post', 'blocks_1/resid_post')
    """
    who = "lenses.from_decoder"
    check_type(who, "config", config, DecoderConfig, hint="as ft's decoders have it")
    check_flag(who, "frozen", frozen)
    sites = tuple(f"blocks_{i}/resid_post" for i in range(config.layers))

    def tapped(decoder: Decoder, blocks: range) -> Probed:
        probed = from_linen(decoder)
        return freeze_backward(probed, config, blocks) if frozen else probed

    # A decoder that starts behind the first site and ends with the second one.
    def run(
        params: Params, inputs: Inputs, resid: Array, start: str, stop: str
    ) -> Array:
        first, last = sites.index(start) + 1, sites.index(stop) + 1
        if first >= last:
            return resid
        part = Decoder(replace(config, layers=last), start=first, dtype=dtype)
        mask = inputs[1] if isinstance(inputs, tuple) else None
        return tapped(part, range(first, last))(params, (resid, mask), {})[1][stop]

    # The last norm and the logits, of any number of positions.
    def unembed(params: Params, resid: Array) -> Array:
        ending = Decoder(config, start=config.layers, dtype=dtype)
        logits: Any = ending.apply(params, resid.reshape(1, -1, config.dim))
        return logits.reshape(*resid.shape[:-1], config.vocab)

    def head(params: Params) -> Array:
        tensors = params["params"]
        return tensors["embed"]["embedding"].T if config.tied else tensors["head"]

    return from_probed(
        tapped(Decoder(config, dtype=dtype), range(config.layers)),
        sites=sites,
        unembed=unembed,
        head=head,
        run=run,
    )


def check_model(model: Any, params: Params, inputs: Inputs) -> None:
    """Check that a lens can be fitted to a model; runs it twice.

    Args:
      model: from :func:`from_decoder` or :func:`from_probed`.
      params: its parameters.
      inputs: a batch ``[B, T]`` of at least two positions.

    Raises:
      TypeError: if it is no :class:`LensModel`.
      ValueError: if a site does not exist or is not ``[B, T, D]``, sites differ in
        width, layers are in train mode (dropout), or a position depends on later ones.

    Example:
      >>> import jax.numpy as jnp, toyfeat as ft
      >>> def reversing(params, x, tap):
      ...     return tap("b", tap("a", x)[:, ::-1])
      >>> model = from_probed(
      ...     ft.from_function(reversing), sites=["a", "b"], unembed=lambda p, h: h
      ... )
      >>> check_model(model, {}, jnp.ones((1, 3, 2)))
      Traceback (most recent call last):
      ValueError: lenses: the model must be causal, got a position that depends on ...
    """
    run_automatic(partial(_check_model, model), everywhere, params, inputs)


def _check_model(model: Any, params: Params, inputs: Inputs) -> None:
    """Check a model where products need no sharding of their results."""
    who = "lenses"
    residual_shape(model, params, inputs, who)
    check_evaluation(who, model, params, inputs)
    _check_causal(who, model, params, inputs)


def check_evaluation(
    who: str, model: LensModel, params: Params, inputs: Inputs
) -> None:
    """Raise if layers are in train mode, which change the Jacobian from call to call.

    Raises:
      ValueError: if there are such layers; it names them.
    """
    train_mode: Any = getattr(model.probed, "train_mode", None)
    notes = () if train_mode is None else train_mode(params, inputs)
    if notes:
        raise ValueError(
            f"{who}: the model must be in evaluation mode, got layers in train mode: "
            f"{', '.join(notes)}; switch dropout off (train=False, model.eval())"
        )


def residual_shape(
    model: Any, params: Params, inputs: Inputs, who: str
) -> tuple[int, int, int]:
    """Check the shapes of the residual streams, without running the model.

    Returns:
      ``(B, T, D)``, which all of them share.

    Raises:
      TypeError: if it is no :class:`LensModel`.
      ValueError: if a site does not exist, is not ``[B, T, D]``, or sites differ.
    """
    check_type(
        who, "model", model, LensModel, hint="make it with ft.lenses.from_probed"
    )
    check_params(params, who)
    shapes = shapes_of((params, inputs))
    acts = jax.eval_shape(lambda p, x: model.probed(p, x, {})[1], *shapes)
    check_sites(model.sites, acts, who=who)
    shapes = {site: acts[site].shape for site in model.sites}
    if len(set(shapes.values())) > 1 or len(shapes[model.sites[-1]]) != 3:
        raise ValueError(
            f"{who}: all sites must be residual streams of one shape [B, T, D], got "
            f"{shapes}; leave out sites that are no residual stream"
        )
    return shapes[model.sites[-1]]


def mark_positions(
    who: str, name: str, marks: Any, shape: tuple[int, int], advice: str
) -> Array:
    """Mark positions ``[B, T]``, all of them by default.

    Args:
      who: function to name in the error.
      name: of the argument.
      marks: ``[B, T]`` or ``None``.
      shape: ``B, T``.
      advice: what to do, the end of the message.

    Raises:
      ValueError: for another shape.
    """
    marks = jnp.ones(shape) if marks is None else jnp.asarray(marks)
    if marks.shape != shape:
        raise ValueError(
            f"{who}: {name} must have shape {shape}, got {marks.shape}; {advice}"
        )
    return marks


def _check_causal(who: str, model: LensModel, params: Params, inputs: Inputs) -> None:
    """Raise if a change of the first stream at the last position moves earlier ones."""
    # The same program twice: two runs in one round differently, in bfloat16 visibly.
    still, moved = (_final_stream(model, params, inputs, by) for by in (0.0, 1.0))
    change = to_host(_largest_change(still, moved))
    if change[:-1].max(initial=0.0) > _LEAK * change[-1]:
        raise ValueError(
            f"{who}: the model must be causal, got a position that depends on a later "
            f"one (position {int(change[:-1].argmax())}); a lens sums over the later "
            "positions that a stream acts on, which is for causal attention only"
        )


@partial(jax.jit, static_argnums=0)
def _final_stream(model: LensModel, params: Params, inputs: Inputs, by: float) -> Array:
    """Final stream, with a number added to the first one at the last position."""
    first, final = model.sites[0], model.sites[-1]
    acts = model.probed(params, inputs, {})[1]
    resid = acts[first].at[:, -1].add(by)
    return model.run(params, inputs, resid, first, final).astype(jnp.float32)


@jax.jit
def _largest_change(still: Array, moved: Array) -> Array:
    """Largest change ``[T]`` of a stream ``[B, T, D]`` at each position."""
    return jnp.max(jnp.abs(moved - still), axis=(0, 2))
