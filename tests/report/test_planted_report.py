import sys
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft
from toyfeat.models import planted
from toyfeat.report.planted import describe, task_figure, write_tasks

SHORT = {"steps": 5, "batch": 8}
TINY = {
    "overcomplete": {"dim": 6, "features": 8, "most": 0.3, "least": 0.1},
    "attention_reads": {"heads": 1, "head_dim": 3, "dim": 10, "positions": 2},
    "gated_units": {"units": 3, "dim": 8, "probability": 0.3},
    "circuits": {"features": 3, "neurons": 6, "each": 2, **SHORT},
    "cross_layer": {"features": 14, "neurons": (5, 4), "each": 2, **SHORT},
    "ignored_structure": {"dim": 8, "features": 3, "manifold": 2},
    "modular_addition": {"modulus": 7, "frequencies": 2, "dim": 14},
    "product_space": {"dim": 8, "colours": 3, "shapes": 2},
    "random_network": {"dim": 4, "width": 8, "outputs": 3},
    "unrelated_labels": {"dim": 4, "features": 6},
    "quiet_and_loud": {"dim": 8, "quiet": 3, "loud": 4},
    "compressed_computation": {"features": 6, "neurons": 3, **SHORT},
    "resid_mlp": {"features": 6, "neurons": 2, "layers": 2, "embedding": 9, **SHORT},
    "squares": {"neurons": 4, **SHORT},
    "superposition": {"features": 3, "hidden": 2, "probability": 0.3, **SHORT},
    "tiled_curve": {"dim": 8, "harmonics": 3, "reads": 3},
    "world_with_head": {"features": 64, "dim": 12, "read": 12, "composed": 2},
}


CONTROLS = ("random_network", "unrelated_labels")


@cache
def task_of(name):
    return getattr(planted, name)(jax.random.key(0), **TINY[name])


def test_every_task_is_drawn_below():
    no_tasks = {"Task", "Truth", "subject_of", "recondition"}
    assert set(TINY) == set(planted.__all__) - no_tasks


@pytest.mark.slow
def test_a_description_has_the_numbers():
    task = task_of("cross_layer")
    text = describe(task, fit=0.04)
    assert text.startswith("cross-layer: 14 squares by two layers of 5 and 4 ReLUs")
    assert "14 features in 9 dimensions at the site “neurons”; the readers are" in text
    assert "The trained model leaves 4.0% of its targets' variance." in text
    assert "Rows that share a plane: none." in text
    assert text.endswith(f"Limits of what can be known: {task.limits}")
    assert f"{task.fit:.1%}" in describe(task)
    assert "leaves 0.005% of" in describe(task, fit=4.7e-5)
    assert "the writers are scored" in describe(task._replace(side="writers"))


@pytest.mark.slow
def test_a_description_says_what_is_defined_ignored_and_shared():
    text = describe(task_of("modular_addition"))
    assert "4 features in 14 dimensions at the site “acts”" in text
    assert "The model is the definition of its features." in text
    assert "Rows that share a plane: 0 and 1, 2 and 3." in text
    assert "8 of the 14 dimensions hold structure that the model reads hardly" in text
    curve = describe(task_of("tiled_curve"))
    assert "hold structure" not in curve
    assert "variance" not in curve
    task = task_of("product_space")
    truth = task.truth._replace(group=np.array([7, 7, 7, 1, 2]))
    text = describe(task._replace(truth=truth))
    assert "Rows that share a subspace: 0 and 1 and 2." in text


def test_a_description_says_that_nothing_is_planted():
    text = describe(task_of("random_network"))
    assert "Nothing is planted in the 4 dimensions of the site “acts”" in text


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", [name for name in TINY if name not in CONTROLS])
def test_a_figure_has_three_panels_that_say_what_they_are(name, key):
    pytest.importorskip("matplotlib")
    task = task_of(name)
    num, width = task.truth.readers.shape
    drawn = task_figure(key, task)
    left, middle, right, colours = drawn.axes[:4]
    assert left.get_title() == "activations"
    assert "% of the variance)" in left.get_xlabel()
    arrows, key_label, shown = [num], "strongest feature, the first of equals", ""
    if num == 1:
        key_label = "size of the feature"
    elif name in ("modular_addition", "gated_units"):
        arrows, shown = [2], f"2 of {num} "
        key_label = "angle in the plane of rows "
    elif num > 12:
        arrows, shown = [12], f"12 of {num} "
    assert len(middle.texts) == arrows[0]
    word = "the reader as an arrow" if num == 1 else "readers as arrows"
    assert middle.get_title() == f"gradients, and {shown}{word}"
    assert colours.get_ylabel().startswith(key_label)
    if num == 1:
        assert right.get_title().startswith("reader and writer, |cos| 0.")
        assert len(right.patches) == 2 * width
    else:
        assert right.get_title() == "|cos| of readers with writers"
        assert right.images[0].get_array().shape == (num, num)


