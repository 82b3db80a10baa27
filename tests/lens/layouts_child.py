"""Child of test_layouts.py: layouts on eight devices, and what each raises."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tiny_lens_model as tiny
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import toyfeat as ft
from toyfeat.meshes import place


def main():
    """Print a line for each attempt, and whether numbers are the same."""

    def mesh_of(num, kind=AxisType.Auto):
        devices = jax.devices()[:num]
        return jax.make_mesh((num,), ("data",), axis_types=(kind,), devices=devices)

    eight, four, explicit = mesh_of(8), mesh_of(4), mesh_of(8, AxisType.Explicit)
    model = nn.Sequential([nn.Dense(6), nn.relu, nn.Dense(8)])
    x = np.asarray(jax.random.normal(jax.random.key(0), (16, 4)))
    params = model.init(jax.random.key(1), x[:1])
    probed, squares = ft.from_linen(model), ft.readouts.half_squared_norm()

    def tap(params, x):
        return ft.tap(probed, params, x, sites="layers_0", readout=squares)["layers_0"]

    def lens(params, *batches):
        family = ft.lenses.mean_jacobian(tiny.model(), 8, **tiny.SKIP)
        batches = [(place(tiny.windows(8), mesh, P("data")), None) for mesh in batches]
        ft.lenses.fit(tiny.model(), family, params, batches)

    def tuned(params, mesh):
        batches = [(place(tiny.windows(8), mesh, P("data")), None)]
        ft.lenses.tuned_lens(tiny.model(), params, batches, steps=1)

    sae = ft.dictionaries.topk(4, 16, 3)

    def fit(sae, mesh, batch):
        trainer = ft.trainer(sae, ft.losses.default(sae))
        state = trainer.init(jax.random.key(0))
        state = state if mesh is None else place(state, mesh, P())

        def batches(step):
            return ft.Taps(place(x, batch, P("data")), None, jnp.ones(16))

        return ft.fit(trainer, state, batches, steps=2, progress=False)

    attempts = {
        "tap": lambda: tap(place(params, four, P()), place(x, eight, P("data"))),
        "explicit": lambda: tap(place(params, explicit, P()), place(x, explicit, P())),
        "lens": lambda: lens(place(tiny.weights(), four, P()), eight),
        "batches": lambda: lens(tiny.weights(), eight, four),
        "tuned": lambda: tuned(place(tiny.weights(), four, P()), eight),
        "fit": lambda: fit(sae, four, eight),
        "split": lambda: fit(
            ft.dictionaries.shard(sae, eight, latents=None), None, four
        ),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
            print(name, "passed")
        except ValueError as error:
            print(name, error)

    # Layouts that can be give the numbers of one device.
    split = {"kernel": P(None, "data"), "bias": P("data")}
    placed = place(params, eight, {"params": {"layers_0": P(), "layers_2": split}})
    assert placed["params"]["layers_2"]["kernel"].sharding.shard_shape((6, 8)) == (6, 1)
    wanted, found = tap(params, x), tap(placed, place(x, eight, P("data")))
    np.testing.assert_allclose(found.grads, wanted.grads, rtol=1e-5, atol=1e-5)
    key = place(jax.random.key(3), eight, P())
    assert jax.random.key_data(key).tolist() == [0, 3]
    one = fit(sae, None, mesh_of(1)).params["W_dec"]
    many = fit(sae, eight, eight).params["W_dec"]
    np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-5)
    print("numbers are the same")


if __name__ == "__main__":
    main()
