"""The exact quadratic of a model, as a term and beside its KL."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.dictionary.losses import Inputs, Term
from toyfeat.jobs.results import Rows
from toyfeat.lm.split import HeldOut, SplitDecoder
from toyfeat.types import Array, Params


def second_order_kl(run: Any, params: Params, acts: Array, error: Array) -> Array:
    """Compute ``e^T F e / 2 [B, T]`` of all errors of a window together, exactly.

    With ``d = J e`` the first-order change of the logits it is half of the variance of
    ``d`` under the predictions: one forward-mode derivative.
    """
    logits, change = jax.jvp(lambda x: run(params, x, x), (acts,), (error,))
    p = jax.nn.softmax(logits)
    mean = jnp.sum(p * change, axis=2, keepdims=True)
    return jnp.sum(p * (change - mean) ** 2, axis=2) / 2


def quadratic(run: Any) -> Term:
    """Penalize the exact second-order KL of whole windows, at a residual site."""

    def loss(inputs: Inputs) -> Array:
        windows = inputs.context
        shape = windows.acts.shape
        counts = (inputs.weights > 0).reshape(*shape[:2], 1)
        recon = (inputs.out.recon * inputs.unit).reshape(shape)
        error = jnp.where(counts, recon - windows.acts, 0)
        kl = second_order_kl(run, windows.params, windows.acts, error)
        return jnp.sum(inputs.weights * kl.reshape(-1))

    return Term("quadratic", loss)


def error_sizes(
    split: SplitDecoder,
    params: Params,
    held: HeldOut,
    sae: Any,
    tensors: Any,
    rows: Rows,
    *,
    windows: int = 8,
) -> None:
    """Compare quadratics with the KL at multiples of a dictionary's error.

    Rows have means over tokens of the true KL, of the exact quadratic of all tokens
    together, and of the quadratic of every token alone, from the gradients of the loss
    at the true next token (an estimate with one draw).
    """
    acts = jnp.asarray(held.acts[:windows])
    weights = jnp.asarray(held.weights[:windows])
    flat = acts.reshape(-1, acts.shape[2])
    error = (sae.decode(tensors, sae.encode(tensors, flat)) - flat).reshape(acts.shape)
    error = jnp.where(weights[:, :, None] > 0, error, 0)

    @jax.jit
    def measure(params: Params, acts: Array, error: Array) -> tuple[Array, Array]:
        clean = jax.nn.log_softmax(split.run(params, acts, acts))
        value = acts + error
        spliced = jax.nn.log_softmax(split.run(params, value, value))
        kl = jnp.sum(jnp.exp(clean) * (clean - spliced), axis=2)
        return kl, second_order_kl(split.run, params, acts, error)

    total = float(weights.sum())
    grads = jnp.asarray(held.grads[:windows, :, 0])
    first = jnp.sum(grads * error, axis=2) ** 2 / 2
    for size in (0.03, 0.1, 0.3, 0.6, 1.0):
        kl, joint = measure(params, acts, size * error)
        values = {
            "kl": float((weights * kl).sum()) / total,
            "joint": float((weights * joint).sum()) / total,
            "alone_true_label": size**2 * float((weights * first).sum()) / total,
        }
        counts = np.asarray(weights) > 0
        values |= compare_tokens(np.asarray(kl)[counts], np.asarray(joint)[counts])
        rows.add({"row": f"error x {size}", "seed": -1}, values)
        print(f"error x {size}: {values}", flush=True)


def compare_tokens(kl: np.ndarray, quadratic: np.ndarray) -> dict[str, float]:
    """Compare a quadratic with the KL token by token, ``[N]`` both."""
    ratio = quadratic / np.maximum(kl, 1e-9)
    logs = np.log(kl + 1e-9), np.log(quadratic + 1e-9)
    return {
        "ratio_median": float(np.median(ratio)),
        "ratio_90": float(np.quantile(ratio, 0.9)),
        "correlation": float(np.corrcoef(*logs)[0, 1]),
    }


def scorer(
    split: SplitDecoder, params: Params, held: Callable[[], HeldOut], batch: int
) -> Callable[[Any, Params], dict[str, float]]:
    """Make ``(dictionary, params) -> scores`` on held-out text, one program for all.

    Means over the tokens that count: cross-entropy with the reconstruction and of the
    model, KL, share of the variance that is explained, latents per token.
    """

    @partial(jax.jit, static_argnums=0)
    def sums(sae: Any, model: Params, tensors: Params, part: Any) -> Any:
        entry, acts, weights, tokens, mean = part
        flat = acts.reshape(-1, acts.shape[2])
        codes = sae.encode(tensors, flat)
        recon = sae.decode(tensors, codes).reshape(acts.shape)
        value = jnp.where(weights[:, :, None] > 0, recon, acts)
        clean = jax.nn.log_softmax(split.run(model, entry, acts))
        spliced = jax.nn.log_softmax(split.run(model, entry, value))
        targets = jnp.roll(tokens, -1, axis=1)[:, :, None]
        losses = [-jnp.take_along_axis(x, targets, 2)[..., 0] for x in (spliced, clean)]
        kl = jnp.sum(jnp.exp(clean) * (clean - spliced), axis=2)
        spread = jnp.sum((acts - mean[None, None]) ** 2, axis=2)
        error = jnp.sum((acts - recon) ** 2, axis=2)
        l0 = jnp.sum(codes != 0, axis=1).reshape(weights.shape)
        values = [*losses, kl, error, spread, l0.astype(kl.dtype)]
        return jnp.stack([jnp.sum(weights * x) for x in values])

    def score(sae: Any, tensors: Params) -> dict[str, float]:
        text, total = held(), np.zeros(6)
        for i in range(0, len(text.tokens), batch):
            rows = slice(i, i + batch)
            part = (
                text.entry[rows],
                text.acts[rows],
                text.weights[rows],
                text.tokens[rows],
                text.mean,
            )
            total += np.asarray(sums(sae, params, tensors, part), np.float64)
        ce, clean, kl, error, spread, l0 = total / text.weights.sum(dtype=np.float64)
        return {
            "ce": float(ce),
            "clean": float(clean),
            "kl": float(kl),
            "explained": float(1 - error / spread),
            "l0": float(l0),
        }

    return score
