import dataclasses
import re
from pathlib import Path

import pytest

from toyfeat.jobs import Attribution, Collect, Decompose, Evaluate, Job, Train, read_job
from toyfeat.jobs.results import list_runs

ROOT = Path(__file__).parents[2]


def read(tmp_path, text):
    path = tmp_path / "job.toml"
    path.write_text(text)
    return read_job(path)


def test_an_empty_file_is_the_default(tmp_path):
    assert read(tmp_path, "") == Job()
    assert read(tmp_path, "[collect]\n[train]\n[evaluate]\n") == Job()


def test_what_a_file_says_is_taken_and_the_rest_is_as_it_was(tmp_path):
    job = read(
        tmp_path,
        """
        model = "m"
        [collect]
        sites = ["a", "b"]
        tokens = 10
        start = 0
        [train]
        ks = [3]
        learning_rate = 1
        [evaluate]
        seed = 3
        """,
    )
    assert job == Job(
        model="m",
        collect=Collect(sites=("a", "b"), tokens=10, start=0),
        train=Train(ks=(3,), learning_rate=1.0),
        evaluate=Evaluate(seed=3),
    )
    assert type(job.train.learning_rate) is float
    hash(job)  # nothing in it can be changed


def test_every_entry_can_be_written(tmp_path):
    def toml(value):
        if isinstance(value, dict):
            return f"{{{', '.join(f'{k} = {toml(v)}' for k, v in value.items())}}}"
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, tuple):
            return f"[{', '.join(map(toml, value))}]"
        return f'"{value}"' if isinstance(value, str) else repr(value)

    plain, tables = [], []
    for name, value in dataclasses.asdict(Job()).items():
        if isinstance(value, dict):
            entries = (f"{k} = {toml(v)}" for k, v in value.items())
            tables.append("\n".join([f"[{name}]", *entries]))
        else:
            plain.append(f"{name} = {toml(value)}")
    assert read(tmp_path, "\n".join(plain + tables)) == Job()


def test_losses_are_tables_of_their_own(tmp_path):
    job = read(
        tmp_path,
        """
        source = "model"
        [decompose]
        bases = ["lib", "pca"]
        ranks = [3]
        [train]
        population = true
        [[train.attribution]]
        [[train.attribution]]
        name = "published"
        attribution_sparsity = 2
        penalty = "l1"
        form = "signed"
        """,
    )
    published = Attribution("published", 2.0, 0.1, "l1", "signed")
    assert job == Job(
        source="model",
        decompose=Decompose(bases=("lib", "pca"), ranks=(3,)),
        train=Train(population=True, attribution=(Attribution(), published)),
    )
    hash(job)


