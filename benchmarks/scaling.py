"""Bytes that a step exchanges, and memory, per device, on 1, 8, 64 and 512 devices.

    python benchmarks/scaling.py [--json PATH]

Examples per device stay the same, so that tokens grow with the devices (weak scaling).
Nothing runs: steps are compiled for virtual devices of a CPU and their programs are
read, which takes a minute or two.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from collectives import read_collectives
from harness import BenchmarkConfig, finish, parse_command, row
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from split_latents import compile_step

import toyfeat as ft
from toyfeat.models.decoder import Decoder, llama
from toyfeat.partition import importance, losses

DEVICES = (1, 8, 64, 512)
EXAMPLES = 512  # of a device
WIDTH, LATENTS, K = 768, 16384, 32
PROMPTS, TOKENS = 2, 32  # of a device, and of a prompt
COLUMNS = 8  # devices for the latents, where they are split

Compile = Callable[[Mesh], jax.stages.Compiled]


@dataclass(frozen=True)
class Options(BenchmarkConfig):
    """Options of the table."""

    devices: tuple[int, ...] = DEVICES
    """Numbers of devices."""


def main() -> None:
    """Compile every step for every number of devices."""
    options = parse_command(Options, __doc__)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(options.devices))
    rows = []
    for name, compile_for in CASES.items():
        for devices in options.devices:
            rows.append(measure(name, compile_for, devices))
        print(describe(rows[-len(options.devices) :]), flush=True)
    finish(rows, [], options.json)


def measure(name: str, compile_for: Compile, devices: int) -> dict:
    """Compile a step for a mesh of devices and read what it exchanges."""
    shape = (devices, 1)
    if name == "latents" and devices > 1:
        shape = devices // COLUMNS, COLUMNS
    axes, kinds = ("data", "latents"), (AxisType.Auto,) * 2
    mesh = jax.make_mesh(shape, axes, kinds, devices=jax.devices()[:devices])
    compiled = compile_for(mesh)
    exchanges = read_collectives(compiled.as_text() or "")
    memory: Any = compiled.memory_analysis()
    size = {"devices": devices, "data": shape[0], "latents_axis": shape[1]}
    return row(
        name,
        size,
        "compiled",
        bytes=sum(x.bytes for x in exchanges),
        largest=max((max(x.sizes) for x in exchanges), default=0),
        memory=memory.argument_size_in_bytes + memory.temp_size_in_bytes,
    )


def describe(rows: list[dict]) -> str:
    """Row of the table of docs/scale.md, of one step on all numbers of devices."""
    cells = [NAMES[rows[0]["case"]]]
    cells += [f"{line['bytes'] / 1e6:.2f}" for line in rows]
    cells += [f"{rows[0]['memory'] / 1e6:.0f}", f"{rows[-1]['memory'] / 1e6:.0f}"]
    return f"| {' | '.join(cells)} |"


def rows_of(mesh: Mesh, *shape: int, dtype: Any = jnp.float32) -> Any:
    """Shape whose first axis is split over ``data``, times its devices."""
    where = NamedSharding(mesh, PartitionSpec("data"))
    num = shape[0] * mesh.shape["data"]
    return jax.ShapeDtypeStruct((num, *shape[1:]), dtype, sharding=where)


def whole(mesh: Mesh, tree: Any) -> Any:
    """Shapes that are on every device."""
    where = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree
    )


def compile_statistics(mesh: Mesh) -> jax.stages.Compiled:
    """Compile taps and moments of a site of a network."""
    model = nn.Sequential([nn.Dense(WIDTH), nn.relu, nn.Dense(10)])
    x = rows_of(mesh, EXAMPLES, WIDTH)
    params = whole(mesh, jax.eval_shape(model.init, jax.random.key(0), x))
    probed, accumulator = ft.from_linen(model), ft.moments(WIDTH)
    readout = ft.readouts.half_squared_norm()

    def step(state: Any, params: Any, x: Any) -> Any:
        taps = ft.tap(probed, params, x, sites="layers_0", readout=readout)
        return accumulator.update(state, taps["layers_0"])

    state = whole(mesh, jax.eval_shape(accumulator.init))
    return jax.jit(step).lower(state, params, x).compile()


def compile_lens(mesh: Mesh) -> jax.stages.Compiled:
    """Compile the exact mean Jacobians of some prompts."""
    config = llama(vocab=64, layers=2, dim=64, heads=2, kv_heads=1, hidden=96)
    tokens = rows_of(mesh, PROMPTS, TOKENS, dtype=jnp.int32)
    params = whole(
        mesh, jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)
    )
    accumulator = ft.lenses.mean_jacobian(ft.lenses.from_decoder(config), config.dim)
    state = whole(mesh, jax.eval_shape(accumulator.init))
    return jax.jit(accumulator.update).lower(state, params, tokens).compile()


def compile_parts(mesh: Mesh) -> jax.stages.Compiled:
    """Compile a step of parameter decomposition."""
    params = {"w": jnp.ones((64, 16))}
    split = ft.partition.decompose_weights(
        lambda p, x: jax.nn.relu(x @ p["w"] @ p["w"].T), params, "w", 64, jnp.eye(64)
    )
    objective = (losses.importance(1e-2), losses.stochastic(), losses.layerwise())
    family = importance.per_component(split, 8)
    trainer = ft.partition.trainer(split, params, objective, family, steps=100)
    state = whole(mesh, jax.eval_shape(trainer.init, jax.random.key(0)))
    taps = ft.Taps(rows_of(mesh, EXAMPLES, 64), None, rows_of(mesh, EXAMPLES))
    return jax.jit(trainer.update).lower(state, taps).compile()


def compile_dictionary(mesh: Mesh) -> jax.stages.Compiled:
    """Compile a step of a TopK dictionary that knows the mesh."""
    sae = ft.dictionaries.topk(WIDTH, LATENTS, K)
    examples = EXAMPLES * mesh.shape["data"]
    return compile_step(sae, mesh, "split", examples, 1.0)


CASES: dict[str, Compile] = {
    "statistics": compile_statistics,
    "lens": compile_lens,
    "parts of weights": compile_parts,
    "examples": compile_dictionary,
    "latents": compile_dictionary,
}
NAMES = {
    "statistics": f"taps and moments, {WIDTH} dimensions",
    "lens": "lens, 64 dimensions, 1 site",
    "parts of weights": "parts of a 64 x 16 weight",
    "examples": f"TopK, {WIDTH} to {LATENTS}, examples split",
    "latents": f"the same, latents over {COLUMNS}",
}

if __name__ == "__main__":
    main()
