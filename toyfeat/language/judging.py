"""What a language model loses when a site is described by a few latents."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.dictionary import attribution_l0
from toyfeat.language.collecting import ReadoutOf, without_massive
from toyfeat.language.halves import Halves
from toyfeat.language.methods import Method, Replaced
from toyfeat.splicing import ce_recovered
from toyfeat.tap import readouts, tap
from toyfeat.types import Array, Params, Taps

_LEFT = 0.05  # of the first-order effect, which attribution L0 leaves out
precise = jax.default_matmul_precision("highest")  # small differences of large losses


class Held(NamedTuple):
    """Held-out text with everything about a site that methods are judged by.

    Attributes:
      tokens: ``[num, T]``.
      entry: ``[num, T, D]``, the residual stream that the second half starts from.
      acts: ``[num, T, width]``, at the site.
      grads: ``[num, T, K, width]``, first of the summed cross-entropy of a window; the
        others, of which methods choose latents, are what was asked for beside.
      weights: ``[num, T]``, 0 at the first and the last position and where
        activations are massive.
      mean: ``[width]``, of the activations that count, over the training text.
    """

    tokens: np.ndarray
    entry: np.ndarray
    acts: np.ndarray
    grads: np.ndarray
    weights: np.ndarray
    mean: np.ndarray


class Judgement(NamedTuple):
    """Scores of a method on held-out text; first positions are left out.

    A method that chooses latents by the gradients of the loss (of readers, a paired
    dictionary) sees the true next token, which the others do not; those of a loss
    against tokens that the model draws know nothing of it.

    Attributes:
      ce: cross-entropy of the next token with the method in the model, in nats.
      kl: divergence of its predictions from the model's, in nats.
      recovered: of the cross-entropy that the site's mean in its place costs.
      recovered_zero: the same for 0 in its place.
      explained: share of the variance of the activations.
      l0: latents per token.
      attribution_l0: fewest latents with 95 % of the first-order effect on the loss,
        :func:`toyfeat.attribution_l0`.
      attribution_l0_explained: the same of the effect that latents have, that of the
        error left out.
      unexplained: share of the first-order effect that no latent has.
      dead: share of the latents that are nowhere in this text.
      unmet: share of the tokens at which all latents together have less than 95 % of
        the first-order effect, so that their attribution L0 is the number of latents.
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


@precise
def held_out(
    cut: Halves,
    params: Params,
    tokens: np.ndarray,
    mean: Array,
    *,
    massive: float = 10.0,
    batch: int = 8,
    beside: ReadoutOf | None = None,
) -> Held:
    """Tap held-out windows once, for all methods.

    Args:
      cut: the decoder at a site.
      params: its parameters.
      tokens: ``[num, T]``, ``num`` a multiple of ``batch``.
      mean: ``[width]``, of the training text.
      massive: as of :func:`toyfeat.language.collect`.
      batch: windows at a time.
      beside: another readout whose gradients are kept too.

    Returns:
      :class:`Held`, in host memory: ``4 num T (width + K width + D)`` bytes.

    Raises:
      ValueError: if windows do not fill the batches, or have no position between
        the first and the last.
    """
    tokens = np.asarray(tokens)
    if not len(tokens) or len(tokens) % batch:
        raise ValueError(
            f"held_out: wanted whole batches of {batch} windows, got {len(tokens)}"
        )
    if tokens.shape[1] < 3:
        raise ValueError(
            "held_out: the first and the last position do not count, wanted windows of "
            f"at least 3 tokens, got {tokens.shape[1]}"
        )
    sites = tuple(dict.fromkeys((cut.entry, cut.site)))

    @jax.jit
    def tapped(params: Params, tokens: Array, index: Array) -> dict[str, Taps]:
        readout = readouts.next_token_loss(tokens)
        taps = tap(cut.whole, params, tokens, sites=sites, readout=readout)
        site = without_massive(taps[cut.site], tokens.shape[1], massive)
        if beside is not None:
            asked = beside(tokens, index)
            more = tap(cut.whole, params, tokens, sites=(cut.site,), readout=asked)
            first, other = site.grads, more[cut.site].grads
            assert first is not None
            assert other is not None
            site = site._replace(grads=jnp.concatenate([first, other], axis=1))
        return {**taps, cut.site: site}

    found: dict[str, list[np.ndarray]] = {
        n: [] for n in ("entry", "acts", "grads", "w")
    }
    for start in range(0, len(tokens), batch):
        part = tokens[start : start + batch]
        taps = tapped(params, jnp.asarray(part), start)
        site = taps[cut.site]
        assert site.grads is not None
        for name, x in (
            ("entry", taps[cut.entry].acts),
            ("acts", site.acts),
            ("grads", site.grads),
            ("w", site.weights),
        ):
            found[name].append(np.asarray(x).reshape(*part.shape, *x.shape[1:]))
    entry, acts, grads, weights = (np.concatenate(x) for x in found.values())
    return Held(tokens, entry, acts, grads, weights, np.asarray(mean))


