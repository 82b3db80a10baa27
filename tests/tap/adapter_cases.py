"""One network with the same weights in every library, and by hand.

Two residual blocks, a layer that is called twice and a head.  The blocks are called
one by one, under a checkpoint, or scanned over stacked weights.
"""

import re
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from penzai import pz

import toyfeat as ft

B, D, H = 5, 4, 4
RNG = np.random.default_rng(11)
X = RNG.standard_normal((B, D)).astype(np.float32)


def _layer():
    kernel = RNG.normal(0.0, 0.6, (D, D)).astype(np.float32)
    return kernel, RNG.normal(0.0, 0.6, D).astype(np.float32)


UP, DOWN = [_layer(), _layer()], [_layer(), _layer()]
SHARED, HEAD = _layer(), _layer()
STYLES = ("plain", "remat", "scan")
LIBRARIES = ("linen", "nnx", "equinox", "haiku", "penzai")


class Case(NamedTuple):
    probed: Any
    params: Any
    sites: tuple[str, ...]  # in order of computation


# By hand: one example, from any of the sites on.


def apply(layer, x):
    kernel, bias = layer
    product = x @ jnp.asarray(kernel, x.dtype)
    return product + jnp.broadcast_to(jnp.asarray(bias, x.dtype), product.shape)


def block(i, x):
    return x + apply(DOWN[i], jnp.tanh(apply(UP[i], x)))


def after(site, x):
    """Outputs of the network, from the value at a site on."""
    steps = {
        "block_0": lambda x: block(0, x),
        "block_1": lambda x: block(1, x),
        "shared": lambda x: apply(SHARED, x),
        "shared#1": lambda x: apply(SHARED, jnp.tanh(x)),
        "head": lambda x: apply(HEAD, x),
    }
    names = list(steps)
    for name in names[names.index(site) + 1 :] if site else names:
        x = steps[name](x)
    return x


def _names(style, block, inner, shared, head, output="__call__"):
    """Sites in order of computation, by the patterns of a library's names."""
    index = ["@0", "@1"] if style == "scan" else ["", ""]
    parts = [part for part in (*inner, "")]
    if style == "scan":  # all layers of one value follow each other
        blocks = [block.format("") + p + i for p in parts for i in index]
    else:
        blocks = [block.format(i) + p for i in range(2) for p in parts]
    return (*blocks, shared, f"{shared}#1", head, output)


# linen


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(D, name="down")(jnp.tanh(nn.Dense(H, name="up")(x))), None


class LinenNet(nn.Module):
    style: str

    @nn.compact
    def __call__(self, x):
        kind = nn.remat(LinenBlock) if self.style == "remat" else LinenBlock
        if self.style == "scan":
            axes, rngs = {"params": 0}, {"params": True}
            scan = nn.scan(LinenBlock, variable_axes=axes, split_rngs=rngs, length=2)
            x, _ = scan(name="block")(x, None)
        else:
            for i in range(2):
                x, _ = kind(name=f"block{i}")(x)
        shared = nn.Dense(D, name="shared")
        x = shared(jnp.tanh(shared(x)))
        return nn.Dense(D, name="head")(x)


def _linen(style):
    def dense(layer):
        return {"kernel": jnp.asarray(layer[0]), "bias": jnp.asarray(layer[1])}

    blocks = [{"up": dense(UP[i]), "down": dense(DOWN[i])} for i in range(2)]
    params = {"shared": dense(SHARED), "head": dense(HEAD)}
    if style == "scan":
        params["block"] = jax.tree.map(lambda a, b: np.stack([a, b]), *blocks)
    else:
        params |= {f"block{i}": b for i, b in enumerate(blocks)}
    sites = _names(style, "block{}", ("/up", "/down"), "shared", "head")
    # A block returns a pair, whose first part is the site.
    whole = re.compile(r"^(block\d?)(@\d)?$")
    sites = tuple(whole.sub(r"\1[0]\2", site) for site in sites)
    return Case(ft.from_linen(LinenNet(style)), {"params": params}, sites)


# nnx


def _nnx_linear(layer):
    made = nnx.Linear(D, D, rngs=nnx.Rngs(0))
    made.kernel[...], made.bias[...] = layer
    return made


class NnxBlock(nnx.Module):
    def __init__(self, i):
        self.up, self.down = _nnx_linear(UP[i]), _nnx_linear(DOWN[i])

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class NnxRemat(NnxBlock):
    __call__ = nnx.remat(NnxBlock.__call__)


class NnxNet(nnx.Module):
    def __init__(self, style):
        kind = NnxRemat if style == "remat" else NnxBlock
        blocks = [kind(i) for i in range(2)]
        if style == "scan":
            graph, first = nnx.split(blocks[0])
            second = nnx.state(blocks[1])
            stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), first, second)
            self.block = nnx.merge(graph, stacked)
        else:
            self.block = nnx.List(blocks)
        self.shared, self.head = _nnx_linear(SHARED), _nnx_linear(HEAD)
        self.style = style

    def __call__(self, x):
        if self.style == "scan":
            scan = nnx.scan(
                lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
            )
            x = scan(x, self.block)
        else:
            for block in self.block:
                x = block(x)
        return self.head(self.shared(jnp.tanh(self.shared(x))))


def _nnx(style):
    name = "block" if style == "scan" else "block/{}"
    sites = _names(style, name, ("/up", "/down"), "shared", "head")
    return Case(*ft.from_nnx(NnxNet(style)), sites)


# equinox: layers take one example


def _eqx_linear(layer):
    made = eqx.nn.Linear(D, D, key=jax.random.key(0))
    leaves = jnp.asarray(layer[0].T), jnp.asarray(layer[1])
    return eqx.tree_at(lambda m: (m.weight, m.bias), made, leaves)


