"""Codes and reconstructions of a dictionary, from its configuration."""

from functools import partial

import jax
import jax.numpy as jnp

from toyfeat.dictionary.selection import jumped, kept_of_batch, kept_of_each
from toyfeat.types import Array, Dictionary, DictionaryConfig, Params

BY_BATCH = ("batchtopk", "matryoshka_batchtopk")
"""Architectures that choose codes over a batch, and by a threshold later."""

BY_EXAMPLE = ("topk", "abstopk", "gradient_topk")
"""Architectures that choose the ``k`` codes of every example."""


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
    if acts.ndim != 2 or acts.shape[1] != config.d_in:
        raise ValueError(
            f"encode: wanted acts [N, {config.d_in}], got shape {acts.shape}"
        )
    read = acts
    if config.apply_b_dec_to_input:
        read = acts - params["b_dec"][None, :]
    read = read @ params["W_enc"]
    if config.architecture == "gated":
        size = read * jnp.exp(params["r_mag"])[None, :] + params["b_mag"][None, :]
        there = read + params["b_gate"][None, :] > 0
        return jnp.where(there, jax.nn.relu(size), jnp.zeros_like(size))
    pre = read + params["b_enc"][None, :]
    if config.rescale_acts_by_decoder_norm:
        pre = pre * _lengths(params)[None, :]
    return _kept(config, params, pre, grads, train, k)


def _kept(
    config: DictionaryConfig,
    params: Params,
    pre: Array,
    grads: Array | None,
    train: bool,
    k: Array | None,
) -> Array:
    name = config.architecture
    if name == "jumprelu":
        return jumped(pre, params["threshold"], config.bandwidth)
    codes = jax.nn.relu(pre)
    if config.k is None:
        return codes
    if name == "abstopk":
        return kept_of_each(pre, jnp.abs(pre), config.k, k)
    if name in BY_BATCH:
        if train:
            return kept_of_batch(codes, config.k, k)
        above = codes > params["topk_threshold"]
        return jnp.where(above, codes, jnp.zeros_like(codes))
    score = pre
    if name == "gradient_topk" and grads is not None:
        slopes = jnp.einsum("nkd,md->nkm", grads, params["W_dec"])
        if config.rescale_acts_by_decoder_norm:
            slopes = slopes / _lengths(params)[None, None, :]
        effect = jnp.sqrt(jnp.mean(slopes**2, axis=1))
        score = codes * (1 + config.gradient_weight * effect)
    return kept_of_each(codes, score, config.k, k)


def _decode(config: DictionaryConfig, params: Params, codes: Array) -> Array:
    if codes.ndim != 2 or codes.shape[1] != config.d_sae:
        raise ValueError(
            f"decode: wanted codes [N, {config.d_sae}], got shape {codes.shape}"
        )
    if config.rescale_acts_by_decoder_norm:
        codes = codes / _lengths(params)[None, :]
    return codes @ params["W_dec"] + params["b_dec"][None, :]


def _lengths(params: Params) -> Array:
    """Of the rows of ``W_dec``; 1 where a row is zero."""
    squares = jnp.sum(params["W_dec"] ** 2, axis=1)
    return jnp.sqrt(jnp.where(squares > 0, squares, jnp.ones_like(squares)))
