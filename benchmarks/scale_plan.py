"""Plan of a run on many devices: mesh, memory, bytes on the slowest link, time, price.

    python benchmarks/scale_plan.py [--latents 16777216] [--json PATH]

Nothing runs: the step of training is compiled at its full size for virtual devices of a
CPU, and bytes, memory and operations are read from the program.  Rates and prices are
options; their defaults are of H100 GPUs with 80 GB, eight to a machine, and are
published figures or assumptions, none of them measured here.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
from collectives import read_collectives
from harness import BenchmarkConfig, finish, parse_command, row
from jax.sharding import AxisType
from split_latents import compile_step

import toyfeat as ft


@dataclass(frozen=True)
class Options(BenchmarkConfig):
    """Options of the plan."""

    meshes: tuple[tuple[int, int], ...] = ((1, 64), (1, 128), (2, 128), (1, 256))
    """Devices for the examples and for the latents."""
    dim: int = 8192
    """Width of the activations."""
    latents: int = 2**24
    """Latents of the dictionary."""
    k: int = 64
    """Codes of an example."""
    examples: int = 8192
    """Examples of a step."""
    tokens: float = 1e9
    """Examples of the run."""
    flops: float = 67e12
    """Operations per second of a device: the peak of an H100 in float32, in which the
    program multiplies."""
    tensor_flops: float = 495e12
    """The same with the TF32 products of JAX's precision ``"TF32_TF32_F32"``."""
    share: float = 0.4
    """Assumed share of a peak that is reached."""
    link: float = 50e9
    """Bytes per second of a device over the slowest link: InfiniBand of 400 Gbit/s."""
    price: float = 3.0
    """Price of a device and hour, in dollars."""


def main() -> None:
    """Print a row of the plan for every mesh."""
    options = parse_command(Options, __doc__)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(map(math.prod, options.meshes)))
    rows = [plan(options, mesh) for mesh in options.meshes]
    for line in rows:
        print(describe(line))
    finish(rows, [], options.json)


def plan(options: Options, shape: tuple[int, int]) -> dict:
    """Compile a step for a mesh and compute what the run takes."""
    devices = math.prod(shape)
    program = read_step(options, shape)
    # A ring sends every byte of a sum twice, and of what is gathered once.
    sent = 2 * program["bytes"]
    seconds = {
        name: program["operations"] / (rate * options.share) + sent / options.link
        for name, rate in (("float32", options.flops), ("TF32", options.tensor_flops))
    }
    steps = math.ceil(options.tokens / options.examples)
    hours = {name: steps * second / 3600 for name, second in seconds.items()}
    size = {
        name: getattr(options, name) for name in ("dim", "latents", "k", "examples")
    }
    return row(
        "plan",
        size | {"data": shape[0], "latents_axis": shape[1], "steps": steps},
        "compiled",
        **program,
        link_s=sent / options.link,
        step_s=seconds,
        hours=hours,
        dollars={name: x * devices * options.price for name, x in hours.items()},
    )


def read_step(options: Options, shape: tuple[int, int]) -> dict[str, float]:
    """Compile a step and read its bytes, memory and operations, per device."""
    devices = jax.devices()[: math.prod(shape)]
    axes, kinds = ("data", "latents"), (AxisType.Auto,) * 2
    mesh = jax.make_mesh(shape, axes, kinds, devices=devices)
    sae = ft.dictionaries.topk(options.dim, options.latents, options.k)
    compiled = compile_step(sae, mesh, "split", options.examples, 1.0)
    memory: Any = compiled.memory_analysis()
    costs: Any = compiled.cost_analysis()
    exchanges = read_collectives(compiled.as_text() or "")
    return {
        "bytes": sum(x.bytes for x in exchanges),
        "state": memory.argument_size_in_bytes,
        "memory": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "operations": costs["flops"],
    }


def describe(line: dict) -> str:
    """Row of the plan in docs/scale.md."""
    size = line["size"]
    cells = [
        f"{size['data']} x {size['latents_axis']}",
        f"{line['state'] / 1e9:.0f}",
        f"{line['memory'] / 1e9:.0f}",
        f"{line['bytes'] / 1e9:.2f}",
        f"{line['operations'] / 1e12:.0f}",
        *(f"{line['hours'][name]:.0f}" for name in ("float32", "TF32")),
        *(f"{line['dollars'][name]:,.0f}" for name in ("float32", "TF32")),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
