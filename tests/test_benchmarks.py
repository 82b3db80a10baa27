import functools
import importlib
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import run_in_turn, run_python

from toyfeat.types import Features

ROOT = Path(__file__).parents[1]


LIMITS = {"tap.py": 1e-5, "controllers.py": 1.0}  # of errors; others 1e-2


def run_leaderboard(folder, *arguments):
    command = "benchmarks/leaderboard.py", "--tiny", "--out", folder
    done = run_python(*command, *arguments)
    assert done.returncode == 0, done.stderr
    shown = json.loads((folder / "leaderboard.json").read_text())["rows"]
    return done.stdout, shown


@pytest.mark.slow
def test_the_leaderboard_goes_on_after_a_kill(tmp_path):
    two_seeds = "--seeds", "2", "--jobs", "2", "--methods", "random,TopK"
    text, shown = run_leaderboard(tmp_path, *two_seeds)
    assert [text.count(f"seed {i}") for i in (0, 1)] == [2, 2]
    order = [(row["seed"], row["method"]) for row in shown]
    assert order == [(i, name) for i in (0, 1) for name in ("random", "TopK")]
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"case": "product sp')
    text, again = run_leaderboard(tmp_path, *two_seeds)
    assert "seed" not in text.replace("seeds", "")
    assert again == shown
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert len([json.loads(row) for row in rows]) == 4
    assert (tmp_path / "leaderboard.html").stat().st_size > 20_000


@pytest.mark.slow
def test_the_leaderboard_runs_every_method(bench, tmp_path):
    run_leaderboard(tmp_path, "--methods", "random,TopK")
    text, shown = run_leaderboard(tmp_path)
    runnable = [
        method
        for method in bench("methods").METHODS.values()
        if not method.package or importlib.util.find_spec(method.package)
    ]
    methods = len(runnable) + 1  # and the oracle
    assert text.count("seed 0") == methods - 2  # those two not again
    assert len({row["method"] for row in shown}) == len(shown) == methods
    names = {row["method"] for row in shown}
    assert {"consensus", "oracle", "LIB", "four-term loss"} <= names
    assert all(0 <= row["readers"] <= 1 and row["seconds"] > 0 for row in shown)


