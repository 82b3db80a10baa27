"""Score replacements: what the model loses when a site is described by few latents."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.dictionary import attribution_l0
from toyfeat.dictionary.attributions import SHARE
from toyfeat.lm.replacements import Replaced, Replacement
from toyfeat.lm.split import HeldOut, SplitDecoder, precise
from toyfeat.metrics import ce_recovered
from toyfeat.types import Array, Params, Taps


class ReplacementScores(NamedTuple):
    """Scores of a replacement on held-out text, without the first positions.

    A replacement that chooses latents by the gradients of the loss (of readers, a
    paired dictionary) sees the true next token, which the others do not; those of a
    loss against tokens that the model draws know nothing of it.

    Attributes:
      ce: cross-entropy of the next token with the replacement in the model, in nats.
      kl: KL divergence of the predictions with the replacement from the model's own,
        in nats.
      recovered: share recovered of the cross-entropy that is lost with the mean
        activation at the site.
      recovered_zero: the same for 0 at the site.
      explained: explained variance of the activations.
      l0: active latents per token.
      attribution_l0: fewest latents with most of the first-order effect on the loss,
        :func:`toyfeat.dictionaries.attribution_l0`.
      attribution_l0_explained: the same of the effect of the latents alone, without
        that of the reconstruction error.
      unexplained: share of the first-order effect that no latent has.
      dead: share of the latents that are active nowhere in this text.
      unmet: share of the tokens at which all latents together have too little of the
        first-order effect, so that their attribution L0 is the number of latents.
    """

    ce: float
    kl: float
    recovered: float
    recovered_zero: float
    explained: float
    l0: float
    attribution_l0: float
    attribution_l0_explained: float
    unexplained: float
    dead: float
    unmet: float


class ReferenceLosses(NamedTuple):
    """Cross-entropy of the next token on held-out text, in nats.

    Attributes:
      clean: of the model itself.
      zero: with 0 at the site.
      mean: with the mean activation of the training text at the site.
    """

    clean: float
    zero: float
    mean: float


class _Batch(NamedTuple):
    """Windows of held-out text on the device, fields as in :class:`HeldOut`."""

    entry: Array
    acts: Array
    weights: Array
    tokens: Array


@precise
def reference_losses(
    split: SplitDecoder, params: Params, held_out: HeldOut, *, batch: int = 8
) -> ReferenceLosses:
    """Compute the losses that replacements are measured against.

    Args:
      split: the decoder split at a site.
      params: parameters of the decoder.
      held_out: from :func:`toyfeat.lm.split.tap_held_out`.
      batch: windows at a time.

    Returns:
      :class:`ReferenceLosses`.
    """
    # Sums in float64 over batches, then means over the tokens that count.
    loss = jax.jit(_summed_cross_entropy, static_argnums=0)
    sums, tokens = np.zeros(3), float(held_out.weights.sum(dtype=np.float64))
    for part in _batches(held_out, batch):
        windows = _to_device(part)
        mean = jnp.broadcast_to(part.mean[None, None, :], part.acts.shape)
        values = windows.acts, jnp.zeros(part.acts.shape), mean
        sums += [float(loss(split.run, params, windows, value)) for value in values]
    clean, zero, mean = (sums / tokens).tolist()
    return ReferenceLosses(clean=clean, zero=zero, mean=mean)


@precise
def evaluate_replacements(
    split: SplitDecoder,
    params: Params,
    held_out: HeldOut,
    replacements: Mapping[str, Replacement],
    *,
    losses: ReferenceLosses | None = None,
    batch: int = 8,
) -> dict[str, ReplacementScores]:
    """Score replacements of the activations of held-out text.

    Args:
      split: the decoder split at a site.
      params: parameters of the decoder.
      held_out: from :func:`toyfeat.lm.split.tap_held_out`.
      replacements: by name.
      losses: from :func:`reference_losses`, if they are known.
      batch: windows at a time.

    Returns:
      Name to :class:`ReplacementScores`.
    """
    # Programs, compiled once for all batches and replacements of one shape.
    losses = losses or reference_losses(split, params, held_out, batch=batch)
    log_probs = partial(jax.jit(_log_probs, static_argnums=0), split.run)
    ce_and_kl = partial(jax.jit(_ce_and_kl, static_argnums=0), split.run)
    summed_scores = jax.jit(_summed_scores, static_argnums=0)
    rules = {name: compile_rule(item) for name, item in replacements.items()}
    sums: dict[str, dict[str, Any]] = {name: {} for name in replacements}
    for part in _batches(held_out, batch):
        # The model's own predictions are shared by all replacements.
        windows, taps = _to_device(part), _to_taps(part)
        clean = log_probs(params, windows)
        # Each replacement: one run with its reconstruction, and scores without a run.
        for name, replacement in replacements.items():
            replaced = rules[name](taps)
            value = replaced.recon.reshape(part.acts.shape)
            ce, kl = ce_and_kl(params, windows, clean, value)
            scores = summed_scores(replacement.latents, taps, replaced, part.mean)
            _add(sums[name], {"ce": ce, "kl": kl, **scores})
    tokens = float(held_out.weights.sum(dtype=np.float64))
    return {name: _mean_scores(sums[name], losses, tokens) for name in replacements}


def compile_rule(replacement: Replacement) -> Callable[[Taps], Replaced]:
    """Compile a replacement with its arrays as arguments.

    As constants they would be folded into the program.
    """
    return partial(jax.jit(replacement.rule), replacement.params)


def next_token_cross_entropy(
    logits: Array, log_normalizer: Array, tokens: Array
) -> Array:
    """Cross-entropy of the next token ``[B, T]``, meaningless at the last position."""
    targets = jnp.roll(tokens, -1, axis=1)[:, :, None]
    return log_normalizer - jnp.take_along_axis(logits, targets, axis=2)[:, :, 0]


def _batches(held_out: HeldOut, batch: int) -> Iterator[HeldOut]:
    """Held-out text, ``batch`` windows at a time."""
    names = [name for name in HeldOut._fields if name != "mean"]
    for start in range(0, len(held_out.tokens), batch):
        windows = slice(start, start + batch)
        parts = {name: getattr(held_out, name)[windows] for name in names}
        yield held_out._replace(**parts)


def _to_device(held_out: HeldOut) -> _Batch:
    """Windows as arrays on the device."""
    return _Batch(*(jnp.asarray(getattr(held_out, name)) for name in _Batch._fields))


def _to_taps(held_out: HeldOut) -> Taps:
    """Tokens of all windows as rows."""
    width = held_out.acts.shape[-1]
    return Taps(
        jnp.asarray(held_out.acts.reshape(-1, width)),
        jnp.asarray(held_out.grads.reshape(-1, *held_out.grads.shape[2:])),
        jnp.asarray(held_out.weights.reshape(-1)),
    )


def _log_probs(run: Callable[..., Array], params: Params, windows: _Batch) -> Array:
    """Log-probabilities of the model itself."""
    return jax.nn.log_softmax(run(params, windows.entry, windows.acts))


def _logits_with(
    run: Callable[..., Array], params: Params, windows: _Batch, value: Array
) -> tuple[Array, Array]:
    """Logits with ``value`` where weights are not 0, and their log-normalizers.

    Most log-probabilities, the differences of the two, are not needed.
    """
    counts = windows.weights[:, :, None] > 0
    logits = run(params, windows.entry, jnp.where(counts, value, windows.acts))
    return logits, jax.nn.logsumexp(logits, axis=2)


def _summed_cross_entropy(
    run: Callable[..., Array], params: Params, windows: _Batch, value: Array
) -> Array:
    """Cross-entropy with ``value`` at the site, summed over tokens that count."""
    logits, log_normalizer = _logits_with(run, params, windows, value)
    ce = next_token_cross_entropy(logits, log_normalizer, windows.tokens)
    return jnp.sum(windows.weights * ce)


def _ce_and_kl(
    run: Callable[..., Array],
    params: Params,
    windows: _Batch,
    clean: Array,
    value: Array,
) -> tuple[Array, Array]:
    """Summed cross-entropy, and KL divergence from log-probabilities ``clean``."""
    # KL(p | q) = sum p (log p - log q), with p of the model itself.
    logits, log_normalizer = _logits_with(run, params, windows, value)
    log_probs = logits - log_normalizer[:, :, None]
    kl = jnp.sum(jnp.exp(clean) * (clean - log_probs), axis=2)
    ce = next_token_cross_entropy(logits, log_normalizer, windows.tokens)
    return jnp.sum(windows.weights * ce), jnp.sum(windows.weights * kl)


def _summed_scores(
    latents: int, taps: Taps, replaced: Replaced, mean: Array
) -> dict[str, Array]:
    """Scores that need no run of the model, summed over the tokens that count."""
    if taps.grads is None:
        raise ValueError("evaluate_replacements: wanted held-out text with gradients")
    grads, weights = taps.grads[:, 0], taps.weights

    # First-order effects on the loss: of every part, and of the reconstruction error.
    error = taps.acts - replaced.recon
    attributions = jnp.einsum("nkd,nd->nk", replaced.parts, grads)
    error_effect = jnp.sum(error * grads, axis=1)
    l0, unexplained = attribution_l0(attributions, error_effect, latents)
    no_error = jnp.zeros_like(error_effect)
    l0_explained, _ = attribution_l0(attributions, no_error, latents)

    # Latents are active where they add something to a token that counts.
    active = jnp.any(replaced.parts != 0, axis=2) & (weights[:, None] > 0)
    fired = jnp.zeros(latents).at[replaced.index].add(active.astype(jnp.float32))
    return {
        "error": weights @ jnp.sum(error**2, axis=1),
        "spread": weights @ jnp.sum((taps.acts - mean[None, :]) ** 2, axis=1),
        "l0": jnp.sum(active),
        "attribution_l0": weights @ l0,
        "attribution_l0_explained": weights @ l0_explained,
        "unexplained": weights @ unexplained,
        "unmet": weights @ (unexplained > 1 - SHARE).astype(weights.dtype),
        "fired": fired,
    }


def _add(sums: dict[str, Any], terms: Mapping[str, Array]) -> None:
    """Add terms to sums in float64, in place."""
    for name, term in terms.items():
        sums[name] = sums.get(name, 0.0) + np.asarray(term, np.float64)


def _mean_scores(
    sums: Mapping[str, Any], losses: ReferenceLosses, tokens: float
) -> ReplacementScores:
    """Scores per token from sums over tokens."""
    ce = float(sums["ce"] / tokens)
    return ReplacementScores(
        ce=ce,
        kl=float(sums["kl"] / tokens),
        recovered=float(ce_recovered(losses.clean, ce, losses.mean)),
        recovered_zero=float(ce_recovered(losses.clean, ce, losses.zero)),
        explained=float(1 - sums["error"] / sums["spread"]),
        l0=float(sums["l0"] / tokens),
        attribution_l0=float(sums["attribution_l0"] / tokens),
        attribution_l0_explained=float(sums["attribution_l0_explained"] / tokens),
        unexplained=float(sums["unexplained"] / tokens),
        dead=float(np.mean(sums["fired"] == 0)),
        unmet=float(sums["unmet"] / tokens),
    )
