"""Every example that is a walk-through runs, and shows what it says."""

import runpy
from pathlib import Path

import jax
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name):
    """Run an example as its reader does, with JAX's own rules of promotion."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_each_has_a_check():
    wanted = set(CHECKS)
    there = {
        path.stem for path in EXAMPLES.glob("*.py") if "\n# %%" in path.read_text()
    }
    assert there == wanted


def gradient_direction_keeps_the_output(names):
    kept = names["kept"]
    assert kept["gradient PCA"] > 0.95
    assert kept["PCA"] < 0.5


def few_dimensions_are_read(names):
    assert names["value"] < 0.1
    share = {key: values / values.sum() for key, values in names["spectra"].items()}
    assert share["activations"][:2].sum() > 0.99
    assert share["gradients"][2] > 0.01


def head_is_found(names):
    assert names["cosine"] > 0.9
    assert names["basis"].readers.shape == (8, 2)


def front_is_one(names):
    front = [member.figures for member in names["front"]]
    assert len(front) >= 3
    assert sorted(front, key=lambda f: f["l0"]) == front
    assert sorted(front, key=lambda f: -f["fvu"]) == front


def attributions_predict_effects(names):
    assert names["score"].correlation > 0.95
    assert names["score"].pairs == 1200


def lens_reads_the_last_stream(names):
    for values in names["agree"].values():
        assert values[-1] == 1
    jacobian, logit = (sum(names["agree"][name]) for name in ("Jacobian", "logit"))
    assert jacobian > logit


def parts_are_found(names):
    assert max(names["scores"]) > 0.999


def consensus_finds_the_readers(names):
    assert names["coverage"]["consensus"] > 0.99
    assert names["coverage"]["greedy gradients"] < 0.9


CHECKS = {
    "linen_model": gradient_direction_keeps_the_output,
    "nnx_model": few_dimensions_are_read,
    "equinox_model": head_is_found,
    "pareto_sweep": front_is_one,
    "saelens_faithfulness": attributions_predict_effects,
    "jacobian_lens": lens_reads_the_last_stream,
    "partition_weights": parts_are_found,
    "own_method": consensus_finds_the_readers,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_example(name, capsys):
    CHECKS[name](run(name))
    assert capsys.readouterr().out
