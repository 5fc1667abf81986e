"""How much memory there is, and what a process keeps of that which it frees."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils.memory import available_memory

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


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 2000),
        ({"memory.max": "1000000"}, 976),  # a container's own
        ({"jobs/memory.max": "max", "memory.max": "1536000"}, 1500),
        ({"jobs/one/memory.max": "512000", "jobs/memory.max": "1000000"}, 500),
        ({"memory/jobs/one/memory.limit_in_bytes": "512000"}, 500),  # of version 1
        ({"memory.max": "9223372036854771712"}, 2000),
    ],
)
def test_available_memory_heeds_the_limits_of_containers_and_jobs(
    tmp_path: Path, limits: dict[str, str], expected: int
) -> None:
    files = {"proc/meminfo": "MemTotal:  4000 kB\nMemAvailable:  2000 kB\n"}
    files["proc/self/cgroup"] = "4:memory:/jobs/one\n1:cpu:/\n0::/jobs/one\n"
    files.update({f"sys/fs/cgroup/{name}": f"{text}\n" for name, text in limits.items()})
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_memory(tmp_path) // 1024 == expected


def test_where_the_system_does_not_tell_no_memory_is_known(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
