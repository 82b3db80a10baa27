import argparse
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

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


LIMITS = {"tap.py": 1e-5, "controllers.py": 1.0}  # of errors; others 1e-2


def test_the_leaderboard_runs_every_method_and_goes_on(tmp_path):
    command = [sys.executable, "benchmarks/leaderboard.py", "--tiny"]
    command += ["--out", str(tmp_path)]
    few = [*command, "--seeds", "2", "--jobs", "2", "--methods", "random,TopK"]
    outputs, shown = [], []
    for arguments in (few, command, command):
        if outputs:  # as a kill would leave it
            with (tmp_path / "rows.jsonl").open("a") as file:
                file.write('{"case": "product sp')
        done = subprocess.run(
            arguments,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
        shown.append(json.loads((tmp_path / "leaderboard.json").read_text())["rows"])
    methods = 20 if importlib.util.find_spec("sklearn") else 17
    assert [outputs[0].count(f"seed {i}") for i in (0, 1)] == [2, 2]
    assert outputs[1].count("seed 0") == methods - 2  # those two not again
    assert "seed" not in outputs[2].replace("seeds", "")
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len({(row["method"], row["seed"]) for row in rows}) == methods + 2
    assert len(rows) == methods + 2
    assert {"consensus", "oracle", "LIB", "four-term loss"} <= {
        r["method"] for r in rows
    }
    assert all(0 <= row["readers"] <= 1 and row["seconds"] > 0 for row in rows)
    order = [(row["seed"], row["method"]) for row in shown[0]]
    assert order == [(i, name) for i in (0, 1) for name in ("random", "TopK")]
    assert [row["seed"] for row in shown[1]] == [0] * methods
    assert shown[1] == shown[2]
    assert (tmp_path / "leaderboard.html").stat().st_size > 20_000


@pytest.fixture
def bench(monkeypatch):
    """A benchmark as a module, with a command line."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")

    def module(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return importlib.import_module(name)

    return module


ROW = {"case": "x²", "method": "random", "seed": 0, "side": "readers"}
OPTIONS = argparse.Namespace(size="tiny", root=0)


def test_rows_are_kept_whatever_a_kill_cut_off(bench, tmp_path):
    board = bench("leaderboard")
    path, (_, budget, _) = tmp_path / "rows.jsonl", board.SIZES["tiny"]
    assert board.kept(path, OPTIONS, budget) == []
    rows = [ROW, ROW | {"seed": 1}]
    whole = "\n".join(map(json.dumps, rows))
    for text in (whole, whole + "\n", whole + '\n{"case": "x'):
        path.write_text(text)
        assert board.kept(path, OPTIONS, budget) == rows
        assert path.read_text() == whole + "\n"


@pytest.mark.parametrize(
    "bad", ["garbage", '{"case": "x"}', "5", "null", '{"case": "x{"case": "y"}']
)
def test_a_line_that_is_no_row_is_left_to_the_user(bad, bench, tmp_path):
    board = bench("leaderboard")
    path, (_, budget, _) = tmp_path / "rows.jsonl", board.SIZES["tiny"]
    board.kept(path, OPTIONS, budget)
    text = f"{json.dumps(ROW)}\n{bad}\n{json.dumps(ROW)}\n"
    path.write_text(text)
    with pytest.raises(
        SystemExit, match=r"has a line that is no row, '.*; take it out"
    ):
        board.kept(path, OPTIONS, budget)
    assert path.read_text() == text


@pytest.mark.parametrize("said", [None, "", '{"size": "ti', '{"size": "quick"}'])
def test_rows_of_unknown_settings_are_not_gone_on_with(said, bench, tmp_path):
    board = bench("leaderboard")
    path, budget = tmp_path / "rows.jsonl", board.SIZES["tiny"][1]
    text = json.dumps(ROW) + "\n"
    path.write_text(text)
    if said is not None:
        (tmp_path / "settings.json").write_text(said)
    with pytest.raises(SystemExit, match=r"rows of other settings, or a settings.json"):
        board.kept(path, OPTIONS, budget)
    assert path.read_text() == text


def test_a_method_that_raises_ends_nothing(bench, tmp_path, monkeypatch, capsys):
    names = "--methods", "activation PCA,random"
    board = bench("leaderboard", "--tiny", *names, "--out", tmp_path)

    def broken(*_, **__):
        raise ValueError("this is mine")

    with monkeypatch.context() as patch:
        patch.setitem(board.METHODS, "activation PCA", broken)
        with pytest.raises(SystemExit, match=r"1 rows are missing, .*PCA, seed 0 \(V"):
            board.main()
    assert "this is mine" in capsys.readouterr().err  # where it was raised, too
    said = json.loads((tmp_path / "leaderboard.json").read_text())
    where = ["product space", "activation PCA, seed 0", "(ValueError: this is mine)"]
    assert said["failed"] == [where]
    assert "too hard" not in (tmp_path / "leaderboard.html").read_text()
    board.main()  # tries it again
    assert "too hard" in (tmp_path / "leaderboard.html").read_text()
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["method"] for line in lines] == [
        "random",
        "activation PCA",
    ]
    with monkeypatch.context() as patch:
        patch.setitem(board.METHODS, "random", broken)
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


def test_names_are_looked_at_once_each(bench, capsys):
    board = bench("leaderboard", "--tiny", "--methods", "TopK,random,TopK")
    assert board.parsed().methods == ["TopK", "random"]
    for bad, match in (
        (("--seeds", "0"), "--seeds must be at least 1, got 0"),
        (("--jobs", "0"), "--jobs must be at least 1, got 0"),
        (("--tasks", "no"), "--tasks: there is no 'no'; there are product space"),
        (("--methods", ""), "--methods: there is no ''; there are random"),
    ):
        bench("leaderboard", "--tiny", *bad)
        with pytest.raises(SystemExit):
            board.parsed()
        assert match in capsys.readouterr().err
    bench("leaderboard", "--shapes", "--methods", "consensus")
    other = board.parsed()
    assert (other.size, other.seeds) == ("shapes", 1)
    assert other.out == "out/leaderboard-shapes"
    assert not set(other.tasks) & set(board.TASKS)
    assert "," not in "".join([*board.TASKS, *board.SHAPES, *board.METHODS])


def test_a_sweep_that_is_damaged_or_of_another_grid_is_left_to_the_user(
    bench, tmp_path
):
    sweeps = bench("brittleness")
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
            json.dumps(other | {"grid": grid, "version": 3}),
            r"x.json is of another version \(3, now 2\); move it away",
        ),
    ):
        path.write_text(text)
        with pytest.raises(SystemExit, match=match):
            sweeps.swept(path, sweeps.Family(None, 2), None, 1.0, grid)
        assert path.read_text() == text


def test_a_sweep_goes_on_after_its_last_whole_part(bench, tmp_path):
    sweeps = bench("brittleness")
    path, grid = tmp_path / "x.json", sweeps.GRIDS["tiny"]
    cells, asked = len(sweeps.cells_of(grid)[0]), []

    def sweep(stopped):
        def part(i):
            asked.append(i)
            if i == stopped:
                raise KeyboardInterrupt
            return [sweeps.Run(1e-3, 1.0, 1.0, "x", i, True, 0.5, 2.0)] * cells

        return sweeps.Family(lambda *_: [functools.partial(part, i) for i in range(3)])

    with pytest.raises(KeyboardInterrupt):
        sweeps.swept(path, sweep(1), None, 2.0, grid)
    runs, seconds = sweeps.swept(path, sweep(None), None, 2.0, grid)
    assert asked == [0, 1, 1, 2]
    assert [run.start for run in runs] == sorted([0, 1, 2] * cells)
    assert sweeps.swept(path, sweep(0), None, 2.0, grid) == (runs, seconds)
    few = json.loads(path.read_text())
    few["runs"].pop()
    path.write_text(json.dumps(few))
    with pytest.raises(SystemExit, match=r"x.json is of another grid; move"):
        sweeps.swept(path, sweep(None), None, 2.0, grid)


def test_nothing_found_is_no_success(bench):
    sweeps = bench("brittleness")
    run = sweeps.Run(1e-3, 1.0, 1.0, "both", 0, True, 0.0, 2.0)
    assert sweeps.shares([run], 0.0, 2.0, choose=False) == (0, 0)
    (member,) = sweeps.members_of([run], 0.0, 2.0)
    assert member.figures["share of the best"] == 0
    assert member.figures["success (a)"] == member.figures["success (b)"] == 0
    bare = run._replace(codes=None)
    assert sweeps.shares([bare], 0.5, 2.0, choose=True) == (0, None)
    (member,) = sweeps.members_of([bare], 0.0, 2.0)
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
    found = sweeps.members_of(runs, 1.0, 2.0)
    assert [m.figures["success (a)"] for m in found] == [1, 1, 0, 0]
    assert [m.figures["success (b)"] for m in found] == [1, 0, 0, 0]
    assert sweeps.shares(runs, 1.0, 2.0, choose=False) == (0.5, 0.25)
    assert sweeps.shares(runs, 1.0, 2.0, choose=True) == (0.5, 1.0)


@pytest.mark.slow
def test_brittleness_is_swept_once_and_drawn(tmp_path):
    path = tmp_path / "shares.jsonl"
    command = [sys.executable, "benchmarks/brittleness.py", "--tiny", "--out"]
    command += [str(tmp_path / "out"), "--json", str(path)]
    texts = []
    for _ in range(2):
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
        )
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


@pytest.mark.parametrize(
    "name",
    [
        "collect.py",
        "tap.py",
        "world.py",
        "controllers.py",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("linalg.py", "synthetic.py", "dictionary.py")
        ),
    ],
)
def test_a_benchmark_runs_at_its_tiny_setting(name, tmp_path):
    path = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, f"benchmarks/{name}", "--tiny", "--json", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows
    for row in rows:
        error = row["error"]  # nothing to compare with, or products alone: none
        assert error is None or not error > LIMITS.get(name, 1e-2)
        assert row["ours_s"] > 0
        assert {"case", "size", "method", "ratio", "device", "versions"} <= set(row)


def end_this_process(path):
    path.touch()
    os._exit(9)


def raise_or_wait(path, last):
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


def test_jobs_are_processes(bench, monkeypatch):
    board = bench("leaderboard", "--tiny")
    monkeypatch.setattr(board, "measure", process_of)
    alone = set(board.side_by_side([(0,), (1,)], 1))
    assert alone == {os.getpid()}
    others = list(board.side_by_side([(0,), (1,), (2,)], 2))
    assert len(others) == 3
    assert os.getpid() not in others


def test_a_process_that_ends_is_said(bench, tmp_path, monkeypatch):
    board = bench("leaderboard", "--tiny")
    monkeypatch.setattr(board, "measure", end_this_process)
    paths = [(tmp_path / "one",), (tmp_path / "other",)]
    with pytest.raises(SystemExit, match=r"a process ended, .* with --jobs 1"):
        list(board.side_by_side(paths, 2))
    assert any(path.exists() for (path,) in paths)  # and not because it never ran


def test_what_goes_wrong_does_not_wait_for_the_rest(bench, tmp_path, monkeypatch):
    board = bench("leaderboard", "--tiny")
    monkeypatch.setattr(board, "measure", raise_or_wait)
    begun = time.perf_counter()
    todo = [(tmp_path / "late", last) for last in (True, False, True, True)]
    with pytest.raises(ValueError, match="this is mine"):
        list(board.side_by_side(todo, 2))
    for child in multiprocessing.active_children():
        child.join(20)
    assert time.perf_counter() - begun < 40
    assert not (tmp_path / "late").exists()


def test_processes_end_with_the_one_that_began_them(tmp_path):
    code = f"""
import sys
sys.path[:0] = [{str(ROOT / "benchmarks")!r}, {str(ROOT / "tests")!r}]
import leaderboard, test_benchmarks
from pathlib import Path
leaderboard.measure = test_benchmarks.wait_and_write
if __name__ == "__main__":
    paths = [(Path({str(tmp_path)!r}) / name,) for name in "ab"]
    list(leaderboard.side_by_side(paths, 2))
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


def test_what_processes_found_is_put_together(bench, tmp_path, monkeypatch, capsys):
    names = "--methods", "random,ICA,TopK"
    board = bench("leaderboard", "--tiny", "--seeds", "3", "--jobs", "2", *names)
    options = board.parsed()
    asked = []

    def side_by_side(todo, jobs):
        asked.extend((one[3], one[5], jobs) for one in todo)
        why = {"ICA": "no sklearn"}
        row = ROW | {"seed": 1}
        yield board.Measured("product space", [row], [], why, None)
        bad = [("product space", "TopK, seed 0", "(E: e)")]
        yield board.Measured("product space", [ROW], bad, why, ("about", None))

    monkeypatch.setattr(board, "side_by_side", side_by_side)
    rows, pages = [ROW | {"case": "product space", "seed": 2, "method": "TopK"}], {}
    methods, failed = board.fill(rows, pages, tmp_path / "rows.jsonl", options)
    every = ["random", "ICA", "TopK"]
    assert asked == [(0, every, 2), (1, every, 2), (2, every[:2], 2)]
    assert methods == ["random", "TopK"]
    assert failed == [("product space", "TopK, seed 0", "(E: e)")]
    assert [row["seed"] for row in rows] == [2, 1, 0]
    assert pages == {"product space": ("about", None)}
    assert capsys.readouterr().out == "ICA is left out: no sklearn\n"


def test_a_task_that_raises_ends_nothing(bench, tmp_path, monkeypatch, capsys):
    names = "--methods", "random"
    board = bench("leaderboard", "--tiny", *names, "--out", tmp_path)

    def broken(_):
        raise ValueError("no such model")

    monkeypatch.setitem(board.TINY, "product space", broken)
    with pytest.raises(SystemExit, match=r"space as a whole, seed 0 \(ValueError: no"):
        board.main()
    assert "no such model" in capsys.readouterr().err


def test_jobs_that_are_not_asked_for(bench, monkeypatch, capsys):
    board = bench("leaderboard", "--quick")
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert board.parsed().jobs == 2
    monkeypatch.setattr(board.jax, "default_backend", lambda: "gpu")
    assert board.parsed().jobs == 1
    bench("leaderboard", "--quick", "--jobs", "2")
    with pytest.raises(SystemExit):
        board.parsed()
    assert "an accelerator runs one process" in capsys.readouterr().err
    monkeypatch.undo()
    board = bench("leaderboard")
    assert board.parsed().jobs == 1
