import hashlib
import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("huggingface_hub")
pytest.importorskip("safetensors")

from toyfeat.jobs.hub import HubName, hub_commit, hub_licence, hub_name

ROOT = Path(__file__).parents[2]
COMMIT = "a" * 40
CONFIG = {
    "model_type": "gpt2",
    "vocab_size": 5,
    "n_layer": 1,
    "n_embd": 4,
    "n_head": 2,
    "n_inner": 6,
    "n_positions": 8,
}
CARD = "---\nlicense: mit\n---\n# tiny\n"

# What a user would do, in the order of the results.
USER = """
import json, sys
from toyfeat.jobs import fetch, locate
from toyfeat.jobs.hub import hub_licence, hub_commit
from toyfeat.models.decoder import load_decoder

def said(run, name):
    try:
        path = run(name)
    except Exception as error:
        return [type(error).__name__, str(error)]
    kept = path.rglob("*") if path.is_dir() else [path]
    return [hub_licence(path), sorted(x.name for x in kept)]

found = [said(locate, "hub:them/tiny"), said(fetch, "hub:them/tiny")]
model = load_decoder(locate("hub:them/tiny"), tokenizer=False)
embedding = model.params["params"]["embed"]["embedding"]
name = hub_commit("hub:them/tiny@main", locate("hub:them/tiny@main"))
found += [model.config.layers, float(embedding.sum()), name]
for run, name in json.loads(sys.argv[1]):
    found.append(said({"fetch": fetch, "locate": locate}[run], name))
print(json.dumps(found))
"""


