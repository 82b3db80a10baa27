"""The command ``toyfeat``, and the records of latents that it writes."""

import json

import jax
import pytest

from toyfeat.cli import main as command
from toyfeat.cli.doctor import describe_installation
from toyfeat.cli.main import main
from toyfeat.dictionary.latents import Latent
from toyfeat.jobs.hub import FetchError
from toyfeat.lm.contexts import Context
from toyfeat.processes import ProcessError
from toyfeat.report.records import latent_record, write_records


@pytest.mark.parametrize(
    "name",
    [
        "fetch",
        "collect",
        "decompose",
        "train",
        "evaluate",
        "report",
        "finetune",
        "lens",
        "doctor",
    ],
)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert f"toyfeat {name}" in capsys.readouterr().out


def test_the_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "doctor" in shown
    assert "three minutes" in " ".join(shown.split())


def test_what_a_user_can_mend_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"^toyfeat collect: .*nothing.toml"):
        main(["collect", str(tmp_path / "nothing.toml")])


@pytest.mark.parametrize(
    ("fault", "raised"),
    [
        (FetchError("no such model"), SystemExit),
        (ProcessError("another one failed"), SystemExit),
        (RuntimeError("of the program"), RuntimeError),
    ],
)
def test_a_fault_of_the_program_keeps_its_traceback(fault, raised, monkeypatch):
    def fail(names):
        raise fault

    monkeypatch.setattr("toyfeat.cli.steps.fetch_all", fail)
    with pytest.raises(raised, match=str(fault)):
        main(["fetch", "smollm2"])


def test_fetch_without_names_lists_what_there_is(capsys):
    main(["fetch"])
    assert "smollm2" in capsys.readouterr().out


def test_commands_keep_compiled_programs_where_the_user_says(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    command._keep_programs()
    assert jax.config.jax_compilation_cache_dir == before
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("TOYFEAT_CACHE", str(tmp_path))
    try:
        command._keep_programs()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "compiled")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_job_command_turns_the_cache_of_programs_on(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(command, "_keep_programs", lambda: calls.append("kept"))
    monkeypatch.setattr("toyfeat.cli.steps.collect", lambda job: calls.append(job.out))
    (tmp_path / "job.toml").write_text('out = "here"\n')
    main(["collect", str(tmp_path / "job.toml")])
    assert calls == ["kept", "here"]
    # The script is the same command.
    monkeypatch.setattr("sys.argv", ["collect.py", str(tmp_path / "job.toml")])
    command.run_script("collect", "its docstring")
    assert calls == ["kept", "here"] * 2


def test_doctor_says_versions_devices_memory_and_what_is_missing(capsys, monkeypatch):
    main(["doctor"])
    shown = capsys.readouterr().out
    for words in (f"jax {jax.__version__}", "device 0: cpu", "cores", "fetched files"):
        assert words in shown
    requires = ['equinox>=0.13; extra == "equinox"', 'none-such>1; extra == "odd"']
    requires += ['jax[cuda13]; extra == "cuda"']  # the devices say that
    monkeypatch.setattr("importlib.metadata.requires", lambda name: requires)
    lines = list(describe_installation())
    assert "extra equinox: there" in lines
    assert not any("extra cuda" in line for line in lines)
    assert 'extra odd: none-such missing; pip install "toyfeat[odd]"' in lines


def test_records_of_latents(tmp_path):
    context = Context(tokens=("the", " cat"), values=(0.5, 2.0), at=1, effect=0.25)
    latent = Latent(
        index=7,
        frequency=0.125,
        effect=0.5,
        activating=(context,),
        attributed=(context,),
        promoted=(" dog",),
        suppressed=(" the",),
        neighbours=((3, 0.75),),
    )
    about = {"model": "tiny", "site": "blocks_2/mlp_out", "source": "topk-8"}
    write_records(tmp_path / "latents" / "topk.json", [latent], **about)
    (record,) = json.loads((tmp_path / "latents" / "topk.json").read_text())
    assert record == latent_record(latent, **about)
    assert record["hookName"] == "blocks.2.hook_mlp_out"
    assert record["maxActApprox"] == 2.0
    (activation,) = record["activations"]
    assert activation["values"][activation["maxValueTokenIndex"]] == 2.0
    assert record["neighbours"] == [{"index": "3", "cosine": 0.75}]
