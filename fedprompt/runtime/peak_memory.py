"""The largest resident memory of a process."""

from __future__ import annotations

import contextlib
import ctypes
import sys

from fedprompt.runtime.machine import PROC, kilobytes


def peak_memory(process: int | str = "self") -> int | None:
    """A process's largest resident memory in bytes, since its start or `reset_peak_memory`.

    Args:
        process: its id. Only Linux tells about other processes than this one.

    Returns:
        The bytes; None where the system does not tell, as on Windows.
    """
    # Preferred to `getrusage`: after an exec, that one counts the memory of the parent process too.
    peak = kilobytes(PROC / str(process) / "status", "VmHWM")
    if peak is not None:
        return peak * 1024
    if process != "self" or sys.platform == "win32":
        return None
    import resource  # not on Windows

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # In bytes on macOS, in units of 1024 bytes elsewhere.
    return used if sys.platform == "darwin" else used * 1024


def reset_peak_memory() -> None:
    """Let `peak_memory` start again from the memory that is in use now, where that is possible."""
    # The allocator keeps freed memory; without this, an earlier peak would stay resident.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with contextlib.suppress(OSError):
        # Writing 5 resets VmHWM, see proc(5).
        (PROC / "self/clear_refs").write_text("5")
