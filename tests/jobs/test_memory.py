import platform
import subprocess
import sys

import pytest

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_memory_that_is_kept_is_not_mapped_again():
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    first, second, kept, third, fourth = run.stdout.split()
    assert kept == "True"
    assert int(fourth) < 100
    assert min(int(first), int(second), int(third)) > 10 * (int(fourth) + 10)


def test_another_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_memory() is False