class EqxBlock(eqx.Module):
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, i):
        self.up, self.down = _eqx_linear(UP[i]), _eqx_linear(DOWN[i])

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class EqxNet(eqx.Module):
    block: Any
    shared: eqx.nn.Linear
    head: eqx.nn.Linear
    style: str = eqx.field(static=True)

    def __init__(self, style):
        blocks = [EqxBlock(i) for i in range(2)]
        if style == "scan":
            self.block = jax.tree.map(lambda a, b: jnp.stack([a, b]), *blocks)
        else:
            self.block = blocks
        self.shared, self.head = _eqx_linear(SHARED), _eqx_linear(HEAD)
        self.style = style

    def __call__(self, x):
        if self.style == "scan":
            arrays, static = eqx.partition(self.block, eqx.is_array)

            def step(x, layer):
                return eqx.combine(layer, static)(x), None

            x, _ = jax.lax.scan(step, x, arrays)
        else:
            for block in self.block:
                if self.style == "remat":
                    block = eqx.filter_checkpoint(block)
                x = block(x)
        return self.head(self.shared(jnp.tanh(self.shared(x))))


def _equinox(style):
    name = "block" if style == "scan" else "block/{}"
    sites = _names(style, name, ("/up", "/down"), "shared", "head")
    return Case(*ft.from_equinox(EqxNet(style)), sites)


# haiku


class HkBlock(hk.Module):
    def __call__(self, x):
        up, down = hk.Linear(H, name="up"), hk.Linear(D, name="down")
        return x + down(jnp.tanh(up(x)))


def _haiku(style):
    def network(x):
        if style == "scan":
            x = hk.experimental.layer_stack(2, name="stack")(
                lambda x: HkBlock(name="block")(x)
            )(x)
        else:
            for i in range(2):
                block = HkBlock(name=f"block{i}")
                x = hk.remat(block)(x) if style == "remat" else block(x)
        shared = hk.Linear(D, name="shared")
        x = shared(jnp.tanh(shared(x)))
        return hk.Linear(D, name="head")(x)

    def linear(layer):
        return {"w": jnp.asarray(layer[0]), "b": jnp.asarray(layer[1])}

    params = {"shared": linear(SHARED), "head": linear(HEAD)}
    transformed = hk.without_apply_rng(hk.transform(network))
    for name, layers in (("up", UP), ("down", DOWN)):
        if style == "scan":
            pair = [linear(layer) for layer in layers]
            stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), *pair)
            params[f"stack/block/{name}"] = stacked
        else:
            for i, layer in enumerate(layers):
                params[f"block{i}/{name}"] = linear(layer)
    # Modules in a stack are named without it.
    long = "block" if style == "scan" else "block{}"
    sites = _names(style, long, ("/up", "/down"), "shared", "head")
    return Case(ft.from_haiku(transformed), params, sites)


# penzai: named axes, whose order is given to the adapter


@pz.pytree_dataclass
class PzLinear(pz.nn.Layer):
    kernel: Any
    bias: Any

    def __call__(self, x, /, **_):
        apply = pz.nx.nmap(lambda kernel, bias, x: x @ kernel + bias)
        named = self.kernel.value.untag("in", "features")
        x = apply(named, self.bias.value.untag("features"), x.untag("features"))
        return x.tag("features")


@pz.pytree_dataclass
class PzBlock(pz.nn.Layer):
    up: Any
    down: Any

    def __call__(self, x, /, **_):
        return x + self.down(pz.nx.nmap(jnp.tanh)(self.up(x)))


@pz.pytree_dataclass(has_implicitly_inherited_fields=True)
class PzRemat(PzBlock):
    def __call__(self, x, /, **_):
        return jax.checkpoint(super().__call__)(x)


@pz.pytree_dataclass
class PzNet(pz.nn.Layer):
    block: Any
    shared: Any
    head: Any

    def __call__(self, x, /, **_):
        for block in self.block if isinstance(self.block, list) else [self.block]:
            x = block(x)
        return self.head(self.shared(pz.nx.nmap(jnp.tanh)(self.shared(x))))


def _pz_linear(name, layer, *axes):
    kernel = pz.nx.wrap(jnp.asarray(layer[0]), *axes, "in", "features")
    bias = pz.nx.wrap(jnp.asarray(layer[1]), *axes, "features")
    return PzLinear(
        pz.Parameter(value=kernel, label=f"{name}.kernel"),
        pz.Parameter(value=bias, label=f"{name}.bias"),
    )


def _penzai(style):
    if style == "scan":
        up, down = (
            tuple(np.stack(x) for x in zip(*both, strict=True)) for both in (UP, DOWN)
        )
        inner = PzBlock(_pz_linear("up", up, "i"), _pz_linear("down", down, "i"))
        block = pz.nn.LayerStack(inner, "i", 2)
    else:
        kind = PzRemat if style == "remat" else PzBlock
        block = [
            kind(_pz_linear(f"up{i}", UP[i]), _pz_linear(f"down{i}", DOWN[i]))
            for i in range(2)
        ]
    net = PzNet(block, _pz_linear("shared", SHARED), _pz_linear("head", HEAD))
    name = "block/stacked_sublayers" if style == "scan" else "block/{}"
    sites = _names(style, name, ("/up", "/down"), "shared", "head")
    if style == "scan":  # the stack itself is a layer
        sites = (*sites[:6], "block", *sites[6:])
    return Case(*ft.from_penzai(net, ("batch", "features")), sites)


_MAKERS = {"linen": _linen, "nnx": _nnx, "equinox": _equinox, "haiku": _haiku}
_MAKERS["penzai"] = _penzai


def make_case(library, style):
    return _MAKERS[library](style)
