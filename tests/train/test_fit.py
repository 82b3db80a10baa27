import builtins
import errno
import functools
import io
import json
import os
import signal
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_trainer import Stream, a_batch, bits, on_device, tiny

from toyfeat.data.batches import Batches
from toyfeat.train import fit
from toyfeat.train.types import Trainer
from toyfeat.types import Taps

TINY = tiny()
START = TINY.init(jax.random.key(0))
RATES = jnp.array([0.01, 0.05, 0.2])
POPULATION = jax.vmap(lambda r: TINY.init(jax.random.key(0), rate=r))(RATES)


def by_hand(trainer, state, batches, steps):
    update = jax.jit(trainer.update)
    take = batches
    if isinstance(batches, Batches):
        take = jax.jit(lambda step: batches(step))
    for step in range(int(state.step.flatten()[0]), steps):
        state, _ = update(state, take(step))
    return state


def lines(folder):
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def close(a, b):
    a, b = (
        t._replace(running=jax.random.key_data(t.running["key"]), controller=())
        for t in (a, b)
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b
    )


@pytest.mark.slow
@pytest.mark.parametrize("batches", [on_device(), a_batch], ids=["device", "host"])
@pytest.mark.parametrize("start", [START, POPULATION], ids=["one", "population"])
def test_it_does_what_a_loop_over_update_does(start, batches):
    before = bits(start)
    done = fit(TINY, start, batches, steps=7, chunk=3)
    close(done, by_hand(TINY, start, batches, 7))
    assert bits(start) == before  # and can still be read
    assert done.step.shape == start.step.shape


@pytest.mark.slow
def test_it_goes_on_from_the_step_of_the_state_and_keeps_borders():
    half = fit(TINY, START, a_batch, steps=4, chunk=3)
    seen = []
    done = fit(
        TINY, half, a_batch, steps=11, chunk=3, on_chunk=lambda s, m: seen.append(s)
    )
    assert seen == [6, 9, 11]
    close(done, by_hand(TINY, START, a_batch, 11))
    assert bits(fit(TINY, done, a_batch, steps=11)) == bits(done)


def test_batches_are_fetched_once_each_and_one_chunk_ahead():
    order = []

    def batches(step):
        order.append(step)
        return a_batch(step)

    fit(TINY, START, batches, steps=6, chunk=2, on_chunk=lambda s, m: order.append(-s))
    assert order == [0, 1, 2, 3, -2, 4, 5, -4, -6]


def test_arrays_of_batches_are_arguments_and_the_loop_is_compiled_once(monkeypatch):
    traces = []

    def update(state, taps):
        traces.append(1)
        return TINY.update(state, taps)

    trainer, batches = Trainer(TINY.init, update), on_device()
    fit(trainer, START, batches, steps=8, chunk=2)
    other = batches._replace(data={**batches.data, "x": batches.data["x"] + 1})
    done = fit(trainer, START, other, steps=8, chunk=2)
    assert len(traces) == 1
    close(done, by_hand(TINY, START, other, 8))


def test_leaves_of_other_kinds_are_taken_as_arrays():
    weak = START._replace(hyper={"rate": 0.05}, step=np.int32(0))
    done = fit(TINY, weak, a_batch, steps=3)
    assert bits(done) == bits(fit(TINY, START, a_batch, steps=3))
    assert not done.hyper["rate"].weak_type


def test_lines_of_metrics_are_means_of_chunks(tmp_path):
    seen = {}
    fit(
        TINY,
        START,
        a_batch,
        steps=5,
        chunk=2,
        directory=tmp_path / "run",
        on_chunk=seen.__setitem__,
    )
    rows = lines(tmp_path / "run")
    assert [row["step"] for row in rows] == [2, 4, 5]
    state, losses = START, []
    for step in range(5):
        state, metrics = TINY.update(state, a_batch(step))
        losses.append(float(metrics["loss"]))
    wanted = [np.mean(losses[:2]), np.mean(losses[2:4]), losses[4]]
    np.testing.assert_allclose([row["loss"] for row in rows], wanted, rtol=1e-4)
    assert all(row["seconds"] > 0 and row["examples_per_s"] > 0 for row in rows)
    np.testing.assert_allclose(
        [row["seconds"] * row["examples_per_s"] for row in rows], [32, 32, 16]
    )
    assert sorted(seen) == [2, 4, 5]
    assert isinstance(seen[4]["loss"], np.ndarray)
    assert float(seen[4]["loss"]) == rows[1]["loss"]
    assert [p.name for p in sorted((tmp_path / "run" / "checkpoint").iterdir())] == [
        "step_00000005.npz"
    ]


