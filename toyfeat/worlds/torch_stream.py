"""Random numbers of torch on a CPU after ``torch.Generator().manual_seed(seed)``.

SAELens' files store a seed instead of the magnitudes that it drew with torch.  Reading
them needs the same numbers; numpy has the same Mersenne twister.
"""

import numpy as np

# Of torch's CPU kernel: normals come in blocks of 16 uniforms, 8 radii and 8 angles,
# while fewer than 16 are drawn pair by pair in double precision.
_BLOCK = 16


def torch_uniform(seed: int, num: int) -> np.ndarray:
    """Reproduce ``torch.rand(num)``, float32."""
    return _uniform_floats(np.random.RandomState(seed), num)


def torch_normal(seed: int, num: int) -> np.ndarray:
    """Reproduce ``torch.randn(num)``, float32, up to rounding."""
    twister = np.random.RandomState(seed)
    if num < _BLOCK:
        return _normal_pairs(twister, num)
    values = _uniform_floats(twister, num)
    complete = num - num % _BLOCK
    values[:complete] = _box_muller(values[:complete])
    if num % _BLOCK:  # torch draws the last block again
        values[-_BLOCK:] = _box_muller(_uniform_floats(twister, _BLOCK))
    return values


def _words(twister: np.random.RandomState, num: int) -> np.ndarray:
    """Draw 32-bit words."""
    return twister.randint(0, 2**32, num, dtype=np.uint32)


def _uniform_floats(twister: np.random.RandomState, num: int) -> np.ndarray:
    """Draw uniforms of [0, 1) from the lower 24 bits of words, float32."""
    low = _words(twister, num) & np.uint32(2**24 - 1)
    return low.astype(np.float32) * np.float32(2.0**-24)


def _box_muller(uniforms: np.ndarray) -> np.ndarray:
    """Transform uniforms to normals in blocks, first the cosines and then the sines."""
    first, second = np.moveaxis(uniforms.reshape(-1, 2, _BLOCK // 2), 1, 0)
    radius = np.sqrt(-2 * np.log(1 - first))
    angle = np.float32(2 * np.pi) * second
    normals = radius * np.cos(angle), radius * np.sin(angle)
    return np.stack(normals, 1).reshape(-1).astype(np.float32)


def _normal_pairs(twister: np.random.RandomState, num: int) -> np.ndarray:
    """Draw normals pair by pair, in double precision."""
    # Two words make a uniform of 53 bits; two uniforms make a pair of normals.
    high_low = _words(twister, 4 * (-(-num // 2))).astype(np.uint64).reshape(-1, 2, 2)
    bits = (high_low[..., 0] << np.uint64(32)) | high_low[..., 1]
    uniforms = (bits & np.uint64(2**53 - 1)).astype(np.float64) * 2.0**-53
    radius = np.sqrt(-2 * np.log1p(-uniforms[:, 1]))
    angle = 2 * np.pi * uniforms[:, 0]
    normals = np.stack((radius * np.cos(angle), radius * np.sin(angle)), 1)
    return normals.reshape(-1)[:num].astype(np.float32)
