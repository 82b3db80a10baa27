import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

# The threads of OpenBLAS, which does the small decompositions, wait by spinning: where
# every core runs a worker of the tests, that took thirty times the work itself.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# The tests compile thousands of small programs and run most of them once.  These make
# that cost half; child processes inherit them.  XLA_FLAGS= tests what users run.
if version("jaxlib") < "0.13":  # an unknown flag would end the process
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
    )

# Both workers, child processes and tests after a cleared cache compile much the same.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="toyfeat-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["TOYFEAT_TESTS_OF"] = str(os.getpid())  # who clears it away

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


def pytest_unconfigure():
    if os.environ.get("TOYFEAT_TESTS_OF") == str(os.getpid()):
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: pass --slow"))


_MAPPINGS = Path("/proc/self/maps")


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """A process may map 65,530 pieces of memory, of which a program takes several."""
    yield
    if _MAPPINGS.exists() and _MAPPINGS.read_bytes().count(b"\n") > 15_000:
        jax.clear_caches()


@pytest.fixture
def key():
    return jax.random.key(0)