def spoiled(at, member=None):
    """The trainer, with a loss of NaN at a step (for a member)."""

    def update(state, taps):
        after, metrics = TINY.update(state, taps)
        bad = state.step >= at
        if member is not None:
            bad = bad & jnp.isin(jnp.arange(3), jnp.asarray(member))
        return after, metrics | {"loss": jnp.where(bad, jnp.nan, metrics["loss"])}

    return Trainer(TINY.init, update)


def test_a_loss_that_is_not_finite_names_step_and_checkpoint(tmp_path):
    arguments = {"steps": 20, "chunk": 4, "checkpoint_every": 1, "directory": tmp_path}
    with pytest.raises(
        FloatingPointError,
        match=r"loss is not finite, first in the update of step 10 "
        r"\(chunk 8 \.\. 11\); the last checkpoint is .*step_00000008\.npz.* lower l",
    ):
        fit(spoiled(10), START, a_batch, **arguments)
    names = sorted(p.name for p in (tmp_path / "checkpoint").iterdir())
    assert names == ["step_00000004.npz", "step_00000008.npz"]
    assert lines(tmp_path)[-1]["loss"] is None
    with pytest.raises(FloatingPointError, match="none was saved"):
        fit(spoiled(0), START, a_batch, steps=3)


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    def update(state, taps):
        after, metrics = TINY.update(state, taps)
        worse = {"w": after.params["w"] / jnp.where(state.step == 7, 0.0, 1.0)}
        return after._replace(params=after.params | worse), metrics

    arguments = {"steps": 20, "chunk": 4, "checkpoint_every": 1, "directory": tmp_path}
    with pytest.raises(
        FloatingPointError, match=r"parameters are not finite, .* step 7"
    ):
        fit(Trainer(TINY.init, update), START, a_batch, **arguments)
    names = [p.name for p in (tmp_path / "checkpoint").iterdir()]
    assert names == ["step_00000004.npz"]


def test_members_that_are_lost_are_reported_once_and_the_others_go_on(tmp_path):
    arguments = {"steps": 12, "chunk": 3}
    with pytest.warns(
        UserWarning, match=r"members 0 \(step 5\), 2 \(step 5\) of 3"
    ) as w:
        done = fit(
            spoiled(5, (0, 2)), POPULATION, a_batch, directory=tmp_path, **arguments
        )
    assert len(w) == 1
    assert w[0].filename == __file__
    assert bits(done.params) == bits(fit(TINY, POPULATION, a_batch, **arguments).params)
    loss = [row["loss"] for row in lines(tmp_path)]
    finite = [row["finite"] for row in lines(tmp_path)]
    assert finite == [[True] * 3, *[[False, True, False]] * 3]
    assert loss[1][0] is None
    assert loss[1][1] == pytest.approx(loss[1][1])
    assert loss[3][2] is None
    with pytest.raises(FloatingPointError, match=r"for all 3 members, .* of step 5"):
        fit(spoiled(5, (0, 1, 2)), POPULATION, a_batch, **arguments)


def diverging():
    """The trainer, whose member of the largest rate diverges from step 5 on."""

    def update(state, taps):
        after, metrics = TINY.update(state, taps)
        bad = (state.step >= 5) & (state.hyper["rate"] > 0.1)
        worse = jnp.where(bad[:, None], jnp.inf, after.params["w"])
        return after._replace(params=after.params | {"w": worse}), metrics

    return Trainer(TINY.init, update)