@pytest.fixture
def bench(monkeypatch):
    """A benchmark as a module, with a command line."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")

    def module(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return importlib.import_module(name)

    return module


def test_bootstrap_intervals_are_those_of_the_normal_distribution(bench):
    interval = bench("harness").bootstrap_interval
    values = np.random.default_rng(1).normal(2.0, 3.0, 400)
    half = 1.96 * values.std() / 20
    own = interval(values)
    np.testing.assert_allclose(own, values.mean() + half * np.array([-1, 1]), atol=0.02)
    assert own == interval(values) == interval(values, np.random.default_rng(0))
    rng = np.random.default_rng(0)
    assert own == interval(values, rng) != interval(values, rng)  # it goes on drawing


ROW = {"case": "x²", "method": "random", "seed": 0, "side": "readers"}
TINY = {"size": "tiny", "root": 0}


def test_rows_are_resumed_though_a_kill_cut_off_the_last(bench, tmp_path):
    stored_rows, path = bench("stored_rows"), tmp_path / "rows.jsonl"
    assert stored_rows.resume_rows(path, **TINY) == []
    rows = [ROW, ROW | {"seed": 1, "task_version": 1}]
    lines = "\n".join(map(json.dumps, rows))
    for text in (lines, lines + "\n", lines + '\n{"case": "x'):
        path.write_text(text)
        assert stored_rows.resume_rows(path, **TINY) == rows
        assert path.read_text() == lines + "\n"


@pytest.mark.parametrize(
    "bad", ["garbage", '{"case": "x"}', "5", "null", '{"case": "x{"case": "y"}']
)
def test_a_line_that_is_no_row_is_left_to_the_user(bad, bench, tmp_path):
    stored_rows, path = bench("stored_rows"), tmp_path / "rows.jsonl"
    stored_rows.resume_rows(path, **TINY)
    text = f"{json.dumps(ROW)}\n{bad}\n{json.dumps(ROW)}\n"
    path.write_text(text)
    with pytest.raises(
        SystemExit, match=r"has a line that is no row, '.*; take it out"
    ):
        stored_rows.resume_rows(path, **TINY)
    assert path.read_text() == text


@pytest.mark.parametrize("stored", [None, "", '{"size": "ti', '{"size": "quick"}'])
def test_rows_of_unknown_settings_are_refused(stored, bench, tmp_path):
    stored_rows, path = bench("stored_rows"), tmp_path / "rows.jsonl"
    text = json.dumps(ROW) + "\n"
    path.write_text(text)
    if stored is not None:
        (tmp_path / "settings.json").write_text(stored)
    with pytest.raises(SystemExit, match=r"rows of other settings, or a settings.json"):
        stored_rows.resume_rows(path, **TINY)
    assert path.read_text() == text


@pytest.mark.parametrize("stored", [{}, {"task_version": 1}, {"task_version": 3}])
def test_rows_of_another_version_of_a_task_are_refused(
    stored, bench, tmp_path, monkeypatch
):
    stored_rows, path = bench("stored_rows"), tmp_path / "rows.jsonl"
    stored_rows.resume_rows(path, **TINY)
    text = json.dumps(ROW | stored) + "\n"
    path.write_text(text)
    changed = stored_rows.ALL["x²"]._replace(version=2)
    monkeypatch.setitem(stored_rows.ALL, "x²", changed)
    version = stored.get("task_version", 1)
    match = rf"rows of version {version} of 'x²', which is at version 2 now; take them"
    with pytest.raises(SystemExit, match=match):
        stored_rows.resume_rows(path, **TINY)
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("name", "table", "count"),
    [("leaderboard", "TASKS", 1500), ("leaderboard-shapes", "SHAPES", 110)],
)
def test_the_rows_that_were_published_are_of_the_tasks_as_they_are(
    name, table, count, bench
):
    stored_rows, path = (
        bench("stored_rows"),
        ROOT / f"benchmarks/results/{name}-cpu.jsonl",
    )
    rows = stored_rows.parse_rows(path.read_text().splitlines(), path)
    assert len(rows) == count
    assert {row["case"] for row in rows} == set(getattr(bench("tasks"), table))
    methods = {row["method"] for row in rows}
    assert methods <= {*bench("methods").METHODS, "oracle"}


def test_sweeps_that_were_published_are_of_the_grids_as_they_are(bench):
    sweeps = bench("brittleness")
    for size, folder in (("full", "brittleness"), ("wide", "brittleness-wide")):
        grid = sweeps.GRIDS[size]
        for task in grid.tasks:
            for name, family in sweeps.FAMILIES.items():
                file = f"{sweeps.file_name(task)}-{name}.json"
                path = ROOT / "benchmarks" / "results" / folder / file
                if name == "consensus" and not path.exists():
                    continue  # version 4 has not been swept
                version = sweeps.TASKS[task].version
                runs, _ = sweeps.load_runs(path, family, grid, task_version=version)
                assert runs


def test_the_key_of_a_task_comes_from_its_name(bench):
    tasks = bench("tasks")
    every = [*tasks.TASKS.values(), *tasks.SHAPES.values()]

    def words(task, **draw):
        return tuple(jax.random.key_data(tasks.task_key(task, **draw)).tolist())

    # The keys that rows were measured with before a new task could be a row anywhere.
    assert [task.key for task in every[:26]] == list(range(26))
    for number, task in enumerate(every[:26]):
        for root, seed in ((0, 0), (3, 2)):
            key = jax.random.fold_in(jax.random.key(root), 1000 * seed + number)
            assert words(task, root=root, seed=seed) == tuple(key_words(key))
    new = tasks.PlantedTask(name="hashing", make=None)
    key = jax.random.fold_in(jax.random.key(0), 0xC9D3068D)
    assert words(new, seed=2) == tuple(key_words(jax.random.fold_in(key, 2)))
    other = new._replace(name="hashing 2")
    draws = [words(x, seed=i) for x in (*every, new, other) for i in range(5)]
    assert len(set(draws)) == 5 * (len(every) + 2)


def key_words(key):
    return jax.random.key_data(key).tolist()


SMALL = {"colours": 2, "shapes": 2, "dim": 6}


def test_a_task_is_made_with_its_key_and_its_knobs(bench):
    tasks = bench("tasks")
    task = tasks.PlantedTask(
        name="pair", make=lambda key, **knobs: (key, knobs), knobs={"dim": 3}, key=4
    )
    key, knobs = tasks.make_task(task, root=1, seed=2)
    assert key_words(key) == key_words(jax.random.fold_in(jax.random.key(1), 2004))
    assert knobs == {"dim": 3}
    sizes = bench("sizes").SIZES
    quick = sizes["quick"].tasks
    assert quick["circuits 20/60"].knobs == {"features": 20, "steps": 1500}
    assert "circuits 60/60" not in quick
    assert list(sizes["tiny"].tasks) == ["product space"]
    conditioned = sizes["conditioned"].tasks
    assert list(conditioned) == list(sizes["full"].tasks)
    row = conditioned["product space"]._replace(knobs=SMALL)
    plain = tasks.make_task(row._replace(condition=None), seed=3)
    draw = tasks.make_task(row, seed=3)  # the same draw in other coordinates
    assert abs(np.linalg.cond(draw.params["map"]) / 100 - 1) < 1e-3
    np.testing.assert_array_equal(draw.params["model"]["mix"], plain.params["mix"])
    assert all(name == task.name for name, task in tasks.ALL.items())


def test_every_task_is_in_the_list_of_tasks(bench):
    page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    text, *sections = page.split("\n## ")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]
    listed = {name.strip() for row in rows[1:] for name in row.split(",")}
    assert listed == set(bench("sizes").SIZES["full"].tasks)
    measured = next(part for part in sections if part.startswith("What the consensus"))
    assert all(f"\n| {name} |" in measured for name in listed)


@pytest.mark.slow
def test_controls_count_what_is_false(bench):
    runner, tasks, board = bench("runner"), bench("tasks"), bench("leaderboard")
    knobs = {"dim": 4, "width": 8, "layers": 1, "outputs": 2}
    small = tasks.MECHANISMS["random network"]._replace(knobs=knobs)
    budget = bench("methods").Budget(examples=50, steps=2, batch=8)
    task = tasks.make_task(small)
    rows = [
        runner.measure_method(task, small.name, method, 0, budget)
        for method in ("random", "oracle")
    ]
    assert [row["num_mechanisms"] for row in rows] == [16, 0]
    ours = rows[0] | {"method": "consensus"}
    planted = ROW | {"case": "product space", "method": "random", "readers": 0.5}
    lines = board.verdicts([planted, *rows, ours])
    wanted = ("consensus finds nothing", "random network", "16", "<= 1", "MISSED")
    assert wanted in lines
    assert sum("random network" in line for line in lines) == 1


def test_the_share_of_the_draws_that_are_covered_is_told(bench):
    board = bench("leaderboard")
    rows = [
        ROW | {"case": "product space", "method": "consensus", "seed": i, "readers": x}
        for i, x in enumerate((0.96, 0.95, 0.94))
    ]
    label, bar = "consensus covers 0.95", ">= 0.95"
    task = "product space, 2 of 3 draws"
    assert (label, task, "0.667", bar, "MISSED") in board.verdicts(rows)
    task = "product space, 2 of 2 draws"
    assert (label, task, "1.000", bar, "ok") in board.verdicts(rows[:2])
    name = "compressed computation"  # what is covered does not count there
    control = rows[0] | {"case": name, "num_mechanisms": 7}
    more = control | {"seed": 1, "num_mechanisms": 51}
    for draws, figure, verdict in (([control], "7", "ok"), ([control, more], "51", "")):
        (line,) = [x for x in board.verdicts(draws) if name in x[1]]
        wanted = (f"{figure}.000", "<= 50", verdict or "MISSED")
        assert line[2:] == wanted


@pytest.mark.slow
def test_a_method_that_raises_ends_nothing(bench, tmp_path, monkeypatch, capsys):
    names = "--methods", "activation PCA,random"
    board = bench("leaderboard", "--tiny", *names, "--out", tmp_path)

    def broken(*_, **__):
        raise ValueError("this is mine")

    def break_method(patch, name):
        patch.setitem(board.METHODS, name, board.METHODS[name]._replace(run=broken))

    with monkeypatch.context() as patch:
        break_method(patch, "activation PCA")
        with pytest.raises(SystemExit, match=r"1 rows are missing, .*PCA, seed 0 \(V"):
            board.main()
    assert "this is mine" in capsys.readouterr().err  # where it was raised, too
    written = json.loads((tmp_path / "leaderboard.json").read_text())
    failure = ["product space", "activation PCA, seed 0", "(ValueError: this is mine)"]
    assert written["failed"] == [failure]
    assert "too hard" not in (tmp_path / "leaderboard.html").read_text()
    board.main()  # tries it again
    assert "too hard" in (tmp_path / "leaderboard.html").read_text()
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["method"] for line in lines] == [
        "random",
        "activation PCA",
    ]
    with monkeypatch.context() as patch:
        break_method(patch, "random")
        bench("leaderboard", "--tiny", "--methods", "random", "--out", tmp_path / "new")
        with pytest.raises(SystemExit, match="1 rows are missing"):
            board.main()


@pytest.mark.parametrize("name", ["leaderboard", "brittleness"])
def test_places_that_cannot_be_written_are_refused_before_the_work(
    name, bench, tmp_path
):
    taken = tmp_path / "taken"
    taken.write_text("mine")
    module = bench(name, "--tiny", "--out", taken)
    with pytest.raises(ValueError, match=r"output_folder: cannot write to .*taken"):
        module.main()
    bench(name, "--tiny", "--out", tmp_path / "out", "--json", taken / "rows.json")
    with pytest.raises(ValueError, match=r"output_folder: cannot write to .*taken"):
        module.main()
    assert taken.read_text() == "mine"


def test_the_command_line_is_checked(bench, capsys):
    board = bench("leaderboard", "--tiny", "--methods", "TopK,random,TopK")
    assert board.parse_options().draws == {"TopK": 1, "random": 1}
    board = bench("leaderboard", "--methods", "TopK,consensus")
    assert board.parse_options().draws == {"TopK": 3, "consensus": 20}
    for bad, match in (
        (("--seeds", "0"), "--seeds must be at least 1, got 0"),
        (("--others", "2"), "--others must be at most --seeds, 1, got 2"),
        (("--jobs", "0"), "--jobs must be at least 1, got 0"),
        (("--tasks", "x²"), "--tasks: there is no 'x²' at size tiny; there are pro"),
        (("--methods", ""), "--methods: there is no ''; there are random"),
        (("--quick",), "--tiny: not with --quick"),
    ):
        bench("leaderboard", "--tiny", *bad)
        with pytest.raises(SystemExit):
            board.parse_options()
        assert match in capsys.readouterr().err
    bench("leaderboard", "--shapes", "--methods", "consensus")
    other = board.parse_options()
    assert (other.size, other.draws) == ("shapes", {"consensus": 1})
    assert other.out == Path("out/leaderboard-shapes")
    assert not set(other.tasks) & set(board.SIZES["full"].tasks)
    assert "," not in "".join([*board.ALL, *board.METHODS])


@pytest.mark.slow
def test_without_tyro_the_command_says_what_to_install():
    names = "leaderboard.py", "brittleness.py", "tap.py"
    commands = [(f"benchmarks/{name}", "--tiny") for name in names]
    ends = run_in_turn(commands, prelude="sys.modules['tyro'] = None")
    for name, (status, output) in zip(names, ends, strict=True):
        assert status == 1
        expected = f"{name}: the command line needs tyro: pip install tyro"
        assert output.strip().endswith(expected)
        assert "Traceback" not in output


def test_a_sweep_that_is_damaged_or_of_another_grid_is_left_to_the_user(
    bench, tmp_path
):
    sweeps, families = bench("brittleness"), bench("families")
    path, grid = tmp_path / "x.json", sweeps.GRIDS["tiny"]
    other = {"grid": sweeps.QUICK, "runs": [], "seconds": 1.0}
    for text, match in (
        ('{"grid": [', "x.json is damaged; move it away"),
        ("[]", "x.json is damaged; move it away"),
        (json.dumps(other | {"runs": [[1.0]]}), "x.json is damaged; move it away"),
        (json.dumps(other), "x.json is of another grid; move it away"),
        (
            json.dumps(other | {"grid": grid}),
            r"x.json is of another version \(1, now 2\); move",
        ),
        (
            json.dumps(other | {"grid": grid, "version": 2, "task_version": 2}),
            r"x.json is of another version of the task \(2, now 1\); move it away",
        ),
        (
            json.dumps(other | {"grid": grid, "version": 3}),
            r"x.json is of another version \(3, now 2\); move it away",
        ),
    ):
        path.write_text(text)
        with pytest.raises(SystemExit, match=match):
            sweeps.sweep_family(path, families.Family(None, 2), None, 1.0, grid)
        assert path.read_text() == text


@pytest.mark.slow
def test_a_sweep_goes_on_after_its_last_whole_part(bench, tmp_path):
    sweeps, families = bench("brittleness"), bench("families")
    path, grid = tmp_path / "x.json", sweeps.GRIDS["tiny"]
    cells, called = len(families.grid_cells(grid)[0]), []

    def sweep(stopped):
        def part(i):
            called.append(i)
            if i == stopped:
                raise KeyboardInterrupt
            return [sweeps.Run(1e-3, 1.0, 1.0, "x", i, True, 0.5, 2.0)] * cells

        return families.Family(
            lambda *_: [functools.partial(part, i) for i in range(3)]
        )

    with pytest.raises(KeyboardInterrupt):
        sweeps.sweep_family(path, sweep(1), None, 2.0, grid)
    runs, seconds = sweeps.sweep_family(path, sweep(None), None, 2.0, grid)
    assert called == [0, 1, 1, 2]
    assert [run.start for run in runs] == sorted([0, 1, 2] * cells)
    assert sweeps.sweep_family(path, sweep(0), None, 2.0, grid) == (runs, seconds)
    stored = json.loads(path.read_text())
    stored["runs"].pop()
    path.write_text(json.dumps(stored))
    with pytest.raises(SystemExit, match=r"x.json is of another grid; move"):
        sweeps.sweep_family(path, sweep(None), None, 2.0, grid)


def test_nothing_found_is_no_success(bench):
    sweeps = bench("brittleness")
    run = sweeps.Run(1e-3, 1.0, 1.0, "both", 0, True, 0.0, 2.0)
    assert sweeps.success_shares([run], 0.0, 2.0, best_coefficient=False) == (0, 0)
    (member,) = sweeps.make_members([run], 0.0, 2.0)
    assert member.figures["share of the best"] == 0
    assert member.figures["success (a)"] == member.figures["success (b)"] == 0
    bare = run._replace(codes=None)
    assert sweeps.success_shares([bare], 0.5, 2.0, best_coefficient=True) == (0, None)
    (member,) = sweeps.make_members([bare], 0.0, 2.0)
    assert np.isnan(member.figures["success (b)"])  # and no failure


def test_success_is_near_the_best_and_b_has_the_codes_too(bench):
    sweeps = bench("brittleness")
    run = sweeps.Run(1e-3, 1.0, 1.0, "both", 0, True, 0.9, 2.0)
    runs = [
        run,
        run._replace(coefficient=2.0, codes=2.3),
        run._replace(coefficient=3.0, coverage=0.89),
        run._replace(coefficient=4.0, finite=False),
    ]
    members = sweeps.make_members(runs, 1.0, 2.0)
    assert [m.figures["success (a)"] for m in members] == [1, 1, 0, 0]
    assert [m.figures["success (b)"] for m in members] == [1, 0, 0, 0]
    assert sweeps.success_shares(runs, 1.0, 2.0, best_coefficient=False) == (0.5, 0.25)
    assert sweeps.success_shares(runs, 1.0, 2.0, best_coefficient=True) == (0.5, 1.0)


@pytest.mark.slow
def test_brittleness_is_swept_once_and_drawn(tmp_path):
    path = tmp_path / "shares.jsonl"
    command = "benchmarks/brittleness.py", "--tiny", "--out", tmp_path / "out"
    texts = []
    for _ in range(2):
        done = run_python(*command, "--json", path)
        assert done.returncode == 0, done.stderr
        texts.append(path.read_text())
    assert texts[0] == texts[1]  # kept, not swept again
    rows = [json.loads(line) for line in texts[0].splitlines()]
    methods = [row["method"] for row in rows]
    assert methods == ["published", "robust", "consensus"]
    assert [row["size"]["runs"] for row in rows] == [8, 8, 4]
    assert 0 <= rows[1]["b"] <= rows[1]["a"] <= 1
    assert rows[2]["b"] is None
    assert (tmp_path / "out" / "product-space-b.png").stat().st_size > 5000
    assert all(0 < row["best"] <= 1 and row["target"] == 2 for row in rows)
    assert (tmp_path / "out" / "product-space.png").stat().st_size > 5000
    assert (tmp_path / "out" / "brittleness.html").stat().st_size > 20_000


@pytest.mark.slow
def test_what_recurs_at_a_site_is_measured_at_the_tiny_setting(tmp_path):
    path = tmp_path / "rows.json"
    options = "--tiny", "--support", ".2", "--json", path
    done = run_python("benchmarks/real_site.py", *options)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    *found, acts, grads = (row for row in rows if "recurs" in row)
    assert [acts["method"], grads["method"]] == [
        "TopK of activations",
        "TopK of gradients",
    ]
    numbers = np.array([row["directions"] for row in found])
    assert np.all(np.diff(numbers, axis=0) <= 0)  # more support, fewer directions
    assert np.all(np.array([row["recurs"] for row in found]) <= numbers)
    moves = {row["method"]: row for row in rows if "divergence" in row}
    assert "move along random" in moves
    for row in moves.values():
        low, high = row["divergence interval"]
        assert 0 < low <= row["divergence"] <= high


@pytest.mark.slow
def test_moves_along_writers_against_a_linear_model(bench):
    """Logits are linear in the site, so that all is known in closed form."""
    effects = bench("site_effects").effects
    rng = np.random.default_rng(0)
    params = rng.normal(size=(20, 6)).astype("float32"), rng.normal(size=(6, 9))
    tokens = rng.integers(0, 20, (10, 4))

    def probed(params, tokens, probes):
        embed, unembed = map(jax.numpy.asarray, params)
        acts = probes.get("site", lambda act: act)(embed[tokens])
        return acts @ unembed, {"site": acts}

    readers = rng.normal(size=(2, 6))
    readers, writers = (
        readers / np.linalg.norm(readers, axis=1, keepdims=True),
        -readers,
    )
    features = Features(readers, writers)
    rows = effects(jax.random.key(0), probed, params, tokens, "site", features)
    ends = params[0].astype(float)[tokens[:, -1]]
    length = 0.2 * np.sqrt(np.mean(np.sum(ends**2, axis=1)))

    def log_probs(acts):
        logits = acts @ params[1]
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    # Gradients of all labels; those that were drawn are among them.
    probs = np.exp(log_probs(ends))
    grads = params[1].T - np.einsum("nv,dv->nd", probs, params[1])[:, None]
    slopes = np.abs(np.einsum("nvd,rd->rnv", grads, length * readers))
    assert np.all(
        rows["move along readers"]["length"] == pytest.approx(length, rel=1e-5)
    )
    for name in ("readers", "writers"):
        row = rows[f"move along {name}"]
        # The same lines, and the sign comes from the gradient.
        assert row["gain"] == pytest.approx(rows["move along readers"]["gain"], 1e-4)
        assert slopes.min() < row["predicted"] <= slopes.max(-1).mean() * 1.0001
        # Concave in the move: a gain is below what the gradient says.
        assert 0 < row["gain"] < row["predicted"]
    everywhere = params[0].astype(float)[tokens[:8]]
    still = log_probs(everywhere)
    moved = [log_probs(everywhere + length * reader) for reader in readers]
    wanted = [np.mean(np.sum(np.exp(still) * (still - m), axis=-1)) for m in moved]
    assert rows["move along readers"]["divergence"] == pytest.approx(
        np.mean(wanted), 1e-3
    )


@pytest.mark.parametrize(
    "name",
    [
        "tap.py",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "collect.py",
                "controllers.py",
                "dictionary.py",
                "linalg.py",
                "synthetic.py",
                "world.py",
            )
        ),
    ],
)
def test_a_benchmark_runs_at_its_tiny_setting(name, tmp_path):
    path = tmp_path / "rows.json"
    done = run_python(f"benchmarks/{name}", "--tiny", "--json", path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows
    for row in rows:
        error = row["error"]  # nothing to compare with, or products alone: none
        assert error is None or not error > LIMITS.get(name, 1e-2)
        assert row["ours_s"] > 0
        assert {"case", "size", "method", "ratio", "device", "versions"} <= set(row)


@pytest.mark.parametrize(("rows", "dim"), [(6, 4), (4, 6)])
def test_matrices_have_the_spectrum_that_is_asked_for(rows, dim, bench):
    spectrum = np.array([4.0, 3.0, 2.0, 1.0])
    matrix = bench("spectra").with_spectrum(rows, dim, spectrum, seed=1)
    assert matrix.shape == (rows, dim)
    values = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(values, spectrum, rtol=1e-5)


def test_bases_that_differ_in_signs_alone_are_the_same(bench):
    module, rng = bench("interaction_basis"), np.random.default_rng(0)
    readers = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    basis = {"values": 0.5 ** np.arange(8), "readers": readers, "writers": readers.T}
    signs = rng.choice([-1, 1], 8)
    flipped = {"readers": readers * signs, "writers": signs[:, None] * readers.T}
    same = module.distances({"a": basis | flipped}, {"a": basis})
    assert max(same.values()) < 1e-14
    # A span that is turned by a known angle, and a value that is off by a tenth.
    angle, turned = 0.01, readers.copy()
    turned[:, 1] = np.cos(angle) * readers[:, 1] + np.sin(angle) * readers[:, 2]
    values = basis["values"] * np.array([1.1, *[1] * 7])
    found = {"values": values, "readers": turned, "writers": turned.T[:7]}
    off = module.distances({"a": found, "b": basis}, {"a": basis, "b": basis})
    assert off["error"] == pytest.approx(0.1)
    assert off["readers span"] == pytest.approx(np.sin(angle))
    assert off["writers span"] == pytest.approx(np.sin(angle))
    assert off["readers"] > 1e-3


def end_this_process(path):
    path.touch()
    os._exit(9)


def raise_or_wait(job):
    path, last = job
    if not last:
        raise ValueError("this is mine")
    time.sleep(60)
    path.touch()


def process_of(_):
    return os.getpid()


def wait_and_write(path):
    path.with_suffix(".begun").touch()
    time.sleep(4)
    path.touch()


@pytest.mark.slow
def test_jobs_are_processes(bench):
    runner = bench("runner")
    assert set(runner.run_parallel(process_of, [0, 1], 1)) == {os.getpid()}
    others = list(runner.run_parallel(process_of, [0, 1, 2], 2))
    assert len(others) == 3
    assert os.getpid() not in others


@pytest.mark.slow
def test_a_process_that_ends_is_reported(bench, tmp_path):
    paths = [tmp_path / "first", tmp_path / "second"]
    with pytest.raises(SystemExit, match=r"a process ended, .* with --jobs 1"):
        list(bench("runner").run_parallel(end_this_process, paths, 2))
    assert any(path.exists() for path in paths)  # and not because it never ran


@pytest.mark.slow
def test_an_error_does_not_wait_for_the_other_jobs(bench, tmp_path):
    jobs = [(tmp_path / "late", last) for last in (True, False, True, True)]
    with pytest.raises(ValueError, match="this is mine"):
        list(bench("runner").run_parallel(raise_or_wait, jobs, 2))
    for child in multiprocessing.active_children():
        child.join(20)
    assert not (tmp_path / "late").exists()  # it would be after a minute


@pytest.mark.slow
def test_processes_end_with_the_one_that_began_them(tmp_path):
    code = f"""
