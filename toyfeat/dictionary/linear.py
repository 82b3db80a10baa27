"""Bases as dictionaries: all latents active, with either sign."""

import jax.numpy as jnp

from toyfeat.dictionary.base import factory_config, make_dictionary
from toyfeat.dictionary.types import Architecture, Codes, Config, Dictionary, RuleInputs
from toyfeat.linalg.precision import dot
from toyfeat.types import Array, Basis, Params


def from_basis(basis: Basis) -> tuple[Dictionary, Params]:
    r"""Make a dictionary from a basis, so that what scores dictionaries scores it too.

    ``encode`` is :math:`(a - b_{dec}) W_{enc}` and ``decode`` :math:`z W_{dec} +
    b_{dec}`, with the readers in ``W_enc``, the writers in ``W_dec`` and the mean in
    ``b_dec``: the numbers of :func:`toyfeat.encode` and :func:`toyfeat.decode`, in
    full precision.  Codes have either sign and none is left out; those past the
    rank of the basis are 0.  Gradients are accepted and have no effect.

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
    return make_dictionary(LINEAR, factory_config(LINEAR, dim, rank)), params


def _no_tensors(key: Array, config: Config, shared: Params) -> Params:
    del key, config, shared
    return {}


def _rule(config: Config, params: Params, batch: RuleInputs) -> Codes:
    del config, params
    return Codes(batch.pre)


def _read(config: Config, params: Params, acts: Array) -> Array:
    """Read coordinates as :func:`toyfeat.encode` does, in full precision."""
    del config
    acts = acts.astype(params["b_dec"].dtype)
    return dot(acts - params["b_dec"][None, :], params["W_enc"])


def _write(params: Params, values: Array) -> Array:
    """Write coordinates as :func:`toyfeat.decode` does, in full precision."""
    values = values.astype(params["b_dec"].dtype)
    return dot(values, params["W_dec"]) + params["b_dec"][None, :]


LINEAR = Architecture(
    name="linear",
    rule=_rule,
    tensors=_no_tensors,
    latent_axes={},
    read=_read,
    write=_write,
    signed=True,
    transcodes=False,
)
"""All codes, in full precision; SAELens has no such architecture."""
