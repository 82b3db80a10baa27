import atexit
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

# Tests after a cleared cache, and of the other worker, compile much the same.  Child
# processes do not: some are killed, which leaves half an entry.
if "TOYFEAT_TESTS_CACHE" not in os.environ:
    os.environ["TOYFEAT_TESTS_CACHE"] = tempfile.mkdtemp(prefix="toyfeat-tests-")
    atexit.register(shutil.rmtree, os.environ["TOYFEAT_TESTS_CACHE"], True)

import jax
import pytest

jax.config.update("jax_compilation_cache_dir", os.environ["TOYFEAT_TESTS_CACHE"])
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


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
