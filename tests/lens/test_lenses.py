"""The family of lenses: what they read, their vectors, and their files."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_lens_model import hand_written_model, hand_written_params, norm

from toyfeat import lens as lenses
from toyfeat.files.torch_writing import save_dict
from toyfeat.lens.averages import Estimate

DIM, VOCAB = 5, 11
SITES = ("block_0", "block_1")


def estimate(matrices, prompts=7):
    zeros = {site: jnp.zeros(()) for site in matrices}
    return Estimate(
        matrices={site: jnp.asarray(x) for site, x in matrices.items()},
        standard_error=zeros,
        relative_error=zeros,
        refit_cosine=zeros,
        prompts=np.int32(prompts),
    )


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def params():
    return hand_written_params(np.float32)


@functools.cache
def fitted():
    return estimate({site: draw(DIM, DIM, seed=i) for i, site in enumerate(SITES)})


@functools.cache
def lens():
    about = {"model": "hand-written", "revision": "1"}
    return lenses.jacobian_lens(hand_written_model(), params(), fitted(), about=about)


def test_a_lens_reads_by_the_norm_and_unembedding_of_the_model():
    acts = draw(2, 3, DIM, seed=5)
    moved = acts @ fitted().matrices["block_1"].T
    np.testing.assert_allclose(lens().transport("block_1", acts), moved, rtol=1e-5)
    logits = norm(moved) @ params()["head"]
    np.testing.assert_allclose(lens().read("block_1", acts), logits, rtol=1e-4)
    # The final stream is read as it is, by every lens.
    np.testing.assert_allclose(
        lens().read("block_2", acts[0]), norm(acts[0]) @ params()["head"], rtol=1e-5
    )


def test_the_logit_lens_is_the_lens_of_identities():
    acts = draw(3, DIM)
    plain = lenses.logit_lens(hand_written_model(), params())
    for site in (*SITES, "block_2"):
        np.testing.assert_allclose(
            plain.read(site, acts), norm(acts) @ params()["head"], rtol=1e-5
        )


def test_vectors_are_of_the_raw_unembedding_and_centred():
    """``J^T W_U[:, t]`` with the matrix as it is stored, no scale of a norm in it."""
    head = params()["head"]
    raw = lens().vectors([3, 0], centred=False)
    centred = lens().vectors([3, 0])
    for site in SITES:
        matrix = fitted().matrices[site]
        np.testing.assert_allclose(raw[site], head[:, [3, 0]].T @ matrix, rtol=1e-4)
        every = lens().vectors(range(VOCAB), centred=False)[site]
        mean = np.mean(every, axis=0)
        np.testing.assert_allclose(centred[site], raw[site] - mean[None], atol=1e-5)


def test_the_root_of_a_second_moment_has_its_leading_directions():
    jacobian = draw(DIM, DIM)
    moment = jacobian.T @ jacobian
    _, s, vt = np.linalg.svd(jacobian)
    for rank in (None, 2):
        root = lenses.second_moment_lens(
            hand_written_model(), params(), estimate({"block_0": moment}), rank=rank
        ).maps["block_0"]
        wanted = (vt[:rank].T * s[:rank]) @ vt[:rank]
        np.testing.assert_allclose(root.matrices[0], wanted, atol=1e-4)


def test_experts_read_the_streams_that_are_nearest_to_their_centre():
    experts = {site: draw(2, DIM, DIM, seed=i) for i, site in enumerate(SITES)}
    centres = {site: np.stack([np.ones(DIM), -np.ones(DIM)]) for site in SITES}
    clustered = lenses.clustered_lens(
        hand_written_model(), params(), estimate(experts), centres
    )
    acts = draw(6, DIM)
    chosen = np.where(acts.sum(1) > 0, 0, 1)
    assert len(set(chosen)) == 2
    wanted = np.einsum("nij,nj->ni", experts["block_0"][chosen], acts)
    np.testing.assert_allclose(
        clustered.transport("block_0", acts), wanted, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match=r"one matrix per site.*contrast_lens"):
        clustered.vectors([0])


def test_a_contrast_keeps_what_cancels_in_the_mean():
    shared, own = np.eye(DIM, dtype=np.float32), draw(DIM, DIM)
    experts = {site: np.stack([shared + own, shared - own]) for site in SITES}
    shares = {site: jnp.array([0.5, 0.5]) for site in SITES}
    contrast = lenses.contrast_lens(
        hand_written_model(), params(), estimate(experts), shares
    )
    matrix = contrast.maps["block_0"].matrices[0]
    np.testing.assert_allclose(np.abs(matrix), np.abs(own), atol=1e-5)
    assert contrast.vectors([1])["block_0"].shape == (1, DIM)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_lens_is_saved_and_loaded(suffix, tmp_path):
    path = tmp_path / "folder" / f"lens.{suffix}"
    lens().save(path)
    again = lenses.load(path, hand_written_model(), params())
    assert again.kind == "jacobian"
    assert again.about == {
        "model": "hand-written",
        "revision": "1",
        "prompts": 7,
        "estimator": "mean Jacobian",
    }
    half = np.float16 if suffix == "pt" else np.float32
    for site in SITES:
        np.testing.assert_array_equal(
            again.maps[site].matrices[0], np.asarray(fitted().matrices[site], half)
        )
    assert list(path.parent.iterdir()) == [path]
    expected = {"model": "hand-written"}
    lenses.load(path, hand_written_model(), params(), expected=expected)
    match = r"with model 'gpt2', got 'hand-written'; it is the lens of another model"
    with pytest.raises(ValueError, match=match):
        lenses.load(path, hand_written_model(), params(), expected={"model": "gpt2"})


def test_experts_with_centres_are_saved_and_loaded(tmp_path):
    experts = {site: draw(2, DIM, DIM, seed=i) for i, site in enumerate(SITES)}
    centres = {site: draw(2, DIM, seed=9) for site in SITES}
    clustered = lenses.clustered_lens(
        hand_written_model(), params(), estimate(experts), centres
    )
    clustered.save(tmp_path / "a.safetensors")
    again = lenses.load(tmp_path / "a.safetensors", hand_written_model(), params())
    assert jax.tree.all(
        jax.tree.map(lambda a, b: (a == b).all(), again.maps, clustered.maps)
    )
    with pytest.raises(ValueError, match=r"a \.pt file holds a Jacobian.*safetensors"):
        clustered.save(tmp_path / "a.pt")
    assert not (tmp_path / "a.pt").exists()


def test_a_published_file_is_read(tmp_path):
    state = {
        "J": {0: draw(DIM, DIM).astype(np.float16)},
        "n_prompts": 100,
        "source_layers": [0],
        "d_model": DIM,
    }
    save_dict(tmp_path / "published.pt", state, "test")
    published = lenses.load(tmp_path / "published.pt", hand_written_model(), params())
    assert list(published.maps) == ["block_0"]
    assert published.about == {"prompts": 100}


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ({"J": {0: draw(4, 4)}}, r"a lens of width 5.*lens of another model"),
        ({"J": {2: draw(5, 5)}}, r"layers of 0 \.\. 1, got .*lens of another model"),
        ({"J": {"0": draw(5, 5)}}, r"layers of 0 \.\. 1"),
        ({"J": draw(5, 5)}, r"must hold \{'J': \{layer: matrix\}\}"),
        ({"J": {}}, r"must hold \{'J'"),
        ({"J": {0: draw(5, 5)}, "K": draw(2)}, r"must hold \{'J'"),
        ({"J": {0: draw(5)}}, "a lens of width 5"),
        ({"J": {0: np.full((5, 5), np.nan)}}, "must be finite, got nan"),
        ({"J": {0: np.ones((5, 5), int)}}, "floating-point numbers, got int64"),
    ],
)
def test_published_files_of_something_else_are_refused(state, match, tmp_path):
    save_dict(tmp_path / "other.pt", state, "test")
    with pytest.raises(ValueError, match=f"lenses.load: .*{match}"):
        lenses.load(tmp_path / "other.pt", hand_written_model(), params())


META = {"format": "toyfeat lens 1", "kind": "jacobian", "about": "{}"}


@pytest.mark.parametrize(
    ("tensors", "metadata", "match"),
    [
        ({"block_0/matrices": draw(1, 5, 5)}, None, "must be a 'toyfeat lens 1'"),
        ({"block_0/matrices": draw(1, 5, 5)}, {"about": "["}, "must be a 'toyfeat"),
        ({"block_0/matrices": draw(1, 5, 5)}, {"kind": "other"}, "kind 'other'"),
        ({"block_9/matrices": draw(1, 5, 5)}, {}, r"sites \['block_9'\]"),
        ({"block_0/matrices": draw(1, 4, 4)}, {}, "a lens of width 5"),
        ({"block_0/matrices": draw(2, 5, 5)}, {}, "a lens of width 5"),
        ({"block_0/matrices": draw(5, 5)}, {}, "a lens of width 5"),
        ({"block_0/centres": draw(1, 5)}, {}, "a lens of width 5"),
        ({"block_0/other": draw(1, 5)}, {}, "a lens of width 5"),
    ],
)
def test_safetensors_of_something_else_are_refused(tensors, metadata, match, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file(tensors, path, metadata=None if metadata is None else META | metadata)
    with pytest.raises(ValueError, match=f"lenses.load: .*{match}"):
        lenses.load(path, hand_written_model(), params())


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_files_are_refused(suffix, share, tmp_path):
    path = tmp_path / f"lens.{suffix}"
    lens().save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"lenses.load: .*lens\."):
        lenses.load(path, hand_written_model(), params())


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_damaged_files_are_read_or_refused_and_nothing_else(suffix, tmp_path):
    path = tmp_path / f"lens.{suffix}"
    lens().save(path)
    content, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for position in rng.integers(0, len(content), rng.integers(1, 4)):
            damaged[position] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            again = lenses.load(path, hand_written_model(), params())
        except ValueError as error:
            refused += len(str(error)) < 2000
        else:
            assert set(again.maps) <= set(SITES)
    assert 30 < refused < 300


def test_nothing_half_written_is_left(tmp_path):
    path = tmp_path / "lens.pt"
    lens().save(path)
    before = path.read_bytes()
    large = lenses.jacobian_lens(
        hand_written_model(), params(), estimate({"block_0": 1e5 * np.eye(DIM)})
    )
    with pytest.raises(ValueError, match=r"up to 65504, got larger.* at layer 0"):
        large.save(path)
    odd = lenses.jacobian_lens(
        hand_written_model(), params(), fitted(), about={"model": {1, 2}}
    )
    with pytest.raises(TypeError, match=r"lens.save: .* got set"):
        odd.save(path)
    with pytest.raises(ValueError, match="about must hold JSON values"):
        odd.save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="a lens is a file"):
        lens().save(tmp_path / "a.npz")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_lenses_of_other_models_are_refused(tmp_path):
    model = hand_written_model()
    with pytest.raises(ValueError, match=r"lens of another model"):
        lenses.jacobian_lens(model, params(), estimate({"blocks_0": np.eye(DIM)}))
    with pytest.raises(ValueError, match="square and of one width"):
        lenses.jacobian_lens(model, params(), estimate({"block_0": draw(DIM, 4)}))
    with pytest.raises(ValueError, match="of one prompt or more, got none"):
        lenses.jacobian_lens(model, params(), estimate({}, prompts=0))
    broken = np.full((DIM, DIM), np.nan, np.float32)
    with pytest.raises(
        ValueError, match=r"must be finite, got NaN or inf at 'block_0'"
    ):
        lenses.jacobian_lens(model, params(), estimate({"block_0": broken}))
    with pytest.raises(TypeError, match="estimate must be a Estimate, got dict"):
        lenses.jacobian_lens(model, params(), {"block_0": np.eye(DIM)})
    with pytest.raises(ValueError, match=r"one matrix per site.*clustered_lens"):
        lenses.jacobian_lens(model, params(), estimate({"block_0": draw(2, 5, 5)}))
    with pytest.raises(ValueError, match=r"of the experts .*got"):
        lenses.clustered_lens(model, params(), fitted(), {"block_0": draw(2, 5)})
    for acts in (draw(3, 4), np.float32(1)):
        with pytest.raises(ValueError, match=r"streams of width 5.*another model\?"):
            lens().read("block_0", acts)
    with pytest.raises(ValueError, match=r"has maps at .*got 'block_7'"):
        lens().read("block_7", draw(3, DIM))
    for tokens in ([VOCAB], [-1], [[1]]):
        with pytest.raises(ValueError, match=r"tokens must be ids in 0 \.\. 10, got"):
            lens().vectors(tokens)
    headless = model._replace(head=None)
    with pytest.raises(ValueError, match="give from_probed a head"):
        lenses.logit_lens(headless, params())
    with pytest.raises(ValueError, match="give from_probed a head"):
        lenses.jacobian_lens(headless, params(), fitted()).vectors([0])
    with pytest.raises(FileNotFoundError, match=r"there is no .*a\.pt"):
        lenses.load(tmp_path / "a.pt", model, params())