def test_a_run_with_a_lost_member_goes_on_after_a_kill_with_the_same_bits(tmp_path):
    arguments = {"steps": 12, "chunk": 2, "checkpoint_every": 1}

    def killed(step):
        if step == 10:
            raise KeyboardInterrupt
        return a_batch(step)

    trainer = diverging()
    with pytest.warns(UserWarning, match=r"members 2 \(step 5\) of 3"):
        whole = fit(trainer, POPULATION, a_batch, directory=tmp_path / "a", **arguments)
    with (
        pytest.warns(UserWarning, match="the others go on"),
        pytest.raises(KeyboardInterrupt),
    ):
        fit(trainer, POPULATION, killed, directory=tmp_path / "b", **arguments)
    with pytest.warns(UserWarning, match=r"members 2 \(step 8\)"):  # and says it again
        again = fit(trainer, POPULATION, a_batch, directory=tmp_path / "b", **arguments)
    assert bits(again) == bits(whole)
    alone = fit(TINY, POPULATION, a_batch, steps=12, chunk=2)
    # Another program, which may round otherwise.
    good, same = jax.tree.map(lambda x: x[:2], (whole.params, alone.params))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), good, same)
    assert not np.isfinite(whole.params["w"][2]).any()
    rows = [
        [(row["step"], row["finite"]) for row in lines(tmp_path / name)]
        for name in ("a", "b")
    ]
    assert rows[0] == rows[1]
    assert rows[0][-1] == (12, [True, True, False])


@pytest.mark.slow
def test_controllers_at_their_bounds_are_reported_at_the_end(tmp_path):
    trainer = tiny(saturated=0.04)
    with pytest.warns(
        UserWarning, match=r"controller of members \[1, 2\] was sat"
    ) as w:
        fit(trainer, POPULATION, a_batch, steps=4, chunk=2, directory=tmp_path)
    assert len(w) == 1
    assert [row["saturated"] for row in lines(tmp_path)] == [[0.0, 1.0, 1.0]] * 2
    with pytest.warns(UserWarning, match="the controller was saturated"):
        fit(trainer, START, a_batch, steps=4, chunk=2)
    fit(tiny(saturated=1.0), START, a_batch, steps=4, chunk=2)  # -W error


def test_a_bar_only_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for terminal, progress, shown in (
        (Terminal(), True, True),
        (Terminal(), False, False),
        (io.StringIO(), True, False),
    ):
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")
        fit(TINY, START, a_batch, steps=4, chunk=2, progress=progress)
        fit(TINY, POPULATION, a_batch, steps=4, chunk=2, progress=progress)
        text = terminal.getvalue()
        said = ("4/4", "examples/s", "loss ", "lowest loss")
        assert all((word in text) == shown for word in said), text


def test_the_bar_says_what_is_wrong(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    arguments = {"steps": 4, "chunk": 2}
    with pytest.warns(UserWarning, match="saturated"):
        fit(tiny(saturated=0.04), POPULATION, a_batch, **arguments)
    assert "saturated 2 of 3" in sys.stderr.getvalue()
    assert "not finite" not in sys.stderr.getvalue()
    with pytest.warns(UserWarning, match="no longer finite"):
        fit(spoiled(0, (1,)), POPULATION, a_batch, **arguments)
    assert "not finite 1 of 3" in sys.stderr.getvalue()


def test_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    arguments = {"chunk": 2, "directory": tmp_path, "tensorboard": True}
    fit(TINY, POPULATION, a_batch, steps=4, **arguments)
    fit(TINY, POPULATION, a_batch, steps=6, **arguments)
    files = list((tmp_path / "tensorboard").iterdir())
    text = b"".join(path.read_bytes() for path in files)
    assert all(tag in text for tag in (b"loss/0", b"loss/2", b"examples_per_s"))
    with pytest.raises(ValueError, match="tensorboard=True needs a directory"):
        fit(TINY, START, a_batch, steps=4, tensorboard=True)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install \"toyfeat\[scripts\]\""):
        fit(TINY, POPULATION, a_batch, steps=8, **arguments)