class Losses(NamedTuple):
    """Cross-entropy of the next token on held-out text, in nats.

    Attributes:
      clean: of the model.
      zero: with 0 in the place of the site.
      mean: with its mean over the training text.
    """

    clean: float
    zero: float
    mean: float


@precise
def losses_of(cut: Halves, params: Params, held: Held, *, batch: int = 8) -> Losses:
    """What methods are measured against.

    Args:
      cut: the decoder at a site.
      params: its parameters.
      held: from :func:`held_out`.
      batch: windows at a time.

    Returns:
      :class:`Losses`.
    """
    run = jax.jit(_cross_entropy, static_argnums=0)
    sums, total = np.zeros(3), float(held.weights.sum(dtype=np.float64))
    for part in _batches(held, batch):
        place = params, part.entry, part.acts, part.weights, part.tokens
        mean = jnp.broadcast_to(held.mean[None, None, :], part.acts.shape)
        values = jnp.asarray(part.acts), jnp.zeros(part.acts.shape), mean
        sums += [float(run(cut.after, *place, value)) for value in values]
    return Losses(*(sums / total).tolist())


@precise
def judge(
    cut: Halves,
    params: Params,
    held: Held,
    methods: Mapping[str, Method],
    *,
    losses: Losses | None = None,
    batch: int = 8,
) -> dict[str, Judgement]:
    """Put methods in the place of the activations of held-out text.

    Args:
      cut: the decoder at a site.
      params: its parameters.
      held: from :func:`held_out`.
      methods: by name.
      losses: from :func:`losses_of`, if they are known.
      batch: windows at a time.

    Returns:
      Name to :class:`Judgement`.
    """
    losses = losses or losses_of(cut, params, held, batch=batch)
    clean = partial(jax.jit(_clean, static_argnums=0), cut.after)
    run = partial(jax.jit(_losses, static_argnums=0), cut.after)
    replace = {name: compiled(method) for name, method in methods.items()}
    describe = jax.jit(_described, static_argnums=0)
    sums: dict[str, dict[str, Any]] = {name: {} for name in methods}
    for part in _batches(held, batch):
        taps, entry = _flat(part), jnp.asarray(part.entry)
        was = clean(params, entry, jnp.asarray(part.acts))
        place = params, entry, part.acts, part.weights, part.tokens, was
        for name, method in methods.items():
            replaced = replace[name](taps)
            ce, kl = run(*place, replaced.recon.reshape(part.acts.shape))
            more = describe(method.latents, taps, replaced, held.mean)
            _add(sums[name], {"ce": ce, "kl": kl, **more})
    total = float(held.weights.sum(dtype=np.float64))
    return {name: _judgement(sums[name], losses, total) for name in methods}


def _flat(held: Held) -> Taps:
    width = held.acts.shape[-1]
    return Taps(
        jnp.asarray(held.acts.reshape(-1, width)),
        jnp.asarray(held.grads.reshape(-1, *held.grads.shape[2:])),
        jnp.asarray(held.weights.reshape(-1)),
    )


def compiled(method: Method) -> Callable[[Taps], Replaced]:
    """With the method's arrays as arguments, not as constants to be folded."""
    return partial(jax.jit(method.rule), method.params)