import sys
sys.path[:0] = [{str(ROOT / "benchmarks")!r}, {str(ROOT / "tests")!r}]
import runner, test_benchmarks
from pathlib import Path
if __name__ == "__main__":
    paths = [Path({str(tmp_path)!r}) / name for name in "ab"]
    list(runner.run_parallel(test_benchmarks.wait_and_write, paths, 2))
"""
    (tmp_path / "run.py").write_text(code)
    with subprocess.Popen([sys.executable, str(tmp_path / "run.py")]) as parent:
        for _ in range(600):
            if begun := [*tmp_path.glob("*.begun")]:
                break
            time.sleep(0.1)
        parent.kill()
    assert begun
    time.sleep(6)
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


def test_results_of_processes_are_put_together(bench, tmp_path, monkeypatch, capsys):
    runner, called = bench("runner"), []

    def run_parallel(function, jobs, processes):
        called.extend((job.seed, job.methods, processes) for job in jobs)
        result = runner.JobResult(
            "product space", [ROW | {"seed": 1}], [], {"ICA": "no sklearn"}, None
        )
        yield result
        failures = [("product space", "TopK, seed 0", "(E: e)")]
        yield result._replace(rows=[ROW], failures=failures, page=("about", None))

    monkeypatch.setattr(runner, "run_parallel", run_parallel)
    methods = ["random", "ICA", "TopK"]
    measured = runner.measure_missing(
        [ROW | {"case": "product space", "seed": 2, "method": "TopK"}],
        tmp_path / "rows.jsonl",
        **TINY,
        draws=dict.fromkeys(methods, 3) | {"ICA": 2},
        tasks=["product space"],
        processes=2,
    )
    assert called == [(0, methods, 2), (1, methods, 2), (2, ["random"], 2)]
    assert measured.methods == ["random", "TopK"]
    assert measured.failures == [("product space", "TopK, seed 0", "(E: e)")]
    assert [row["seed"] for row in measured.rows] == [2, 1, 0]
    assert measured.pages == {"product space": ("about", None)}
    assert capsys.readouterr().out == "ICA is left out: no sklearn\n"


@pytest.mark.slow
def test_a_task_that_raises_ends_nothing(bench, tmp_path, monkeypatch, capsys):
    names = "--methods", "random"
    board = bench("leaderboard", "--tiny", *names, "--out", tmp_path)

    def broken(_, **__):
        raise ValueError("no such model")

    tiny = board.SIZES["tiny"].tasks
    task = tiny["product space"]._replace(make=broken)
    monkeypatch.setitem(tiny, "product space", task)
    with pytest.raises(SystemExit, match=r"space as a whole, seed 0 \(ValueError: no"):
        board.main()
    assert "no such model" in capsys.readouterr().err


def test_jobs_that_are_not_asked_for(bench, monkeypatch, capsys):
    board = bench("leaderboard", "--quick")
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert board.parse_options().jobs == 2
    monkeypatch.setattr(board.jax, "default_backend", lambda: "gpu")
    assert board.parse_options().jobs == 1
    bench("leaderboard", "--quick", "--jobs", "2")
    with pytest.raises(SystemExit):
        board.parse_options()
    assert "an accelerator runs one process" in capsys.readouterr().err
    monkeypatch.undo()
    board = bench("leaderboard")
    assert board.parse_options().jobs == 1