@pytest.mark.parametrize("name", ["steps", "chunk", "keep", "checkpoint_every"])
@pytest.mark.parametrize("size", [0, -3, 2.0, True, None, "3"])
def test_sizes_are_checked(name, size):
    with pytest.raises(
        ValueError, match=f"fit: {name} must be an int .*, got {size!r}"
    ):
        fit(TINY, START, a_batch, **({"steps": 3} | {name: size}))


WIDE = Taps(np.ones((4, 7), np.float32), None, np.ones(4, np.float32))


@pytest.mark.parametrize(
    ("batches", "error", "match"),
    [
        (3, TypeError, "batches must be a function of the step to Taps, got 3"),
        (
            lambda s: np.ones((4, 6)),
            TypeError,
            r"batches\(0\) must return Taps, got nd",
        ),
        (lambda s: a_batch(s)._replace(acts=[1]), TypeError, "got acts = a list"),
        (lambda s: a_batch(s)._replace(weights=None), TypeError, "weights = a None"),
        (lambda s: a_batch(s)._replace(weights=np.ones(3)), ValueError, r"got shapes"),
        (
            lambda s: a_batch(s)._replace(grads=np.ones((16, 6))),
            ValueError,
            "grads \\[",
        ),
        (
            lambda s: a_batch(s) if s < 3 else WIDE,
            ValueError,
            r"keep their shapes .*\(16, 6\).* at step 2 and .*\(4, 7\).* at step 3",
        ),
        (
            Batches(lambda d, s: d, jnp.ones(3)),
            TypeError,
            r"take\(data, step\) must",
        ),
    ],
)
def test_batches_are_checked(batches, error, match):
    with pytest.raises(error, match=match):
        fit(TINY, START, batches, steps=6, chunk=2)


def test_an_error_of_batches_keeps_its_kind_and_says_where():
    def batches(step):
        return {0: a_batch(0), 1: a_batch(1)}[step]

    with pytest.raises(KeyError) as caught:
        fit(TINY, START, batches, steps=6, chunk=2)
    assert caught.value.__notes__ == ["fit: raised by batches(2)"]


def changed(change):
    def update(state, taps):
        return change(*TINY.update(state, taps))

    return Trainer(TINY.init, update)


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("trainer", "match"),
    [
        (changed(lambda s, m: (s, {"mse": m["loss"]})), r"a 'loss' .*, got \['mse'\]"),
        (changed(lambda s, m: (s, m["loss"])), "a 'loss' of shape"),
        (changed(lambda s, m: (s, {"loss": m["loss"][None]})), r"got \(1,\)"),
        (changed(lambda s, m: (s, m | {"seconds": m["loss"]})), "named 'seconds'"),
        (changed(lambda s, m: (s._replace(step=s.step + 1), m)), "add 1 to state.step"),
        (
            changed(lambda s, m: (s._replace(params={"w": s.params["w"]}), m)),
            r"\.params\['b'\] went from float32\[\] to None",
        ),
        (
            changed(lambda s, m: (s._replace(step=s.step.astype(jnp.float32)), m)),
            r"\.step went from int32\[\] to float32\[\]",
        ),
    ],
)
def test_a_trainer_that_breaks_the_contract_is_named(trainer, match):
    with pytest.raises(ValueError, match=match):
        fit(trainer, START, a_batch, steps=2)


def test_other_kinds_of_state_and_trainer():
    with pytest.raises(TypeError, match="wanted a TrainState, got a dict"):
        fit(TINY, {}, a_batch, steps=2)
    with pytest.raises(TypeError, match="wanted a Trainer, got a tuple"):
        fit((TINY.init, TINY.update), START, a_batch, steps=2)
    with pytest.raises(ValueError, match=r"state.step is 9, past steps = 2"):
        fit(TINY, START._replace(step=jnp.int32(9)), a_batch, steps=2)
    with pytest.raises(ValueError, match=r"the same step for all .* \[0 1 0\]"):
        fit(TINY, POPULATION._replace(step=jnp.array([0, 1, 0])), a_batch, steps=2)


