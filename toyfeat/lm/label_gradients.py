r"""Gradients at many sampled labels of every token, for little more than those at one.

The gradient of ``-log p(y)`` at the logits ``z = h U`` is ``p - onehot(y)``, and at the
last hidden state ``h`` it is ``U p - U_y``: the product with the matrix of the logits,
the largest of the model, is the same for all labels, and the rest is a lookup.  So the
model is run forward once, the head backward once, and only the blocks behind the site
are run backward for every draw (docs/decisions/language.md).
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.tap import readouts, rules
from toyfeat.tap.random_rules import draw_labels
from toyfeat.tap.readouts import Readout
from toyfeat.types import Acts, Array, Outputs, Params, Probe, Probed

HIDDEN = "final_norm"
"""Site of a decoder whose value the matrix of the logits is multiplied with."""


class HeadReadout(NamedTuple):
    r"""Draws of the Fisher information at the last hidden state of a decoder.

    Every draw ``r [V]`` at the logits has mean 0 and covariance
    ``diag(p) - p p^T``, with ``p = softmax(z / temperature)``, divided by the
    temperature and, as those of :func:`toyfeat.readouts.sampled_labels`, by the root
    of the number of draws, so that squared effects are summed over draws.

    It is for decoders whose logits are that product and nothing more: no ``logit_cap``.

    Attributes:
      draws: ``K``.
      kind: ``"labels"``, ``p - onehot(y)`` with ``y`` drawn from ``p``, stratified over
        the draws of a token; ``"signs"``, ``p (s . sqrt p) - s sqrt p`` with random
        signs ``s``, whose squared effect has a variance of at most twice its squared
        mean, where that of labels is as heavy-tailed as the predictions are peaked.
      temperature: of the predictions.
      seed: of the draws.
    """

    draws: int = 1
    kind: Literal["labels", "signs"] = "labels"
    temperature: float = 1.0
    seed: int = 0

    def bind(self, params: Params, tokens: Array, index: Array) -> Readout:
        """Make the readout of a batch of windows for :func:`hidden_states`.

        Args:
          params: of the decoder.
          tokens: ``[B, T]``.
          index: of the first window ``[]``, or of each ``[B]``; what is drawn for a
            window depends on it alone.

        Returns:
          A readout with the weights of :func:`toyfeat.readouts.next_token_loss`.
        """
        if not jnp.ndim(index):
            index = index + jnp.arange(len(tokens))
        return Readout(
            rule=_pull_draws,
            options=(self.draws, self.kind, self.temperature),
            labels=index,
            shared=(jax.random.key(self.seed), head_matrix(params)),
            mask=readouts.next_token_loss(tokens).mask,
        )


def bind_readout(
    probed: Probed, readout: Any, params: Params, tokens: Array, index: Array
) -> tuple[Probed, Readout]:
    """Make the readout of a batch of windows, and the probed model that it is of.

    Args:
      probed: tokens to logits.
      readout: a :class:`HeadReadout`, or a function of tokens and index.
      params: of the model.
      tokens: ``[B, T]``.
      index: of the first window, or of each.

    Returns:
      The model, up to its last norm for a :class:`HeadReadout`, and the readout.
    """
    if isinstance(readout, HeadReadout):
        return HiddenStates(probed), readout.bind(params, tokens, index)
    return probed, readout(tokens, index)


def head_matrix(params: Params) -> Array:
    """Return the matrix ``[D, V]`` of the logits of a decoder."""
    tree = params["params"]
    return tree["head"] if "head" in tree else tree["embed"]["embedding"].T


class HiddenStates(NamedTuple):
    """A probed decoder whose outputs are its last hidden states ``[B, T, D]``.

    Attributes:
      probed: the decoder, tokens to logits, which are not computed under ``jit``.
    """

    probed: Probed

    def __call__(
        self, params: Params, inputs: Any, probes: Mapping[str, Probe], /
    ) -> tuple[Outputs, Acts]:
        """Run the decoder up to its last norm."""
        _, acts = self.probed(params, inputs, probes)
        return acts[HIDDEN], acts


def _pull_draws(
    options: tuple[Any, ...], outputs: Outputs, chunk: rules.Chunk
) -> Outputs:
    """Draw at the logits of hidden states, and pull back to those."""
    draws, kind, temperature = options
    key, head = chunk.shared
    head = jnp.asarray(head, jnp.float32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, chunk.labels)

    def pull(key: Array, hidden: Array) -> Array:
        probs = jax.nn.softmax(hidden.astype(jnp.float32) @ head / temperature)
        pull_kind = _pull_labels if kind == "labels" else _pull_signs
        return pull_kind(key, probs, head, draws) / (temperature * draws**0.5)

    # One window after another: its predictions [T, V] are all that is held.
    _, pulled = jax.lax.scan(lambda _, x: (None, pull(*x)), None, (keys, outputs))
    return jnp.moveaxis(pulled, 1, 0)


def _pull_labels(key: Array, probs: Array, head: Array, draws: int) -> Array:
    """Compute ``U p - U_y`` at labels, ``[K, T, D]``."""
    labels = draw_labels(key, probs, draws)
    mean = probs @ head.T
    return mean[None] - jnp.moveaxis(head.T[labels], 1, 0)


def _pull_signs(key: Array, probs: Array, head: Array, draws: int) -> Array:
    """Compute ``U (p (s . sqrt p) - s sqrt p)`` at random signs, ``[K, T, D]``."""
    mean, root = probs @ head.T, jnp.sqrt(probs)

    def draw(key: Array) -> Array:
        signed = jax.random.rademacher(key, probs.shape, probs.dtype) * root
        along = jnp.sum(signed, axis=1)
        return along[:, None] * mean - signed @ head.T

    return jax.lax.map(draw, jax.random.split(key, draws))
