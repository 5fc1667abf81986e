"""What the two programs, main.py and tool.py, are made of."""

import sys

# Said here, since `pip install -r requirements.txt` does not look, and older Pythons fail somewhere with a traceback.
if sys.version_info < (3, 10):  # noqa: UP036
    print(
        f"error: DBSNet needs Python 3.10 or newer, and {sys.executable} is {sys.version.split()[0]}; "
        "make an environment with a newer one: python3.12 -m venv .venv",
        file=sys.stderr,
    )
    raise SystemExit(2)
