"""What a process keeps of the memory that it frees."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# What a process has of 96 MiB: before it frees them, afterwards, and when it has given back what it kept.
KEPT = """
import os, sys
from utils.memory import give_back_freed_memory, keep_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

if "keep" in sys.argv:
    keep_freed_memory()
before = resident()
block = bytearray(b"x") * (96 << 20)
held = resident() - before
del block
kept = resident() - before
give_back_freed_memory()
print(held, kept, resident() - before)
"""


@pytest.mark.skipif(
    "CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", {}), reason="another C library than glibc"
)
@pytest.mark.parametrize(
    ("arguments", "environment", "kept"),
    [(["keep"], {}, True), ([], {}, False), (["keep"], {"MALLOC_TRIM_THRESHOLD_": "131072"}, False)],
)
def test_freed_memory_stays_unless_the_user_has_settings_of_malloc(arguments, environment, kept):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    result = subprocess.run(
        [sys.executable, "-c", KEPT, *arguments],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    held, afterwards, given_back = map(float, result.stdout.split())
    assert held > 90
    assert (afterwards > 90) == kept
    assert given_back < 10
