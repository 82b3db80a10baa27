"""Files of small random dictionaries, for the scripts that write tests/golden."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

D, M, N = 6, 16, 20


def tensors(width=M, out=D):
    """Draw weights whose rows have no common length."""
    shapes = {"W_enc": (D, width), "b_enc": (width,), "W_dec": (width, out)}
    shapes["b_dec"] = (out,)
    return {name: 0.6 * torch.randn(shape) for name, shape in shapes.items()}


def thresholds(width=M):
    """Draw thresholds that cut about half of the codes."""
    return torch.rand(width)


def write_tensors(path, stored):
    """Write tensors, contiguous, as ``.safetensors`` or ``.npz``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        np.savez(path, **{name: x.numpy() for name, x in stored.items()})
    else:
        save_file({name: x.contiguous() for name, x in stored.items()}, path)


def write_text(path, values):
    """Write settings, as JSON or one ``key: value`` per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(values, indent=1)
    if path.suffix == ".yaml":
        lines = (f"{name}: {json.dumps(value)}" for name, value in values.items())
        text = "\n".join(lines)
    path.write_text(text + "\n")


def write_run(path, acts, codes, out, **more):
    """Write what a reader computed, in float32."""
    arrays = {"acts": acts, "codes": codes, "out": out, **more}
    assert all(x.dtype == torch.float32 for x in arrays.values())
    assert 0.1 < (codes != 0).float().mean() < 0.9
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: x.detach().numpy() for name, x in arrays.items()})