def test_a_full_disk_stops_the_run_and_the_last_checkpoint_is_whole(
    tmp_path, monkeypatch
):
    arguments = {"steps": 12, "chunk": 2, "checkpoint_every": 1, "directory": tmp_path}
    fsync, calls = os.fsync, []

    def full(handle):
        calls.append(1)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"could not write .*step_00000006\.npz: No space"
    ):
        fit(TINY, START, a_batch, **arguments)
    names = sorted(p.name for p in (tmp_path / "checkpoint").iterdir())
    assert names == ["step_00000002.npz", "step_00000004.npz"]
    monkeypatch.undo()
    done = fit(TINY, START, a_batch, **arguments)
    assert bits(done) == bits(fit(TINY, START, a_batch, steps=12, chunk=2))
    assert [row["step"] for row in lines(tmp_path)] == [2, 4, 6, 8, 10, 12]


def test_metrics_that_cannot_be_written(tmp_path, monkeypatch):
    real = builtins.open

    def full(path, mode="r", *args, **kwargs):
        if mode == "ab":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", full)
    with pytest.raises(OSError, match=r"could not write .*metrics\.jsonl: No space"):
        fit(TINY, START, a_batch, steps=2, directory=tmp_path)


def test_sigterm_saves_at_the_border_and_exits_with_0(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    arguments = {"steps": 20, "chunk": 4, "directory": tmp_path}

    def batches(step):
        if step == 10:  # is fetched while the chunk from 4 to 8 is at work
            os.kill(os.getpid(), signal.SIGTERM)
        return a_batch(step)

    with pytest.raises(SystemExit) as caught:
        fit(TINY, START, batches, **arguments)
    assert caught.value.code == 0
    assert signal.getsignal(signal.SIGTERM) is before
    names = [p.name for p in (tmp_path / "checkpoint").iterdir()]
    assert names == ["step_00000008.npz"]
    done = fit(TINY, START, a_batch, **arguments)
    assert bits(done) == bits(fit(TINY, START, a_batch, steps=20, chunk=4))


def test_sigterm_in_a_fit_inside_of_a_fit(tmp_path):
    before = signal.getsignal(signal.SIGTERM)

    def inner(step, metrics):
        os.kill(os.getpid(), signal.SIGTERM)

    def outer(step, metrics):
        fit(
            TINY,
            START,
            a_batch,
            steps=9,
            chunk=2,
            directory=tmp_path / "a",
            on_chunk=inner,
        )

    with pytest.raises(SystemExit) as caught:
        fit(
            TINY,
            START,
            a_batch,
            steps=9,
            chunk=2,
            checkpoint_every=1,
            directory=tmp_path / "b",
            on_chunk=outer,
        )
    assert caught.value.code == 0
    assert signal.getsignal(signal.SIGTERM) is before
    names = [[p.name for p in (tmp_path / n / "checkpoint").iterdir()] for n in "ab"]
    assert names == [["step_00000004.npz"], ["step_00000002.npz"]]


def test_other_threads_leave_signals_alone(tmp_path):
    done = []
    arguments = {"steps": 4, "chunk": 2, "directory": tmp_path}
    thread = threading.Thread(
        target=lambda: done.append(fit(TINY, START, a_batch, **arguments))
    )
    thread.start()
    thread.join()
    assert int(done[0].step) == 4


def test_batches_that_remember(tmp_path):
    whole = fit(TINY, START, Stream(), steps=12, chunk=2)
    arguments = {"chunk": 2, "directory": tmp_path, "checkpoint_every": 2}
    fit(TINY, START, Stream(), steps=6, **arguments)
    assert bits(fit(TINY, START, Stream(), steps=12, **arguments)) == bits(whole)
    with pytest.raises(ValueError, match=r"step 12 in .* holds a state of batches"):
        fit(TINY, START, a_batch, steps=14, **arguments)

    class Half(Stream):
        restore = None

    with pytest.raises(
        TypeError, match=r"both state.. and restore.state., got only st"
    ):
        fit(TINY, START, Half(), steps=4)

    class Odd(Stream):
        def state(self):
            return {"a": (1, 2)}

    with pytest.raises(
        TypeError, match=r"must return JSON values .*, got \{'a': \(1, 2"
    ):
        fit(TINY, START, Odd(), steps=4)


def test_a_run_of_other_settings_is_named(tmp_path):
    arguments = {"chunk": 2, "directory": tmp_path}
    done = fit(TINY, START, a_batch, steps=4, **arguments)
    never = dict.__getitem__  # would raise
    assert bits(fit(TINY, START, never, steps=4, **arguments)) == bits(done)
    again = fit(TINY, done, a_batch, steps=6, **arguments)  # its own result is no other
    assert int(again.step) == 6
    slower = TINY.init(jax.random.key(0), rate=0.01)
    with pytest.raises(
        ValueError, match=r"other settings: rate was 0\.05.* and is 0\.0"
    ):
        fit(TINY, slower, a_batch, steps=8, **arguments)
    with pytest.raises(
        ValueError, match=r"hyper\['decay'\] is not in .*choose another d"
    ):
        fit(
            TINY, TINY.init(jax.random.key(0), decay=0.1), a_batch, steps=8, **arguments
        )
    with pytest.raises(
        ValueError, match=r"\.opt_state\.count is int32\[\] in .*, wanted int32\[3\]"
    ):
        fit(TINY, POPULATION, a_batch, steps=8, **arguments)
    for state, steps in ((START, 4), (START._replace(step=jnp.int32(7)), 8)):
        with pytest.raises(ValueError, match=r"has step 6, but this call goes from"):
            fit(TINY, state, a_batch, steps=steps, **arguments)
    with pytest.raises(FileExistsError, match=r"resume=False, but .* holds a run"):
        fit(TINY, START, a_batch, steps=8, resume=False, **arguments)
    assert [row["step"] for row in lines(tmp_path)] == [2, 4, 6]


def test_a_run_that_began_from_another_key_is_reported(tmp_path):
    arguments = {"chunk": 2, "directory": tmp_path}
    moved = START._replace(params=jax.tree.map(lambda x: x + 1, START.params))
    fit(TINY, START, a_batch, steps=4, **arguments)
    with pytest.warns(UserWarning, match="began from other parameters") as caught:
        again = fit(TINY, moved, a_batch, steps=6, **arguments)
    assert caught[0].filename == __file__
    assert bits(again) == bits(fit(TINY, START, a_batch, steps=6, chunk=2))
    fit(TINY, START, a_batch, steps=8, **arguments)  # still the run of START


def test_resume_false_starts_where_there_is_nothing(tmp_path):
    fit(TINY, START, a_batch, steps=4, chunk=2, directory=tmp_path, resume=False)
    assert [row["step"] for row in lines(tmp_path)] == [2, 4]


@pytest.mark.slow_cases
@pytest.mark.parametrize("start", [START, POPULATION], ids=["one", "population"])
def test_a_damaged_checkpoint_costs_steps_but_no_bits(tmp_path, start):
    arguments = {"chunk": 2, "checkpoint_every": 2, "directory": tmp_path}
    fit(TINY, start, on_device(), steps=8, **arguments)
    newest = tmp_path / "checkpoint" / "step_00000008.npz"
    newest.write_bytes(newest.read_bytes()[:-50])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 10, "lo')  # was killed in a line
    with pytest.warns(
        UserWarning, match=r"00000008\.npz cannot .* back to step 4"
    ) as w:
        done = fit(TINY, start, on_device(), steps=12, **arguments)
    assert w[0].filename == __file__
    assert bits(done) == bits(fit(TINY, start, on_device(), steps=12, chunk=2))
    assert [row["step"] for row in lines(tmp_path)] == [2, 4, 6, 8, 10, 12]
