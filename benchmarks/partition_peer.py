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
from harness import BenchmarkConfig, finish, medians, parse_command, row
from partition_toys import TOYS, decomposition_of, train_targets

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
    import torch

    torch.manual_seed(0)

    class LowerLeaky(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            ctx.save_for_backward(x)
            return x.clamp(0, 1)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            (x,) = ctx.saved_tensors
            grad = grads[0]
            leak = torch.where(grad < 0, LEAK * grad, torch.zeros_like(grad))
            return torch.where(
                x > 0, torch.where(x > 1, torch.zeros_like(grad), grad), leak
            )

    def parameter(*shape: int, scale: float) -> Any:
        return torch.nn.Parameter(scale * torch.randn(*shape))

    w, b, data = (torch.tensor(np.array(a)) for a in (weight, bias, x))
    features, width = w.shape
    v = parameter(features, components, scale=features**-0.5)
    u = parameter(components, width, scale=components**-0.5)
    mlps = [
        (
            parameter(components, HIDDEN, scale=math.sqrt(2)),
            torch.nn.Parameter(torch.zeros(components, HIDDEN)),
            parameter(components, HIDDEN, scale=HIDDEN**-0.5),
            torch.nn.Parameter(torch.zeros(components)),
        )
        for _ in range(2)
    ]
    optimizer = torch.optim.Adam([v, u, *(p for mlp in mlps for p in mlp)], lr=1e-3)

    def importance(inner: Any, mlp: Any) -> Any:
        hidden = torch.nn.functional.gelu(inner[..., None] * mlp[0] + mlp[1])
        return (hidden * mlp[2]).sum(-1) + mlp[3]

    def site(x: Any, matrix: Any, v: Any, u: Any, mask: Any, delta: Any) -> Any:
        return ((x @ v) * mask) @ u + delta[:, None] * (x @ (matrix - v @ u))

    def masked(masks: list[Any]) -> Any:
        hidden = data @ w if masks[0] is None else site(data, w, v, u, *masks[0])
        if masks[1] is None:
            return torch.relu(hidden @ w.T + b)
        return torch.relu(site(hidden, w.T, u.T, v.T, *masks[1]) + b)

    def draw(lower: Any) -> tuple[Any, Any]:
        return lower + (1 - lower) * torch.rand_like(lower), torch.rand(len(lower))

    hidden = data @ w
    target = torch.relu(hidden @ w.T + b)

    def step() -> None:
        optimizer.zero_grad()
        raw = [importance(data @ v, mlps[0]), importance(hidden @ u.T, mlps[1])]
        lower = [LowerLeaky.apply(r) for r in raw]
        upper = [torch.where(r > 1, 1 + LEAK * (r - 1), r.clamp(0, 1)) for r in raw]
        all_masked = masked([draw(g) for g in lower])
        first, second = masked([draw(lower[0]), None]), masked([None, draw(lower[1])])
        errors = [((y - target) ** 2).mean() for y in (all_masked, first, second)]
        penalty = sum(g.mean(0).sum() for g in upper)
        loss = errors[0] + (errors[1] + errors[2]) / 2 + COEFFICIENT * penalty
        loss.backward()
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
    return [row("5-2 step", size, n, step_ms=1e3 * s) for n, s in times.items()]


if __name__ == "__main__":
    options = parse_command(PeerConfig, __doc__)
    finish(measure(options), [], options.json)
