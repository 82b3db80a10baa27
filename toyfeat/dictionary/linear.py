"""Bases as dictionaries: all latents at work, with either sign."""

from functools import partial

import jax.numpy as jnp

from toyfeat.dictionary.coding import of_config
from toyfeat.linalg.precise import dot
from toyfeat.types import Array, Basis, Dictionary, DictionaryConfig, Forward, Params


def from_basis(basis: Basis) -> tuple[Dictionary, Params]:
    r"""A basis as a dictionary, so that what judges dictionaries judges it too.

    ``encode`` is :math:`(a - b_{dec}) W_{enc}` and ``decode`` :math:`z W_{dec} +
    b_{dec}`, with the readers in ``W_enc``, the writers in ``W_dec`` and the mean in
    ``b_dec``: the numbers of :func:`toyfeat.encode` and :func:`toyfeat.decode`, in
    full precision.  Codes have either sign and no code is left out; those past the
    rank of the basis are 0.  Gradients are taken and not looked at.

    Args:
      basis: from any decomposition, one (no leading axes).

    Returns:
      :class:`Dictionary` of architecture ``"linear"`` and its parameters ``W_enc [D,
      R]``, ``W_dec [R, D]``, ``b_dec [D]``, which :func:`toyfeat.save_tree` writes.
      It can be trained, to a linear autoencoder; its ``init`` makes random rows.

    Raises:
      ValueError: if the arrays of the basis do not fit each other.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from toyfeat import Taps, moments, pca
      >>> acts = jax.random.normal(jax.random.key(0), (64, 4)) + 3
      >>> acc = moments(4, grads=False)
      >>> taps = Taps(acts, None, jnp.ones(64))
      >>> sae, params = from_basis(pca(acc.finish(acc.update(acc.init(), taps)), 4))
      >>> again = sae.decode(params, sae.encode(params, acts))
      >>> sae.config.architecture, bool(jnp.allclose(again, acts, atol=1e-4))
      ('linear', True)
    """
    shapes = tuple(jnp.shape(x) for x in (basis.mean, basis.readers, basis.writers))
    dim, rank = shapes[1] if len(shapes[1]) == 2 else (0, 0)
    if not dim or shapes != ((dim,), (dim, rank), (rank, dim)):
        raise ValueError(
            "from_basis: wanted mean [D], readers [D, R] and writers [R, D], got "
            f"{', '.join(map(str, shapes))}; take one basis of a stack by "
            "jax.tree.map(lambda x: x[0], basis)"
        )
    params = {"W_enc": basis.readers, "W_dec": basis.writers, "b_dec": basis.mean}
    params = {name: jnp.asarray(x) for name, x in params.items()}
    return _linear(DictionaryConfig("linear", dim, rank)), params


def _linear(config: DictionaryConfig) -> Dictionary:
    plain = of_config(config._replace(architecture="standard"))
    return Dictionary(
        partial(_initial, plain),
        partial(_encode, config),
        partial(_decode, config),
        partial(_forward, config),
        config,
    )


def _initial(plain: Dictionary, key: Array) -> Params:
    return {name: x for name, x in plain.init(key).items() if name != "b_enc"}


def _encode(
    config: DictionaryConfig,
    params: Params,
    acts: Array,
    *,
    grads: Array | None = None,
    train: bool = False,
    k: Array | None = None,
) -> Array:
    del grads, train, k
    _check("encode", "acts", acts, config.d_in)
    acts = acts.astype(params["b_dec"].dtype)
    return dot(acts - params["b_dec"][None, :], params["W_enc"])


def _decode(config: DictionaryConfig, params: Params, codes: Array) -> Array:
    _check("decode", "codes", codes, config.d_sae)
    codes = codes.astype(params["b_dec"].dtype)
    return dot(codes, params["W_dec"]) + params["b_dec"][None, :]


def _forward(
    config: DictionaryConfig,
    params: Params,
    acts: Array,
    *,
    grads: Array | None = None,
    k: Array | None = None,
) -> Forward:
    codes = _encode(config, params, acts, grads=grads, k=k)
    return Forward(codes, codes, _decode(config, params, codes), codes)


def _check(who: str, name: str, array: Array, width: int) -> None:
    if array.ndim != 2 or array.shape[1] != width:
        raise ValueError(f"{who}: wanted {name} [N, {width}], got shape {array.shape}")