@pytest.mark.parametrize("name", ["smollm2", "smollm2_comparison"])
def test_the_examples_are_jobs(name):
    job = read_job(Path(__file__).parents[2] / "examples" / f"{name}.toml")
    assert job.site in job.collect.sites
    assert job.model == "smollm2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = ", "job.toml is not TOML"),
        ("model = 'a'\nmodel = 'b'", "job.toml is not TOML"),
        (
            "[train]\ncodes = [8]",
            "train has no entry 'codes'; .*ks",
        ),
        ("[train]\nks = []", "train, ks must not be empty"),
        ("modle = 'a'", "job.toml has no entry 'modle'; there are model, text, out,"),
        ("[collect]\ntoken = 1", "job.toml, collect has no entry 'token'; .*tokens"),
        ("[colect]", "has no entry 'colect'"),
        ("model = 3", "job.toml, model must be str, got 3"),
        ("collect = 3", r"job.toml, collect must be a table, \[collect\], got 3"),
        ("[model]\na = 1", "job.toml, model must be str, got {'a': 1}"),
        ("[collect]\ntokens = 1.5", "job.toml, collect, tokens must be int, got 1.5"),
        ("[collect]\ntokens = true", "collect, tokens must be int, got True"),
        ("[collect]\ntokens = '9'", "collect, tokens must be int, got '9'"),
        ("[collect]\nsites = 'a'", "collect, sites must be a list, got 'a'"),
        ("[collect]\nsites = ['a', 1]", "collect, sites must be str, got 1"),
        ("[train]\nks = [1, 2.0]", "train, ks must be int, got 2.0"),
        ("[train]\nlearning_rate = '1'", "train, learning_rate must be float, got '1'"),
        ("[train]\nlearning_rate = true", "learning_rate must be float, got True"),
        ("[evaluate]\nwindows = []", r"evaluate, windows must be int, got \[\]"),
        ("[evaluate]\nbatch = 0", "evaluate, batch must be at least 1, got 0"),
        ("[evaluate]\npair_batch = 0", "pair_batch must be at least 1, got 0"),
        ("[evaluate]\nuniform = -1", "uniform must be at least 0, got -1"),
        ("[collect]\nbatch = -3", "collect, batch must be at least 1, got -3"),
        ("[collect]\nheld_out = -1", "collect, held_out must be at least 0, got -1"),
        ("[collect]\nstart = -2", "collect, start must be at least -1, got -2"),
        ("[train]\nks = [8, 0]", "train, ks must be at least 1, got 0"),
        ("[collect]\ncompute = 'f4'", "compute must be float32 or bfloat16, got 'f4'"),
        ("[collect]\ndtype = 'float16'", "dtype must be float32 or bfloat16"),
        ("source = 'disk'", "source must be store or model, got 'disk'"),
        ("[decompose]\nbases = ['ica']", "bases must be pca or .* random, got 'ica'"),
        ("[decompose]\nranks = [0]", "decompose, ranks must be at least 1, got 0"),
        ("[train]\npopulation = 1", "train, population must be bool, got 1"),
        ("[train]\nattribution = 3", "train, attribution must be a list, got 3"),
        ("[train]\nattribution = [3]", r"attribution must be a table.*, got 3"),
        ("[train.attribution]\nname = 'a'", "train, attribution must be a list, got"),
        ("[[train.attribution]]\npenalty = 'l2'", "penalty must be geman_mcclure or"),
        ("[[train.attribution]]\nform = ''", "form must be positive or signed, got ''"),
        ("[[train.attribution]]\nweight = 1", "attribution has no entry 'weight'"),
        (
            "[[train.attribution]]\nunexplained = -1.0",
            "unexplained must be at least 0, got -1.0",
        ),
        ("[train]\nlearning_rate = nan", "learning_rate must be finite, got nan"),
        ("[train]\nlearning_rate = -1e-3", "learning_rate must be above 0, got -0.0"),
        ("[collect]\nmassive = 0.0", "massive must be above 0, got 0.0"),
        (f"[train]\nlearning_rate = 1{'0' * 400}", "learning_rate must be at most 9"),
        (f"[collect]\ntokens = 1{'0' * 30}", "collect, tokens must be at most 9"),
        ("model = " + "[" * 2000, "job.toml is not TOML"),
        ("[collect]\nseed = 4294967296", "seed must be at most 2147483647"),
        ("[train]\nseeds = [0, 4294967296]", "seeds must be at most 2147483647"),
        ("[collect]\nseed = -1", "seed must be at least 0, got -1"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=f"^read_job: .*{message}"):
        read(tmp_path, text)


def test_a_file_that_is_not_there_or_no_text(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"no {re.escape(str(path))}"):
            read_job(path)
    (tmp_path / "job.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"read_job: .*job\.toml is not TOML"):
        read_job(tmp_path / "job.toml")


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.toml")), ids=str)
def test_jobs_of_the_examples_can_be_read(path):
    job = read_job(path)
    names = [run.name for run in list_runs(job.train)]
    assert len(names) == len(set(names)) > 3
    assert job.out.startswith("out/")
