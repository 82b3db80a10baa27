"""The numbers that ``torch.Generator().manual_seed(seed)`` gives on CPU.

SAELens' files hold a seed where they could hold the features' magnitudes, so that
reading them takes torch's Mersenne twister; numpy has the same one.
"""

import numpy as np


def torch_uniform(seed: int, num: int) -> np.ndarray:
    """``torch.rand(num)``, float32."""
    return _floats(np.random.RandomState(seed), num)


def torch_normal(seed: int, num: int) -> np.ndarray:
    """``torch.randn(num)``, float32 to rounding."""
    twister = np.random.RandomState(seed)
    if num < 16:
        return _pairs(twister, num)
    values = _floats(twister, num)
    whole = num - num % 16
    values[:whole] = _box_muller(values[:whole])
    if num % 16:  # the last sixteen are drawn again
        values[-16:] = _box_muller(_floats(twister, 16))
    return values


def _words(twister: np.random.RandomState, num: int) -> np.ndarray:
    return twister.randint(0, 2**32, num, dtype=np.uint32)


def _floats(twister: np.random.RandomState, num: int) -> np.ndarray:
    low = _words(twister, num) & np.uint32(2**24 - 1)
    return low.astype(np.float32) * np.float32(2.0**-24)


def _box_muller(uniforms: np.ndarray) -> np.ndarray:
    """In blocks of sixteen, eight cosines and eight sines."""
    first, second = np.moveaxis(uniforms.reshape(-1, 2, 8), 1, 0)
    radius = np.sqrt(-2 * np.log(1 - first))
    angle = np.float32(2 * np.pi) * second
    both = radius * np.cos(angle), radius * np.sin(angle)
    return np.stack(both, 1).reshape(-1).astype(np.float32)


def _pairs(twister: np.random.RandomState, num: int) -> np.ndarray:
    """One after the other, in double precision of 53 bits."""
    high_low = _words(twister, 4 * (-(-num // 2))).astype(np.uint64).reshape(-1, 2, 2)
    bits = (high_low[..., 0] << np.uint64(32)) | high_low[..., 1]
    uniforms = (bits & np.uint64(2**53 - 1)).astype(np.float64) * 2.0**-53
    radius = np.sqrt(-2 * np.log1p(-uniforms[:, 1]))
    angle = 2 * np.pi * uniforms[:, 0]
    both = np.stack((radius * np.cos(angle), radius * np.sin(angle)), 1)
    return both.reshape(-1)[:num].astype(np.float32)
