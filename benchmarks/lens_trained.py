"""Trained networks whose solution is known, for lenses: modular addition and Mess3."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from lens_tasks import LensTask

import toyfeat as ft
from examples.modular import network
from examples.modular.training import train
from toyfeat.models.decoder import Decoder, llama

MODULUS = 29
LENGTH = 12
"""Tokens of a sequence of Mess3."""


def modular(num: int, *, steps: int = 1500) -> LensTask:
    """A transformer trained to add modulo 29, read before its MLP.

    The readers are the directions of the waves of both summands there, at the
    frequencies that its unembedding uses.
    """
    task = network.Modular(modulus=MODULUS, d_model=64, heads=4, d_mlp=128)
    params = train(jax.random.key(0), task, fraction=1.0, steps=steps, batch=256)
    inputs = np.asarray(network.pairs(task)[0])
    accuracy = float(network.accuracy(params, *network.pairs(task)))
    print(f"modular: accuracy {accuracy:.4f}", flush=True)

    # Streams of one position, which a lens wants.
    def run(params: Any, x: Any, tap: Any) -> Any:
        def narrow(name: str, act: Any) -> Any:
            if act.ndim == 3:
                return act
            return tap(name, act[:, None])[:, 0]

        return network.logits(params, x, narrow)

    model = ft.lenses.from_probed(
        ft.from_function(run),
        sites=["resid_mid", "mlp_out"],
        unembed=lambda p, resid: resid @ p["unembed"],
        head=lambda p: p["unembed"],
    )
    acts = jax.jit(lambda p, x: model.probed(p, x, {})[1])(params, inputs)
    order = np.random.default_rng(0).permutation(len(inputs))
    mid = np.asarray(acts["resid_mid"])[:, 0]
    readers = wave_directions(mid, inputs, np.asarray(params["unembed"]))
    return LensTask(
        model,
        params,
        inputs[order[:num]],
        inputs[order[num : 2 * num]],
        "resid_mid",
        slice(0, MODULUS),
        readers,
        clusters=8,
    )


def wave_directions(
    mid: np.ndarray, inputs: np.ndarray, unembed: np.ndarray
) -> np.ndarray:
    """Directions of the waves of the summands, at the frequencies of the answers."""
    phase = 2 * np.pi / MODULUS * np.arange(MODULUS)
    power = [
        np.linalg.norm(unembed @ np.exp(1j * k * phase)) ** 2
        for k in range(1, MODULUS // 2 + 1)
    ]
    # Frequencies with nine tenths of the power, the strongest first.
    order = np.argsort(power)[::-1]
    share = np.cumsum(np.sort(power)[::-1]) / np.sum(power)
    chosen = 1 + order[: int(np.searchsorted(share, 0.9)) + 1]
    print(f"modular: frequencies {sorted(chosen.tolist())}", flush=True)
    columns = [
        wave(k * phase[inputs[:, 0]]) + wave(k * phase[inputs[:, 1]])
        for k in chosen
        for wave in (np.cos, np.sin)
    ]
    directions = np.linalg.lstsq(np.stack(columns, 1), mid - mid.mean(0), rcond=None)[0]
    return np.linalg.qr(directions.T)[0].T


def operators(x: float = 0.15, a: float = 0.6) -> np.ndarray:
    """Joint probabilities ``[token, state, next state]`` of Mess3."""
    stay = np.full((3, 3), x) + (1 - 3 * x) * np.eye(3)
    emit = np.where(np.eye(3, dtype=bool), a, (1 - a) / 2)
    return stay[None] * emit[:, None, :]


def sequences(num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw sequences of tokens ``[num, T]``, and exact chances of the next ones."""
    rng, joint = np.random.default_rng(seed), operators()
    belief = np.full((num, 3), 1 / 3)
    tokens, chances = [], []
    for _ in range(LENGTH + 1):
        # Drawing from the filter is drawing from the process.
        chance = np.einsum("bi,tij->bt", belief, joint)
        chances.append(chance)
        token = (chance.cumsum(1) > rng.uniform(size=(num, 1))).argmax(1)
        tokens.append(token)
        belief = np.einsum("bi,bij->bj", belief, joint[token])
        belief /= belief.sum(1, keepdims=True)
    return np.stack(tokens[:LENGTH], 1), np.stack(chances[1:], 1)


def mess3(num: int, *, steps: int = 600) -> LensTask:
    """A decoder of three blocks trained on Mess3, read behind its first block.

    The truth is the logarithm of the exact chances of the next token.
    """
    config = llama(vocab=3, layers=3, dim=32, heads=2, hidden=64, context=LENGTH)
    decoder = Decoder(config)
    params = decoder.init(jax.random.key(0), np.zeros((1, 2), np.int32))
    adam = optax.adam(optax.cosine_decay_schedule(5e-3, steps))
    state = adam.init(params)

    @jax.jit
    def step(params: Any, state: Any, tokens: Any) -> Any:
        def loss(params: Any) -> Any:
            logits: Any = decoder.apply(params, tokens[:, :-1])
            chances = jax.nn.log_softmax(logits)
            return -jnp.mean(jnp.take_along_axis(chances, tokens[:, 1:, None], axis=-1))

        value, slope = jax.value_and_grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes int and float
            updates, state = adam.update(slope, state)
            return optax.apply_updates(params, updates), state, value

    for number in range(steps):
        tokens = sequences(128, 1000 + number)[0]
        params, state, loss = step(params, state, tokens.astype(np.int32))
    chances = sequences(512, 1)[1][:, :-1]
    least = -np.mean(np.sum(chances * np.log(chances), axis=-1))
    print(f"mess3: loss {float(loss):.4f}, least {least:.4f}", flush=True)
    fit, _ = sequences(num, 2)
    held_out, chances = sequences(num, 3)
    return LensTask(
        ft.lenses.from_decoder(config),
        params,
        fit.astype(np.int32),
        held_out.astype(np.int32),
        "blocks_0/resid_post",
        slice(0, 3),
        None,
        truth=np.log(chances) - np.log(chances).mean(-1, keepdims=True),
        clusters=3,
    )


TRAINED = {"sum modulo 29, trained": modular, "mess3, trained": mess3}
"""Makers of tasks."""
