"""What the two programs, main.py and tool.py, are made of."""

import importlib.util
import sys

PACKAGES = {
    "numpy": "numpy",
    "torch": "torch",
    "PIL": "pillow",
    "tqdm": "tqdm",
    "yaml": "pyyaml",
    "cv2": "opencv-python-headless",
    "av": "av",
    "scipy": "scipy",
    "safetensors": "safetensors",
    "torchvision": "torchvision",
    "timm": "timm",
}
"""Names by which packages of requirements.txt are imported, and what they are called there. Those that only some tools
need, and that say so themselves, are left out."""


def not_installed(name: str) -> str:
    """What to say where a package of `PACKAGES` is missing altogether."""
    return f"error: {PACKAGES[name]} is not installed; pip install -r requirements.txt"


def _check() -> None:
    """Ends a program that cannot even begin: said here, since everything else imports these packages at its head."""
    words = None
    # `pip install -r requirements.txt` does not look at the version, and older Pythons fail somewhere with a traceback.
    if sys.version_info < (3, 10):  # noqa: UP036
        words = (
            f"error: DBSNet needs Python 3.10 or newer, and {sys.executable} is {sys.version.split()[0]}; "
            "make an environment with a newer one: python3.12 -m venv .venv"
        )
    else:
        for name in ("numpy", "torch", "PIL", "tqdm", "yaml", "safetensors"):  # the others are imported where used
            if name not in sys.modules and importlib.util.find_spec(name) is None:
                words = not_installed(name)
                break
    if words:
        print(words, file=sys.stderr)
        raise SystemExit(2)


_check()