class Hub(BaseHTTPRequestHandler):
    """The parts of the hub that a download asks for."""

    def __init__(self, files, asked, *args):
        self.files, self.asked = files, asked
        super().__init__(*args)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        content, headers = self.content(path)
        self.asked.append(path)
        self.send_response(200 if content is not None else 404)
        content = content or b""
        for name, value in {**headers, "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def content(self, path):
        if path.startswith("/api/models/them/tiny/revision/"):
            names = [{"rfilename": name} for name in self.files]
            about = {"id": "them/tiny", "sha": COMMIT, "siblings": names}
            return json.dumps(about).encode(), {"Content-Type": "application/json"}
        if path.startswith("/api/models/them/tiny/tree/"):
            tree = [
                {"type": "file", "path": n, "size": len(x), "oid": digest(x)}
                for n, x in self.files.items()
            ]
            return json.dumps(tree).encode(), {"Content-Type": "application/json"}
        name = path.removeprefix(f"/them/tiny/resolve/{COMMIT}/")
        if name in self.files:
            content = self.files[name]
            return content, {"ETag": f'"{digest(content)}"', "X-Repo-Commit": COMMIT}
        return None, {"X-Error-Code": "RepoNotFound"}

    def log_message(self, *_):
        pass


def digest(content):
    return hashlib.sha1(content).hexdigest()


def shapes():
    yield "transformer.wte.weight", (5, 4)
    yield "transformer.wpe.weight", (8, 4)
    for name in ("h.0.ln_1", "h.0.ln_2", "ln_f"):
        yield f"transformer.{name}.weight", (4,)
        yield f"transformer.{name}.bias", (4,)
    for name, shape in {
        "attn.c_attn": (4, 12),
        "attn.c_proj": (4, 4),
        "mlp.c_fc": (4, 6),
        "mlp.c_proj": (6, 4),
    }.items():
        yield f"transformer.h.0.{name}.weight", shape
        yield f"transformer.h.0.{name}.bias", shape[1:]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Address and what was asked for; a model, and what nobody should download."""
    from safetensors.numpy import save

    tensors = {name: np.full(shape, 0.5, "f4") for name, shape in shapes()}
    files = {
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors": save(tensors),
        "README.md": CARD.encode(),
        "tiny-Q8_0.gguf": b"GGUF",
        "pytorch_model.bin": b"code",
        "onnx/model.safetensors": b"another",
        "onnx/config.json": b"{}",
    }
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, files, asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def user(address, home, *more):
    """What the user sees, in a process whose hub is at an address."""
    mine = {"HF_ENDPOINT": address, "HF_HOME": str(home), "JAX_PLATFORMS": "cpu"}
    mine |= {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    others = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    for name in ("NO_PROXY", "no_proxy"):
        others[name] = "127.0.0.1"
    done = subprocess.run(
        [sys.executable, "-c", USER, json.dumps(more)],
        env=others | mine,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.mark.slow
def test_a_model_is_fetched_once_with_nothing_that_is_not_wanted(hub, home):
    address, asked = hub
    before, fetched, layers, total, commit, *more = user(
        address,
        home,
        ("fetch", "hub:them/tiny/tiny-Q8_0.gguf"),
        ("fetch", "hub:them/tiny"),
        ("fetch", "hub:them/none"),
        ("fetch", "hub:them/tiny/small.gguf"),
        ("locate", "hub:tiny"),
        ("locate", "hub:them/tiny/tiny-Q8_0.gguf"),
    )
    assert before[0] == "FileNotFoundError"
    assert before[1].endswith("run: toyfeat fetch hub:them/tiny")
    wanted = ["README.md", "config.json", "model.safetensors"]
    assert fetched == ["mit", wanted]
    assert (layers, total) == (1, 10.0)
    assert commit == f"hub:them/tiny@{COMMIT}"
    gguf, again, none, no_file, odd, file = more
    assert gguf == ["mit", ["tiny-Q8_0.gguf"]]
    assert again == ["mit", sorted([*wanted, "tiny-Q8_0.gguf"])]
    assert none[0] == "FetchError"
    assert none[1].startswith("fetch: hub:them/none cannot be had: 404")
    assert no_file[0] == "FetchError"
    assert no_file[1].endswith("them/tiny has no small.gguf")
    assert file == gguf
    assert odd[0] == "ValueError"
    assert odd[1].startswith("hub: wanted hub:owner/name")
    files = [path.rpartition("/")[2] for path in asked if "/resolve/" in path]
    assert files.count("model.safetensors") <= 2  # a HEAD and a GET
    assert not {"pytorch_model.bin"} & set(files)
    assert not any("onnx" in path for path in asked if "/resolve/" in path)


@pytest.mark.slow
def test_what_was_fetched_is_there_without_a_network(hub, home):
    user(hub[0], home)
    found = user("http://127.0.0.1:9", home, ("fetch", "hub:them/other"))
    assert found[0][0] == "mit"  # locate
    assert found[5][0] == "FetchError"
    assert found[5][1].startswith("fetch: hub:them/other cannot be had: ")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("hub:a/b", ("a/b", None, None)),
        ("hub:a-1/b.c_2@main", ("a-1/b.c_2", None, "main")),
        ("hub:a/b/c.gguf", ("a/b", "c.gguf", None)),
        ("hub:a/b/layer_3/width_16k@0f", ("a/b", "layer_3/width_16k", "0f")),
        ("hub:a/b/d/c-Q4_1.gguf@0f", ("a/b", "d/c-Q4_1.gguf", "0f")),
        ("hub:a/b@refs/pr/1", ("a/b", None, "refs/pr/1")),
    ],
)
def test_names_are_taken_apart(name, parts):
    assert hub_name(name) == HubName(*parts)


@pytest.mark.parametrize(
    "name", ["hub:", "hub:a", "hub:a/b/c.bin", "hub:a/b@", "hub:/b", "a/b"]
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=r"hub: wanted hub:owner/name or .*, got '"):
        hub_name(name)


def test_a_model_without_a_card_says_no_licence(tmp_path):
    assert hub_licence(tmp_path) == "not said"
    for text in ("no entries at all", "---\n- a list\n---\n", "---\na: [b\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert hub_licence(tmp_path) == "not said"
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: free\n---\n"
    )
    assert hub_licence(tmp_path) == "free"


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("hub:a/b", "snapshots/0f"),
        ("hub:a/b/c.gguf", "snapshots/0f/c.gguf"),
        ("hub:a/b/d/e/c.gguf", "snapshots/0f/d/e/c.gguf"),
    ],
)
def test_results_say_which_commit_they_are_of(name, path):
    assert hub_commit(f"{name}@main", Path(path)) == f"{name}@0f"
