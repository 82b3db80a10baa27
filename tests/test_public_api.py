"""The public face: its names, and what their documentation has to say."""

import importlib
import inspect
import pkgutil
import types

import pytest

import toyfeat as ft

CONTRACTS = """
    Taps Probed Accumulator Moments Basis Dictionary Trainer TrainState Subject Features
"""
CONTRACTS = CONTRACTS.split()
FUNCTIONS = """
    from_function from_split from_linen from_nnx from_equinox from_haiku
    from_penzai
    tap site_shapes check_taps
    check_no_mixing moments moments_of pca gradient_pca joint_pca
    local_interaction_basis encode decode describe consensus trainer population fit
    denormalized save_tree load_tree
"""
FUNCTIONS = FUNCTIONS.split()
NAMESPACES = {
    "readouts": "scalar loss next_token_loss sampled_labels random_directions "
    "directions jacobian logit_difference along_path half_squared_norm Readout",
    "dictionaries": "standard topk batch_topk jump_relu gated matryoshka "
    "gradient_topk paired from_basis shard Config Output",
    "losses": "reconstruction sparsity quadratic_l0 gate dead_latents "
    "attribution_sparsity unexplained gradient_reconstruction default attribution "
    "Term Inputs",
    "controllers": "target_l0 target_attribution_l0 target_fvu target_error Controller",
    "metrics": "match_features random_coverage feature_uniqueness "
    "latent_classification principal_angles r_squared variance_explained "
    "output_preserved ablation_curve edge_ablation edges_needed splice ce_recovered "
    "attribution_l0 attribution_faithfulness score_task mean_active_features "
    "outlier_dims Match Classification Faithfulness TaskScores OutlierDims "
    "mean_max_cosine identity_ci_error dense_ci_error component_l0 alive_components "
    "adversarial_error PartCosines",
    "lenses": "from_decoder from_probed check_model mean_jacobian second_moment "
    "sketched_jacobian shrunken cluster_centres fit jacobian_lens second_moment_lens "
    "clustered_lens contrast_lens tuned_lens logit_lens load steer ablate swap "
    "random_control LensModel Lens LensMap Estimate FitProgress",
    "linalg": "randomized_svd stream_svd LinearMap SVD SVDInfo",
    "data": "array_batches store_batches open_store store_writer verify_store "
    "store_size Batches",
    "partition": "decompose_weights trainer importances cosine sparse_batches spd_2025 "
    "vpd_2026 persistent_pgd reconstructions attributions gradient_batch lower_leaky "
    "upper_leaky Decomposition Site Preset",
    "planted": "subject_of Task Truth product_space circuits superposition",
    "sweeps": "grid table final_metrics pareto_front Row",
    "interop": "load_saelens save_saelens load_sparsify load_dictionary_learning "
    "load_dictionary hook_name site_name",
}


def test_the_face_has_49_names_of_which_12_are_namespaces():
    assert sorted(ft.__all__) == sorted([*CONTRACTS, *FUNCTIONS, *NAMESPACES])
    assert len(ft.__all__) == 49
    for name in ft.__all__:
        is_module = isinstance(getattr(ft, name), types.ModuleType)
        assert is_module == (name in NAMESPACES), name


@pytest.mark.parametrize("space", NAMESPACES)
def test_a_namespace_has_the_names_that_are_pinned(space):
    module = getattr(ft, space)
    missing = [name for name in NAMESPACES[space].split() if not hasattr(module, name)]
    assert not missing


PUBLIC = [getattr(ft, name) for name in FUNCTIONS]
PUBLIC += [
    value
    for space, names in NAMESPACES.items()
    for value in (getattr(getattr(ft, space), name, None) for name in names.split())
    if inspect.isfunction(value)
]


@pytest.mark.parametrize("fn", PUBLIC, ids=lambda f: f.__name__)
def test_a_public_function_documents_its_arguments_and_result(fn):
    doc = inspect.getdoc(fn)
    assert doc
    assert ("Args:" in doc) == bool(inspect.signature(fn).parameters)
    assert "Returns:" in doc or "Raises:" in doc
    for name in inspect.signature(fn).parameters:
        assert f"{name}:" in doc, f"{fn.__name__} does not document {name}"


MODULES = [info.name for info in pkgutil.walk_packages(ft.__path__, "toyfeat.")]
RIDDLES = {"Of", "What", "Whether", "How", "Which", "Where", "That", "As", "Why"}


@pytest.mark.parametrize("name", MODULES)
def test_every_module_and_every_public_name_in_it_has_a_docstring(name):
    module = importlib.import_module(name)
    documented = {name: module}
    documented |= {
        f"{name}.{attribute}": value
        for attribute, value in vars(module).items()
        if getattr(value, "__module__", None) == name
        and not attribute.startswith("_")
        and callable(value)
    }
    for where, value in documented.items():
        doc = inspect.getdoc(value)
        assert doc, f"{where} has no docstring"
        first = doc.split()[0]
        assert first not in RIDDLES, f"{where} opens with {first!r}: use a verb or noun"


def test_functions_that_share_the_name_of_a_module_can_both_be_reached():
    from toyfeat.moments import moments
    from toyfeat.tap import from_linen, tap

    assert ft.tap is tap
    assert ft.moments is moments
    assert ft.from_linen is from_linen