def _batches(held: Held, batch: int) -> Iterator[Held]:
    names = Held._fields[:-1]
    for start in range(0, len(held.tokens), batch):
        parts = {name: getattr(held, name)[start : start + batch] for name in names}
        yield held._replace(**parts)


def _logits(
    after: Callable[..., Array],
    params: Params,
    entry: Array,
    acts: Array,
    weights: Array,
    value: Array,
) -> tuple[Array, Array]:
    """Logits with ``value`` where weights are not 0, and logs of summed exponentials.

    Their difference are log-probabilities, of which most are not wanted.
    """
    logits = after(params, entry, jnp.where(weights[:, :, None] > 0, value, acts))
    return logits, jax.nn.logsumexp(logits, axis=2)


def _clean(
    after: Callable[..., Array], params: Params, entry: Array, acts: Array
) -> Array:
    """Log-probabilities of the model as it is."""
    return jax.nn.log_softmax(after(params, entry, acts))


def of_next(logits: Array, total: Array, tokens: Array) -> Array:
    """Cross-entropy of the next token ``[B, T]``, at the last one of nothing."""
    targets = jnp.roll(tokens, -1, axis=1)[:, :, None]
    return total - jnp.take_along_axis(logits, targets, axis=2)[:, :, 0]


def _cross_entropy(
    after: Callable[..., Array],
    params: Params,
    entry: Array,
    acts: Array,
    weights: Array,
    tokens: Array,
    value: Array,
) -> Array:
    """Summed over the positions that count."""
    logits, total = _logits(after, params, entry, acts, weights, value)
    return jnp.sum(weights * of_next(logits, total, tokens))


def _losses(
    after: Callable[..., Array],
    params: Params,
    entry: Array,
    acts: Array,
    weights: Array,
    tokens: Array,
    was: Array,
    value: Array,
) -> tuple[Array, Array]:
    """Summed cross-entropy, and divergence from the log-probabilities ``was``."""
    logits, total = _logits(after, params, entry, acts, weights, value)
    now = logits - total[:, :, None]
    kl = jnp.sum(jnp.exp(was) * (was - now), axis=2)
    return jnp.sum(weights * of_next(logits, total, tokens)), jnp.sum(weights * kl)


def _described(
    latents: int, taps: Taps, replaced: Replaced, mean: Array
) -> dict[str, Array]:
    """Sums over the tokens that count."""
    assert taps.grads is not None
    grads, weights = taps.grads[:, 0], taps.weights
    error = taps.acts - replaced.recon
    effects = jnp.einsum("nkd,nd->nk", replaced.parts, grads)
    rest = jnp.sum(error * grads, axis=1)
    count, share = attribution_l0(effects, rest, latents)
    among, _ = attribution_l0(effects, jnp.zeros_like(rest), latents)
    there = jnp.any(replaced.parts != 0, axis=2) & (weights[:, None] > 0)
    fired = jnp.zeros(latents).at[replaced.index].add(there.astype(jnp.float32))
    return {
        "error": weights @ jnp.sum(error**2, axis=1),
        "spread": weights @ jnp.sum((taps.acts - mean[None, :]) ** 2, axis=1),
        "l0": jnp.sum(there),
        "attribution_l0": weights @ count,
        "attribution_l0_explained": weights @ among,
        "unexplained": weights @ share,
        "unmet": weights @ (share > _LEFT).astype(weights.dtype),
        "fired": fired,
    }


def _add(sums: dict[str, Any], more: Mapping[str, Array]) -> None:
    for name, x in more.items():
        sums[name] = sums.get(name, 0.0) + np.asarray(x, np.float64)


def _judgement(sums: Mapping[str, Any], losses: Losses, total: float) -> Judgement:
    ce = float(sums["ce"] / total)
    return Judgement(
        ce,
        float(sums["kl"] / total),
        float(ce_recovered(losses.clean, ce, losses.mean)),
        float(ce_recovered(losses.clean, ce, losses.zero)),
        float(1 - sums["error"] / sums["spread"]),
        float(sums["l0"] / total),
        float(sums["attribution_l0"] / total),
        float(sums["attribution_l0_explained"] / total),
        float(sums["unexplained"] / total),
        float(np.mean(sums["fired"] == 0)),
        float(sums["unmet"] / total),
    )
