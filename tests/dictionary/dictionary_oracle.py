"""Every architecture as its paper writes it, in float64 numpy."""

import numpy as np

RESCALED = ("topk", "signed", "gradient", "batch", "matryoshka")
GRADIENT_WEIGHT = 2.0


def double(arrays):
    return {name: np.asarray(x, np.float64) for name, x in arrays.items()}


def mask_of_largest(score, num):
    """Where the largest ``num`` of each row are."""
    order = np.argsort(-score, axis=1, kind="stable")[:, :num]
    mask = np.zeros(score.shape, bool)
    np.put_along_axis(mask, order, True, axis=1)
    return mask


def row_lengths(rows):
    return np.linalg.norm(rows, axis=1)


def units(name, params):
    """Codes of a value of 1 in units of the rows of ``W_dec``."""
    length = row_lengths(params["W_dec"])
    return length if name in RESCALED else np.ones_like(length)


def values_and_pre(name, params, acts, grads=None, *, k=None, train=True):
    """Codes in units of the rows of ``W_dec``, and what decides which are kept."""
    p, acts = double(params), np.asarray(acts, np.float64)
    read = (acts - p["b_dec"]) @ p["W_enc"]
    if name == "linear":
        return read, read
    if name == "gated":
        sizes = np.maximum(read * np.exp(p["r_mag"]) + p["b_mag"], 0)
        return sizes * (read + p["b_gate"] > 0), read + p["b_gate"]
    pre = read + p["b_enc"]
    values, scaled = np.maximum(pre, 0), pre * units(name, p)
    if name == "standard":
        return values, pre
    if name == "jump":
        return values * (pre > p["threshold"]), pre
    if name == "signed":
        return pre * mask_of_largest(np.abs(scaled), k), pre
    if name == "gradient":
        rows = p["W_dec"] / units(name, p)[:, None]
        effect = np.sqrt(np.mean((np.asarray(grads) @ rows.T) ** 2, axis=1))
        score = np.maximum(scaled, 0) * (1 + GRADIENT_WEIGHT * effect)
        return values * mask_of_largest(score, k), pre
    if name == "paired":
        return values * paired_support(p, pre, grads, k), pre
    if name in ("topk", "topk plain"):
        return values * mask_of_largest(scaled, k), pre
    codes = np.maximum(scaled, 0)  # of a batch
    if not train:
        return values * (codes > p["topk_threshold"]), pre
    flat = mask_of_largest(codes.reshape(1, -1), k * len(acts))
    return values * flat.reshape(codes.shape), pre


def paired_support(p, pre, grads, k):
    """The latents of each example that both write and read."""
    score = np.maximum(pre, 0) ** 2 * row_lengths(p["W_dec"]) ** 2
    if grads is not None:
        read = np.sum((np.asarray(grads, np.float64) @ p["P"]) ** 2, axis=1)
        score = score * read * row_lengths(p["W_read"]) ** 2
    return mask_of_largest(score, k)
