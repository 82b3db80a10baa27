import platform

import pytest
from processes import run_python

from toyfeat.jobs.memory import keep_memory

PROGRAM = """
import resource
import numpy as np
from toyfeat.jobs.memory import keep_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(1 << 25)  # 256 MB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), faults(), keep_memory(), faults(), faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_memory_that_is_kept_is_not_mapped_again():
    done = run_python("-c", PROGRAM)
    assert done.returncode == 0, done.stderr
    first, second, kept, third, fourth = done.stdout.split()
    assert kept == "True"
    assert int(fourth) < 100
    assert min(int(first), int(second), int(third)) > 10 * (int(fourth) + 10)


def test_another_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_memory() is False
