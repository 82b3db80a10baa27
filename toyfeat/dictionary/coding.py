"""Codes and reconstructions of a dictionary, from its configuration."""

from functools import partial

import jax
import jax.numpy as jnp

from toyfeat.dictionary.kernels import affine, scattered, taken, weighted_rows
from toyfeat.dictionary.selection import best_of_each, cut_of_batch, first_of, jumped
from toyfeat.types import Array, Dictionary, DictionaryConfig, Forward, Params

BY_BATCH = ("batchtopk", "matryoshka_batchtopk")
"""Architectures that choose codes over a batch, and by a threshold later."""

BY_EXAMPLE = ("topk", "abstopk", "gradient_topk")
"""Architectures that choose the ``k`` codes of every example."""

BY_GRADIENTS = ("gradient_topk", "paired")
"""Architectures that look at gradients to choose, if they are given any."""


def of_config(
    config: DictionaryConfig, *, decoder_norm: float = 0.1, threshold: float = 0.01
) -> Dictionary:
    """The dictionary that a configuration describes.

    Raises:
      ValueError: if the sizes do not fit, or the architecture is not known.
    """
    _check(config)
    return Dictionary(
        partial(_initial, config, decoder_norm, threshold),
        partial(_encode, config),
        partial(_decode, config),
        partial(_forward, config),
        config,
    )


def _check(config: DictionaryConfig) -> None:
    name, latents = config.architecture, config.d_sae
    chosen = name in (*BY_BATCH, *BY_EXAMPLE)
    if not chosen and name not in ("standard", "jumprelu", "gated"):
        raise ValueError(f"dictionary: there is no architecture {name!r}")
    sizes = {"dim": config.d_in, "latents": latents, "target_dim": config.d_out}
    for what, size in sizes.items():
        if size is not None and not (isinstance(size, int) and size > 0):
            raise ValueError(
                f"{name}: {what} must be an int of at least 1, got {size!r}"
            )
    if chosen and not (isinstance(config.k, int) and 1 <= config.k <= latents):
        raise ValueError(
            f"{name}: k must be an int in 1 .. latents = {latents}, got {config.k!r}"
        )
    if config.apply_b_dec_to_input and config.d_out is not None:
        raise ValueError(
            f"{name}: a transcoder has no b_dec to subtract from its input"
        )


def _initial(
    config: DictionaryConfig, decoder_norm: float, threshold: float, key: Array
) -> Params:
    """Rows of one length in random directions, the encoder their transpose."""
    out = config.d_in if config.d_out is None else config.d_out
    none = jnp.zeros(config.d_sae)
    rows = _rows(key, config.d_sae, out, decoder_norm)
    reads = rows
    if config.d_out is not None:
        other = jax.random.fold_in(key, 1)
        reads = _rows(other, config.d_sae, config.d_in, decoder_norm)
    params = {"W_enc": reads.T, "W_dec": rows, "b_dec": jnp.zeros(out)}
    if config.architecture == "gated":
        return params | {"b_gate": none, "b_mag": none, "r_mag": none}
    params = params | {"b_enc": none}
    if config.architecture == "jumprelu":
        params["threshold"] = jnp.full(config.d_sae, threshold)
    if config.architecture in BY_BATCH:
        params["topk_threshold"] = jnp.zeros(())
    return params


def _rows(key: Array, num: int, dim: int, norm: float) -> Array:
    rows = jax.random.normal(key, (num, dim))
    return norm * rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


def _encode(
    config: DictionaryConfig,
    params: Params,
    acts: Array,
    *,
    grads: Array | None = None,
    train: bool = False,
    k: Array | None = None,
) -> Array:
    if train or config.architecture not in BY_BATCH:
        values, index, _ = _values(config, params, acts, grads, k)
        return _codes(config, params, values, index)
    pre = _pre(config, params, acts)
    codes = jax.nn.relu(pre) * _units(config, params)[None, :]
    above = codes > params["topk_threshold"]
    return jnp.where(above, codes, jnp.zeros_like(codes))


def _forward(
    config: DictionaryConfig,
    params: Params,
    acts: Array,
    *,
    grads: Array | None = None,
    k: Array | None = None,
    weights: Array | None = None,
) -> Forward:
    values, index, hidden = _values(config, params, acts, grads, k, weights)
    if index is None:
        recon = values @ params["W_dec"]
    else:
        recon = weighted_rows(values, index, params["W_dec"])
    codes = _codes(config, params, values, index)
    return Forward(codes, hidden, recon + params["b_dec"][None, :], values, index)


def _codes(
    config: DictionaryConfig, params: Params, values: Array, index: Array | None
) -> Array:
    units = _units(config, params)
    if index is None:
        return values * units[None, :]
    return scattered(values * units[index], index, config.d_sae)


