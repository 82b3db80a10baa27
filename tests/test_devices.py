"""The page on several devices, run on eight virtual ones and on one.

The oracle of every number is one device; what is exchanged is read from the compiled
programs.
"""

import json

import numpy as np
import pytest
from processes import ROOT, run_python

PAGE = ROOT / "docs" / "scale.md"

# Runs the blocks of the page, then lowers what they ran; prints one line of JSON.
_CHILD = """
import json, re, sys
import jax, numpy as np
names = {}
for block in open(sys.argv[1]).read().split("```python\\n")[1:]:
    exec(compile(block.split("```")[0], "scale.md", "exec"), names)
ft, trainer, population = names["ft"], names["trainer"], names["population"]

def exchanged(function, *arguments):
    \"\"\"Kinds of communication in the compiled program, and its largest array.\"\"\"
    text = function.lower(*arguments).compile().as_text()
    kind = re.compile(r" (all-[a-z]+|collective-[a-z]+|reduce-scatter)(-start)?\\(")
    lines = [line.split(" = ")[1] for line in text.splitlines() if kind.search(line)]
    shapes = [re.findall(r"f32\\[([0-9,]*)\\]", kind.split(x)[0]) for x in lines]
    sizes = [np.prod([int(n) for n in shape.split(",") if n])
             for part in shapes for shape in part]
    kinds = sorted({kind.search(" " + line)[1] for line in lines})
    return {"count": len(lines), "kinds": kinds, "largest": int(max(sizes, default=0))}

keys = jax.random.split(jax.random.key(4), 16)
rates = jax.numpy.geomspace(1e-4, 1e-2, 16)
members = population.init(keys, learning_rate=rates)
alone = ft.fit(population, members, names["same_for_all"], steps=20)
report = {
    "devices": jax.device_count(),
    "spectrum": names["basis"].spectrum.tolist(),
    "W_dec": np.asarray(names["trained"].params["W_dec"]).tolist(),
    "by latent": np.asarray(names["by_latent"].params["W_dec"]).tolist(),
    "population": np.asarray(alone.params["W_dec"]).tolist(),
}
if jax.device_count() == 8:
    report["split population"] = np.asarray(names["end"].params["W_dec"]).tolist()
    report["of a batch"] = exchanged(
        names["add_batch"], names["state"], names["params"], names["x"])
print(json.dumps(report))
"""


def run_page(devices):
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = run_python("-c", _CHILD, PAGE, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def reports():
    return run_page(8), run_page(1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spectrum", "W_dec", "by latent", "population"])
def test_eight_devices_give_the_numbers_of_one(name, reports):
    eight, one = reports
    assert (eight["devices"], one["devices"]) == (8, 1)
    np.testing.assert_allclose(eight[name], one[name], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_split_dictionary_is_the_same_as_a_whole_one(reports):
    eight, one = reports
    np.testing.assert_allclose(eight["by latent"], one["W_dec"], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_split_population_is_the_same_as_a_whole_one(reports):
    eight, _ = reports
    np.testing.assert_allclose(
        eight["split population"], eight["population"], rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow
def test_statistics_exchange_sums_only(reports):
    batch = reports[0]["of a batch"]
    assert batch["kinds"] == ["all-reduce"]
    assert batch["count"] <= 4
    assert 256 <= batch["largest"] <= 2 * 16 * 16  # second moments of 16 dimensions
