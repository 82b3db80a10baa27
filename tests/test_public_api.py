import importlib
import inspect
import pkgutil

import pytest

import toyfeat as tf

PINNED = [
    "splice",
    "ce_recovered",
    "attribution_faithfulness",
    "Faithfulness",
    "active_features",
    "scores",
    "Scores",
    "consensus",
    "circular_planes",
    "Consensus",
    "Description",
    "Found",
    "Subject",
    "Task",
    "data",
    "fit",
    "load_tree",
    "save_tree",
    "attribution_l0",
    "attribution_objective",
    "controllers",
    "dictionary_objective",
    "objectives",
    "paired",
    "folded",
    "from_basis",
    "scales",
    "Scales",
    "population",
    "trainer",
    "check_outliers",
    "final_metrics",
    "grid",
    "pareto_front",
    "sweep_table",
    "Member",
    "Outliers",
    "ArrayBatches",
    "Controller",
    "Detection",
    "Forward",
    "Parts",
    "Term",
    "Trainer",
    "TrainState",
    "batch_topk",
    "gated",
    "gradient_topk",
    "jump_relu",
    "matryoshka",
    "standard",
    "topk",
    "Dictionary",
    "DictionaryConfig",
    "load_dictionary_learning",
    "load_saelens",
    "load_sparsify",
    "save_saelens",
    "ablation_curve",
    "edge_ablation",
    "edges_needed",
    "eigengaps",
    "interaction_edges",
    "joint_pca",
    "local_interaction_basis",
    "sketched_moments",
    "keep_memory",
    "SketchedMoments",
    "Accumulator",
    "Basis",
    "Diagnostics",
    "Match",
    "Moments",
    "Probed",
    "Products",
    "SVD",
    "SVDInfo",
    "Taps",
    "Truth",
    "check_no_mixing",
    "check_taps",
    "decode",
    "detection",
    "encode",
    "explanation",
    "from_function",
    "from_linen",
    "from_nnx",
    "from_split",
    "gradient_pca",
    "match_features",
    "moments",
    "output_preserved",
    "pca",
    "principal_angles",
    "r_squared",
    "random_coverage",
    "randomized_svd",
    "readouts",
    "site_shapes",
    "stream_svd",
    "tap",
    "uniqueness",
    "variance_explained",
]


def test_the_public_names_are_the_pinned_ones():
    assert sorted(tf.__all__) == sorted(PINNED)


FUNCTIONS = [getattr(tf, n) for n in PINNED if inspect.isfunction(getattr(tf, n))]
FUNCTIONS += [
    f
    for module in (tf.readouts, tf.controllers)
    for _, f in inspect.getmembers(module, inspect.isfunction)
    if f.__module__ == module.__name__ and not f.__name__.startswith("_")
]


@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda f: f.__name__)
def test_a_public_function_documents_its_arguments_and_result(fn):
    doc = inspect.getdoc(fn)
    assert doc
    assert ("Args:" in doc) == bool(inspect.signature(fn).parameters)
    assert "Returns:" in doc or "Raises:" in doc
    for name in inspect.signature(fn).parameters:
        assert f"{name}:" in doc, f"{fn.__name__} does not document {name}"


MODULES = [info.name for info in pkgutil.walk_packages(tf.__path__, "toyfeat.")]


@pytest.mark.parametrize("name", MODULES)
def test_every_module_and_every_public_name_in_it_has_a_docstring(name):
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    for attribute, value in vars(module).items():
        ours = getattr(value, "__module__", None) == name
        if ours and not attribute.startswith("_") and callable(value):
            assert inspect.getdoc(value), f"{name}.{attribute} has no docstring"


def test_functions_that_share_the_name_of_a_module_can_both_be_reached():
    from toyfeat.moments import moments
    from toyfeat.tap import from_linen, tap

    assert tf.tap is tap
    assert tf.moments is moments
    assert tf.from_linen is from_linen
