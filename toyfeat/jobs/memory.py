"""Set the C library's memory allocator to keep freed memory."""

import ctypes
import platform

# Options of mallopt and their values, which are C ints.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # from <malloc.h>
_OPTIONS = {
    _M_MMAP_MAX: 0,  # no array gets a mapping of its own
    _M_TRIM_THRESHOLD: 2**31 - 1,  # bytes; the largest int, so almost never trim
    _M_ARENA_MAX: 1,  # one heap for all threads
}


def keep_memory() -> bool:
    """Keep freed memory for the next array instead of returning it to the system.

    glibc returns every large array to the system when it is freed, and the next one of
    the same size is mapped again, page by page.  On a CPU that costs a program that
    returns gradients at all sites of a language model some of its time (figures in
    docs/decisions/language.md).  Use it in a process that runs one program again and
    again, and call it first: memory then stays at its peak, up to 2 GiB above what is
    in use. It has no effect on accelerators.

    Returns:
      Whether the settings were made; false where the C library is not glibc.

    Example:
      >>> import subprocess, sys
      >>> code = "from toyfeat.jobs.memory import keep_memory; keep_memory()"
      >>> subprocess.check_call([sys.executable, "-c", code])
      0

    References:
      mallopt(3), the manual page of Linux.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return all(library.mallopt(name, value) == 1 for name, value in _OPTIONS.items())
