"""What the process does with memory that it has freed."""

import ctypes
import platform

_MOST = 2**31 - 1  # bytes; the C library takes an int
_OPTIONS = {-4: 0, -1: _MOST, -8: 1}  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX


def keep_memory() -> bool:
    """Keep what is freed for the next array, instead of giving it back at once.

    glibc returns every large array to the system when it is freed, and the next one of
    the same size is mapped again, page by page: a tenth of the time of a program on a
    CPU that returns gradients at all sites of a language model.  For processes that run
    one program again and again: its memory stays at the most it ever held, or 2 GiB
    above what is held now.  Call it first.  Accelerators are not concerned.

    Returns:
      Whether the C library of this system can (glibc).

    Example:
      >>> import subprocess, sys
      >>> code = "import toyfeat as tf; tf.keep_memory()"  # of a whole process
      >>> subprocess.check_call([sys.executable, "-c", code])
      0

    References:
      mallopt(3), the manual page of Linux.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return all(library.mallopt(name, value) == 1 for name, value in _OPTIONS.items())
