r"""The KL of a population at its mean reconstruction: one run of the model for all.

End-to-end training runs the model behind a site forward and backward for every
dictionary.  Dictionaries that are trained side by side see the same tokens, and their
reconstructions :math:`\hat x_i` are near their mean :math:`\bar x`.  So the model is
run at the mean, once a step, and every member has the expansion around it:

.. math:: \mathrm{KL}(\hat x_i) \approx \mathrm{KL}(\bar x) + s \cdot \delta_i
   + \tfrac12 \sum_k (g_k \cdot \delta_i)^2, \qquad \delta_i = \hat x_i - \bar x

with the slope :math:`s = \nabla \mathrm{KL}(\bar x)` and :math:`g_k` gradients at
labels that the model draws there, divided by :math:`\sqrt K`.  Unlike an expansion that
is made before training (:func:`toyfeat.losses.expanded_kl`) it is never out of date.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from toyfeat.checks import check_function, check_int
from toyfeat.dictionary.functional import RunBehind, Windows, require_windows
from toyfeat.dictionary.types import MEMBERS, Inputs, Term
from toyfeat.tap.random_rules import draw_labels
from toyfeat.types import Array


def shared_kl(run: RunBehind, *, draws: int = 1) -> Term:
    r"""Penalize the KL of every member of a population, expanded at their mean.

    A step runs the model behind the site twice forward and ``1 + draws`` times
    backward, for all members together; :func:`toyfeat.losses.spliced_kl` runs it twice
    forward and once backward for each.  Alone, a member has the gradient of that.

    Args:
      run: the model behind the site.
      draws: ``K``, stratified labels per token, of the curvature: what a member does
        beside the mean.  0 leaves it out.

    Returns:
      :class:`Term` for taps with a context of :class:`Windows`, in a trainer of
      :func:`toyfeat.population`.  In nats, mean over the tokens that count; others
      keep their activations.  With ``population(group=)`` the mean is that of a group,
      for which the model is run once.

    Raises:
      TypeError: if ``run`` is no function, or ``draws`` no number.
      ValueError: from the term, outside of a population, and for taps without windows.
    """
    check_function("shared_kl", "run", run, "(params, entry, value)")
    check_int("shared_kl", "draws", draws, least=0)

    def loss(inputs: Inputs) -> Array:
        windows = require_windows("shared_kl", inputs)
        own = inputs.out.recon * inputs.unit
        point = jax.lax.stop_gradient(_mean_over_members(own))
        # No member has an axis in what follows, so that the model is run once.
        value, slope, grads = _expand(run, draws, windows, inputs.weights, point)
        change = own - point
        effect = jnp.einsum("knd,nd->kn", grads, change)
        return value + jnp.sum(slope * change) + jnp.sum(effect**2) / 2

    return Term("shared_kl", loss)


def _mean_over_members(values: Array) -> Array:
    """Average over the members of a population."""
    try:
        return jax.lax.pmean(values, MEMBERS)
    except NameError:
        raise ValueError(
            "shared_kl: wanted a trainer of a population, got one of a single "
            "dictionary; make it by toyfeat.population, or take losses.spliced_kl"
        ) from None


def _expand(
    run: RunBehind, draws: int, windows: Windows, weights: Array, point: Array
) -> tuple[Array, Array, Array]:
    """Compute the mean KL ``[]``, its slope ``[N, E]`` and draws ``[K, N, E]``."""
    shape = windows.acts.shape
    counts = weights.reshape(*shape[:2], 1) > 0
    behind = partial(run, windows.params, windows.entry)
    clean = jax.nn.log_softmax(behind(windows.acts))

    def splice(value: Array) -> Array:
        return behind(jnp.where(counts, value.reshape(shape), windows.acts))

    logits, pull = jax.vjp(splice, point)
    spliced = jax.nn.log_softmax(logits)
    kl = jnp.sum(jnp.exp(clean) * (clean - spliced), axis=2).reshape(-1)
    # Backward from q - p, and from q - onehot of labels, each token by its weight.
    shares = weights.reshape(*shape[:2], 1).astype(logits.dtype)
    (slope,) = pull(shares * (jnp.exp(spliced) - jnp.exp(clean)))
    grads = jnp.zeros((0, *point.shape), point.dtype)
    if draws:
        probs = jnp.exp(spliced)
        keys = jax.random.split(_key_of(windows.acts), len(probs))
        labels = jax.vmap(draw_labels, (0, 0, None))(keys, probs, draws)
        by_draw = jnp.moveaxis(labels, 2, 0)
        pull_label = partial(_pull_label, pull, probs, jnp.sqrt(shares))
        grads = jax.lax.map(pull_label, by_draw) / draws**0.5
    return jax.lax.stop_gradient((jnp.sum(weights * kl), slope, grads))


def _pull_label(pull: Any, probs: Array, roots: Array, labels: Array) -> Array:
    """Compute gradients of the loss at a label of every token, by roots of weights."""
    hits = jax.nn.one_hot(labels, probs.shape[2], dtype=probs.dtype)
    return pull(roots * (probs - hits))[0]


def _key_of(acts: Array) -> Array:
    """Make a key of the bits of a batch: other tokens, other draws."""
    # Sums of whole numbers are the same in any order, on any number of devices.
    bits = jax.lax.bitcast_convert_type(acts.astype(jnp.float32), jnp.uint32)
    return jax.random.fold_in(jax.random.key(0), jnp.sum(bits, dtype=jnp.uint32))
