"""Pages on the latents of dictionaries in an image model, one on vectors and on tokens.

    python examples/latents_page.py [FOLDER [DATA]]

A small convolutional network is trained to name the bar (horizontal, vertical, either
diagonal) in noisy pictures of 12 x 12 pixels.  A dictionary is trained on its second
layer, and ``FOLDER/images.html`` shows what its latents do; ``vectors.html`` and
``tokens.html`` show dictionaries of untrained models.  Takes two minutes.  With
``DATA``, the folder of Fashion-MNIST's files (``/usr/share/datasets/fashion-mnist`` of
Debian's package ``dataset-fashion-mnist``), the network names clothes instead.
"""

import gzip
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import toyfeat as ft
from toyfeat.dictionary.latents import Latent, from_acts
from toyfeat.metrics.latents import describe_latents
from toyfeat.models.decoder import Decoder, llama
from toyfeat.report.latents import write_latents

SIZE, BARS = 12, ("horizontal", "vertical", "falling", "rising")
CLOTHES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt")
CLOTHES += ("sneaker", "bag", "ankle boot")


def draw_bars(seed: int, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw noisy pictures ``[num, 12, 12, 1]`` of one bar each, and its kind."""
    rng = np.random.default_rng(seed)
    images = rng.normal(0.0, 0.3, (num, SIZE, SIZE))
    kinds = rng.integers(0, len(BARS), num)
    steps = np.array([(0, 1), (1, 0), (1, 1), (-1, 1)])[kinds]
    starts = rng.integers(3, SIZE - 3, (num, 2))
    for offset in range(-2, 3):
        rows, columns = (starts + offset * steps).T
        images[np.arange(num), rows, columns] += 2.0
    return images[..., None].astype(np.float32), kinds.astype(np.int32)


def read_clothes(folder: Path, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Read pictures ``[num, 28, 28, 1]`` of Fashion-MNIST, and their kinds."""
    parts = []
    for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        content = gzip.decompress((folder / name).read_bytes())
        axes = content[3]  # of an idx file; sizes follow, then bytes
        shape = np.frombuffer(content, ">i4", axes, 4)
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * axes)
        parts.append(values.reshape(shape)[:num])
    images, kinds = parts
    return (images[..., None] / 255).astype(np.float32), kinds.astype(np.int32)


class Network(nn.Module):
    """Two convolutions, a maximum over the picture and a linear read-out."""

    outputs: int = len(BARS)
    stride: int = 1

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Return logits ``[B, outputs]``."""
        strides = (self.stride, self.stride)
        x = nn.relu(nn.Conv(12, (3, 3), strides, name="first")(x))
        x = nn.relu(nn.Conv(24, (3, 3), strides, name="second")(x))
        return nn.Dense(self.outputs, name="head")(x.max(axis=(1, 2)))


def train_network(
    model: Network, images: np.ndarray, kinds: np.ndarray, steps: int
) -> Any:
    """Train the network; returns its parameters."""
    optimizer = optax.adam(3e-3)
    params = model.init(jax.random.key(0), images[:1])

    def loss(params: Any, rows: Any) -> Any:
        logits: Any = model.apply(params, jnp.asarray(images)[rows])
        labels = jnp.asarray(kinds)[rows]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    def step(carry: Any, rows: Any) -> Any:
        grads = jax.grad(loss)(carry[0], rows)
        changes, state = optimizer.update(grads, carry[1])
        return (optax.apply_updates(carry[0], changes), state), None

    rows = np.random.default_rng(0).integers(0, len(images), (steps, 64))
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.asarray(rows))[0])
    return run((params, optimizer.init(params)))[0]


def train_and_describe(
    probed: Any, params: Any, inputs: Any, site: str, readout: Any, **options: Any
) -> list[Latent]:
    """Train a dictionary of the activations at a site, and describe its latents."""
    steps, names = options["steps"], options.get("names")
    taps = ft.tap(probed, params, inputs, sites=site, readout=readout)[site]
    dim = taps.acts.shape[1]
    sae = ft.dictionaries.topk(dim, 2 * dim, 3)
    trainer = ft.trainer(sae, ft.losses.default(sae), warm_up=0)
    batch = min(256, len(taps.weights))
    batches = ft.data.array_batches(taps._replace(grads=None), batch=batch, seed=0)
    state = trainer.init(jax.random.key(1), learning_rate=3e-3)
    state = ft.fit(trainer, state, batches, steps=steps, check_data=False)
    view = from_acts(sae, ft.denormalized(sae, state))
    about = {"site": site, "readout": readout, "view": view, "names": names}
    return describe_latents(probed, params, inputs, num=12, **about)


def main(
    folder: Path,
    steps: int = 800,
    say: Callable[[str], Any] = print,
    data: Path | None = None,
) -> None:
    """Train, describe and write the three pages."""
    say(f"images: {page_of_images(folder, steps, say, data)}")
    say(f"vectors: {page_of_vectors(folder, steps // 4)}")
    say(f"tokens: {page_of_tokens(folder, steps // 4)}")


def page_of_images(
    folder: Path, steps: int, say: Callable[[str], Any], data: Path | None
) -> Path:
    """Write the page of a network that names bars, or clothes if there are some."""
    model, names, what = Network(), BARS, "bars"
    images, kinds = draw_bars(0, 1024)
    if data is not None:
        model, names, what = Network(len(CLOTHES), stride=2), CLOTHES, "clothes"
        images, kinds = read_clothes(data, 4096)
    params = train_network(model, images, kinds, steps)
    network = ft.from_linen(model)
    right = np.argmax(network(params, images, {})[0], axis=1) == kinds
    say(f"{right.mean():.0%} of the pictures are named rightly")
    loss = ft.readouts.loss(
        optax.softmax_cross_entropy_with_integer_labels, jnp.asarray(kinds[:256])
    )
    latents = train_and_describe(
        network, params, images[:256], "second", loss, steps=steps, names=names
    )
    return write_latents(
        folder / "images.html",
        latents,
        images[:256],
        title=f"Latents of a network that names {what}",
        header={"site": "second", "steps": steps},
        unit="nats",
    )


def page_of_vectors(folder: Path, steps: int) -> Path:
    """Write the page of a perceptron of random weights, which takes vectors."""
    x = jax.random.normal(jax.random.key(2), (256, 10))
    mlp = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(3)])
    square = ft.readouts.scalar(lambda y: jnp.sum(y**2))
    latents = train_and_describe(
        ft.from_linen(mlp),
        mlp.init(jax.random.key(3), x),
        x,
        "layers_0",
        square,
        steps=steps,
    )
    return write_latents(folder / "vectors.html", latents, x)


def page_of_tokens(folder: Path, steps: int) -> Path:
    """Write the page of a decoder of random weights."""
    config = llama(vocab=26, layers=2, dim=16, heads=2, hidden=32)
    tokens = jax.random.randint(jax.random.key(4), (32, 24), 0, 26)
    names = [f" {chr(97 + i) * 3}" for i in range(26)]
    latents = train_and_describe(
        ft.from_linen(Decoder(config)),
        Decoder(config).init(jax.random.key(5), tokens),
        tokens,
        "blocks_0/resid_post",
        ft.readouts.next_token_loss(tokens),
        steps=steps,
        names=names,
    )
    return write_latents(
        folder / "tokens.html", latents, tokens, names=names, unit="nats"
    )


if __name__ == "__main__":
    folders = [Path(argument) for argument in sys.argv[1:3]]
    main(
        folders[0] if folders else Path("out/latents"),
        data=folders[1] if len(folders) > 1 else None,
    )
