"""Bytes that a step of a split dictionary exchanges, and memory, per device.

Nothing is trained: steps are compiled for virtual devices and their programs are read.
``python benchmarks/split_latents.py`` takes two minutes and needs no accelerator.
Loops, those of a batch top-k, are counted once, as one pass over the codes.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from collectives import read_collectives
from harness import BenchmarkConfig, finish, parse_command, row
from jax.sharding import AxisType

import toyfeat as ft
from toyfeat.dictionary.shards import Split, sharding, split_axes
from toyfeat.train.placement import state_shardings

_MOST = 64


@dataclass(frozen=True)
class Options(BenchmarkConfig):
    """Options of the table."""

    latents: int = 16384
    """Latents of the dictionary."""
    meshes: tuple[tuple[int, int], ...] = ((1, 1), (1, 8), (8, 1), (8, 8))
    """Devices for the examples and for the latents."""


def main() -> None:
    """Print the table and its rows."""
    options = parse_command(Options, __doc__)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", _MOST)
    size = {"dim": 768, "latents": options.latents, "k": 32, "examples": 4096}
    meshes = options.meshes
    if options.tiny:
        size |= {"dim": 8, "k": 2, "examples": 64}
        meshes = ((1, 1), (1, 8), (8, 1))
    # Split, and last what XLA makes of a plain dictionary whose batch is split.
    cases = [("topk", mesh, "split") for mesh in meshes]
    cases += [("batch_topk", (1, 8), "split"), ("topk", (8, 1), "plain")]
    rows = [measure_step(name, mesh, method, size) for name, mesh, method in cases]
    for line in rows:
        print(describe(line))
    finish(rows, [], options.json)


def measure_step(
    name: str, shape: tuple[int, int], method: str, size: dict[str, int]
) -> dict:
    """Compile a step with and without the loss of dead latents; make a row of it."""
    devices = jax.devices()[: shape[0] * shape[1]]
    mesh = jax.make_mesh(
        shape, ("data", "latents"), (AxisType.Auto,) * 2, devices=devices
    )
    one = getattr(ft.dictionaries, name)(size["dim"], size["latents"], size["k"])
    figures = {}
    for case, weight in (("step", 0.0), ("step with dead latents", 1.0)):
        compiled = compile_step(one, mesh, method, size["examples"], weight)
        exchanges = read_collectives(compiled.as_text() or "")
        memory: Any = compiled.memory_analysis()
        figures[case] = {
            "bytes": sum(x.bytes for x in exchanges),
            "bytes_by_kind": {
                kind: sum(x.bytes for x in exchanges if x.kind == kind)
                for kind in sorted({x.kind for x in exchanges})
            },
            "largest": max((max(x.sizes) for x in exchanges), default=0),
            "memory": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        }
    sizes = size | {"data": shape[0], "latents_axis": shape[1]}
    return row(name, sizes, method, **figures)


def compile_step(
    one: ft.dictionaries.Dictionary,
    mesh: jax.sharding.Mesh,
    method: str,
    examples: int,
    weight: float,
) -> jax.stages.Compiled:
    """Compile the update of a trainer for arrays that lie on a mesh."""
    split, config = Split(mesh, "data", "latents"), one.config
    sae = ft.dictionaries.shard(one, mesh) if method == "split" else one
    trainer = ft.trainer(sae, ft.losses.default(sae, dead_latents=weight))
    plain = ft.trainer(one, ft.losses.default(one, dead_latents=weight))
    # Shapes are enough, with where they lie.
    state = jax.eval_shape(plain.init, jax.random.key(0))
    state = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        state,
        state_shardings(split, one.architecture, state),
    )
    where = sharding(split, split_axes(split, examples)[0])
    shapes: Any = (
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
        for shape in ((examples, config.d_in), (examples,))
    )
    acts, weights = shapes
    step = jax.jit(trainer.update, donate_argnums=0)
    return step.lower(state, ft.Taps(acts, None, weights)).compile()


def describe(line: dict) -> str:
    """Row of the table of docs/scale.md."""
    size, step, dead = line["size"], line["step"], line["step with dead latents"]
    cells = [
        f"`{line['case']}`, {line['method']}",
        f"{size['data']} x {size['latents_axis']}",
        *(f"{figures['bytes'] / 1e6:.2f}" for figures in (step, dead)),
        f"{dead['memory'] / 1e6:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
