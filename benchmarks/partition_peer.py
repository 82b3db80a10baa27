"""Time a step of decomposing 5-2 against a plain implementation in torch, in turns.

The torch side is written from the definition: tied parts, one MLP per component, masks
with random sources and remainders, the error with all sites masked and with each alone,
the penalty, Adam.  Both sides get the same number of rows, of the same distribution.
Needs an environment with torch.

    python benchmarks/partition_peer.py --rows 928 --json rows.json
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from harness import BenchmarkConfig, finish, medians, parse_command, row
from partition_toys import TOYS, cpu_seconds, decomposition_of, train_targets

import toyfeat as ft

HIDDEN = 16
COEFFICIENT = 3e-3
LEAK = 0.01


@dataclass(frozen=True)
class PeerConfig(BenchmarkConfig):
    """Options of this benchmark."""

    rows: int = 928
    """Rows of a batch: those with an active input among 4,096, and one of zeros."""
    rounds: int = 7
    """Turns."""


class _LowerLeaky(torch.autograd.Function):
    """The squashing of importances for masks."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        ctx.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,), grad = ctx.saved_tensors, grads[0]
        zero = torch.zeros_like(grad)
        inside = torch.where(x > 1, zero, grad)
        return torch.where(x > 0, inside, torch.where(grad < 0, LEAK * grad, zero))


def _parameter(*shape: int, scale: float) -> Any:
    return torch.nn.Parameter(scale * torch.randn(*shape))


def _mlp(components: int) -> list[Any]:
    """Draw an MLP of one input and one output per component."""
    first = _parameter(components, HIDDEN, scale=math.sqrt(2))
    last = _parameter(components, HIDDEN, scale=HIDDEN**-0.5)
    zeros = _parameter(components, HIDDEN, scale=0), _parameter(components, scale=0)
    return [first, zeros[0], last, zeros[1]]


def _importance(inner: Any, mlp: list[Any]) -> Any:
    hidden = torch.nn.functional.gelu(inner[..., None] * mlp[0] + mlp[1])
    return (hidden * mlp[2]).sum(-1) + mlp[3]


def _site(x: Any, matrix: Any, v: Any, u: Any, source: Any) -> Any:
    """Multiply by a weight, masked where there is a source."""
    if source is None:
        return x @ matrix
    mask, delta = source
    return ((x @ v) * mask) @ u + delta[:, None] * (x @ (matrix - v @ u))


def _draw(lower: Any) -> tuple[Any, Any]:
    return lower + (1 - lower) * torch.rand_like(lower), torch.rand(len(lower))


def torch_step(
    weight: np.ndarray, bias: np.ndarray, x: np.ndarray, components: int
) -> Callable[[], Any]:
    """Make a step of training in torch.

    Args:
      weight: ``[F, D]`` of the target.
      bias: ``[F]``.
      x: ``[B, F]``.
      components: parts.

    Returns:
      A function that does one step.
    """
    torch.set_num_threads(1)  # threads that wait on a busy machine spin
    torch.manual_seed(0)
    w, b, data = (torch.tensor(np.array(a)) for a in (weight, bias, x))
    v = _parameter(w.shape[0], components, scale=w.shape[0] ** -0.5)
    u = _parameter(components, w.shape[1], scale=components**-0.5)
    mlps = [_mlp(components), _mlp(components)]
    optimizer = torch.optim.Adam([v, u, *mlps[0], *mlps[1]], lr=1e-3)
    hidden = data @ w
    target = torch.relu(hidden @ w.T + b)

    def error(first: Any, second: Any) -> Any:
        inner = _site(data, w, v, u, first)
        output = torch.relu(_site(inner, w.T, u.T, v.T, second) + b)
        return ((output - target) ** 2).mean()

    def step() -> None:
        optimizer.zero_grad()
        raw = _importance(data @ v, mlps[0]), _importance(hidden @ u.T, mlps[1])
        lower = [_LowerLeaky.apply(r) for r in raw]
        upper = [torch.where(r > 1, 1 + LEAK * (r - 1), r.clamp(0, 1)) for r in raw]
        together = error(_draw(lower[0]), _draw(lower[1]))
        alone = error(_draw(lower[0]), None) + error(None, _draw(lower[1]))
        penalty = sum(g.mean(0).sum() for g in upper)
        (together + alone / 2 + COEFFICIENT * penalty).backward()
        optimizer.step()

    return step


def measure(config: PeerConfig) -> list[dict[str, Any]]:
    """Time both sides in turns."""
    targets = train_targets("5-2", [0], steps=20, batch=64)
    toy, split = TOYS["5-2"], decomposition_of("5-2", targets)
    rng = np.random.default_rng(0)
    x = rng.random((config.rows, 5)) * (rng.random((config.rows, 5)) < 0.24)
    x = x.astype(np.float32)
    params = jax.tree.map(lambda a: a[0], targets.params)
    trainer = toy.preset.trainer(split, params)
    state = trainer.init(jax.random.key(0))
    taps = ft.Taps(jnp.asarray(x), None, jnp.ones(len(x)))
    update = jax.jit(trainer.update).lower(state, taps).compile()
    weight, bias = np.asarray(params["weight"]), np.asarray(params["bias"])
    runs = {
        "toyfeat": lambda: jax.block_until_ready(update(state, taps)),
        "torch": torch_step(weight, bias, x, toy.preset.components),
    }
    times = medians(runs, rounds=config.rounds)
    size = {"rows": config.rows, "components": toy.preset.components}
    return [
        row("5-2 step", size, n, step_ms=1e3 * s, cpu_ms=1e3 * cpu_seconds(runs[n]))
        for n, s in times.items()
    ]


if __name__ == "__main__":
    options = parse_command(PeerConfig, __doc__)
    finish(measure(options), [], options.json)