def _values(
    config: DictionaryConfig,
    params: Params,
    acts: Array,
    grads: Array | None,
    k: Array | None,
    weights: Array | None = None,
) -> tuple[Array, Array | None, Array]:
    """Codes in units of ``W_dec``, where they are, and what decided it."""
    pre = _pre(config, params, acts)
    if config.architecture in BY_EXAMPLE:
        return *_of_few(config, params, acts, pre, grads, k), pre
    if config.architecture == "gated":
        hidden = pre + params["b_gate"][None, :]
        size = pre * jnp.exp(params["r_mag"])[None, :] + params["b_mag"][None, :]
        size = jax.nn.relu(size)
        return jnp.where(hidden > 0, size, jnp.zeros_like(size)), None, hidden
    if config.architecture == "jumprelu":
        return jumped(pre, params["threshold"], config.bandwidth), None, pre
    values = jax.nn.relu(pre)
    if config.architecture in BY_BATCH and config.k is not None:
        codes, num = values * _units(config, params)[None, :], None
        if weights is not None:
            codes = codes * jnp.sign(weights)[:, None]
            num = jnp.sum(weights > 0)
        above = codes >= cut_of_batch(codes, config.k, k, num)
        values = jnp.where(above, values, jnp.zeros_like(values))
    return values, None, pre


def _of_few(
    config: DictionaryConfig,
    params: Params,
    acts: Array,
    pre: Array,
    grads: Array | None,
    k: Array | None,
) -> tuple[Array, Array]:
    """Only the codes that are kept take part in what follows."""
    name = config.architecture
    units = _units(config, params)
    score = pre * units[None, :]
    if name == "abstopk":
        score = jnp.abs(score)
    if name == "gradient_topk" and grads is not None:
        grads = compared(params, grads)
        slopes = jnp.einsum("nkd,md->nkm", grads, params["W_dec"]) / units[None, None]
        effect = jnp.sqrt(jnp.mean(slopes**2, axis=1))
        score = jax.nn.relu(score) * (1 + config.gradient_weight * effect)
    assert config.k is not None  # _check
    index, here = best_of_each(score, config.k)
    if k is not None:
        here = here & first_of(config.k, k)
    bias, origin = params["b_enc"], _origin(config, params)
    values = taken(acts, origin, params["W_enc"], bias, pre, index)
    if name != "abstopk":
        values = jax.nn.relu(values)
    return jnp.where(here, values, jnp.zeros_like(values)), index


def compared(params: Params, grads: Array) -> Array:
    """Gradients ``[N, K, D]`` in the units in which they are compared.

    Raises:
      ValueError: if the parameters have scales of another number of readouts.
    """
    scale = params.get("grad_scale")
    if scale is None:
        return grads
    if grads.ndim != 3 or scale.shape not in ((1,), (grads.shape[1],)):
        raise ValueError(
            f"encode: the parameters hold grad_scale {scale.shape}, one per readout, "
            f"and gradients are {grads.shape}; set grad_scale to the root mean square "
            "of each of these readouts, [K] or [1]"
        )
    return grads / scale[None, :, None]


def _pre(config: DictionaryConfig, params: Params, acts: Array) -> Array:
    if acts.ndim != 2 or acts.shape[1] != config.d_in:
        raise ValueError(
            f"encode: wanted acts [N, {config.d_in}], got shape {acts.shape}"
        )
    none = jnp.zeros(config.d_sae, acts.dtype)
    bias = params.get("b_enc", none)
    return affine(acts, _origin(config, params), params["W_enc"], bias)


def _origin(config: DictionaryConfig, params: Params) -> Array:
    """What is subtracted before reading."""
    if config.apply_b_dec_to_input:
        return params["b_dec"]
    return jnp.zeros(config.d_in, params["b_dec"].dtype)


def _decode(config: DictionaryConfig, params: Params, codes: Array) -> Array:
    if codes.ndim != 2 or codes.shape[1] != config.d_sae:
        raise ValueError(
            f"decode: wanted codes [N, {config.d_sae}], got shape {codes.shape}"
        )
    codes = codes / _units(config, params)[None, :]
    return codes @ params["W_dec"] + params["b_dec"][None, :]


def _units(config: DictionaryConfig, params: Params) -> Array:
    """How much a code of 1 in units of ``W_dec`` is."""
    if config.rescale_acts_by_decoder_norm:
        return lengths(params["W_dec"])
    return jnp.ones(config.d_sae, params["W_dec"].dtype)


def lengths(rows: Array) -> Array:
    """Euclidean lengths of rows, however long; 1 where a row is zero."""
    most = jax.lax.stop_gradient(jnp.max(jnp.abs(rows), axis=1))
    most = jnp.where(most > 0, most, jnp.ones_like(most))
    squares = jnp.sum((rows / most[:, None]) ** 2, axis=1)
    return most * jnp.sqrt(jnp.where(squares > 0, squares, jnp.ones_like(squares)))