@pytest.mark.slow
def test_points_are_the_gradients_and_lie_along_their_readers(key):
    pytest.importorskip("matplotlib")
    middle = task_figure(key, task_of("squares")).axes[1]
    points, tip = middle.collections[0].get_offsets().data, middle.texts[0].xy
    across = points @ [-tip[1], tip[0]] / np.linalg.norm(tip)
    along = points @ np.asarray(tip) / np.linalg.norm(tip)
    assert np.abs(across).max() < 1e-4 * np.abs(along).max()
    # One of the features alone: its points have its colour and its arrow's direction.
    small = {"dim": 6, "features": 2, "parts": 1, "manifold": 2, "probability": 0.1}
    task = planted.ignored_structure(key, **small)
    _, middle, right, colours = task_figure(key, task).axes[:4]
    scatter = middle.collections[0]
    points, values = scatter.get_offsets().data, scatter.get_array().data
    lengths = np.linalg.norm(points, axis=1)
    for row in range(2):
        tip = np.asarray(middle.texts[row].xy)
        cosines = points @ tip / np.maximum(lengths * np.linalg.norm(tip), 1e-9)
        mine = cosines[(lengths > 0) & (values == row)]
        assert np.mean(mine > 0.999) > 0.8
    assert lengths[values == 2].max() == 0  # none of them
    assert [t.get_text() for t in colours.get_yticklabels()] == ["0", "1", "none"]
    cosines = right.images[0].get_array().data
    np.testing.assert_allclose(cosines[[0, 1], [1, 0]], 0, atol=1e-6)
    lengths = [np.linalg.norm(rows, axis=1) for rows in task.truth[:2]]
    np.testing.assert_allclose(np.diag(cosines), 1 / np.prod(lengths, 0), rtol=1e-5)


@pytest.mark.slow
def test_a_page_has_every_task_and_a_picture_of_each(tmp_path, key):
    pytest.importorskip("matplotlib")
    tasks = [task_of(name) for name in ("squares", "modular_addition", "squares")]
    path = write_tasks(tmp_path / "new", tasks, key)
    assert path == tmp_path / "new" / "tasks.html"
    text = path.read_text()
    assert text.count("data:image/png") == text.count("<h2>") == 3
    assert text.count("<h2>x²</h2>") == 2
    assert "<h2>modular addition</h2>" in text
    assert "Rows that share a plane: 0 and 1, 2 and 3." in text
    assert "http" not in text
    pictures = sorted(path.parent.glob("*.png"))
    names = [picture.name for picture in pictures]
    assert names == ["01-x2.png", "02-modular-addition.png", "03-x2.png"]
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in pictures)
    with pytest.raises(ValueError, match="write_tasks: there are no tasks"):
        write_tasks(tmp_path, [], key)


def test_what_cannot_be_drawn_is_refused(key):
    pytest.importorskip("matplotlib")
    task = task_of("product_space")
    bare = task._replace(truth=task.truth._replace(writers=None))
    for refused in (lambda: describe(bare), lambda: task_figure(key, bare)):
        with pytest.raises(ValueError, match="of 'product space', got no writers"):
            refused()
    probed = ft.from_split(
        lambda p, x: jnp.stack([x, x], axis=1), lambda p, a: a.sum(1), site="acts"
    )
    with pytest.raises(ValueError, match=r"wanted a site \[B, D\], got 2400"):
        task_figure(key, task._replace(probed=probed))


def test_without_matplotlib_the_extra_is_named(monkeypatch, key):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"install toyfeat\[plot\]"):
        task_figure(key, task_of("squares"))
