"""The most memory that this process has held; for programs that are measured in a process of their own."""

from __future__ import annotations

import resource
from pathlib import Path


def peak() -> int:
    """Bytes since the process began.

    Linux's `ru_maxrss` begins with the size of the process that started this one, so the kernel's
    mark of the address space itself is read where there is one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
