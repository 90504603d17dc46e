"""`make lock`: the dependencies of ``pyproject.toml`` in, every version with its hashes into ``requirements/``, no index address.

``bench`` is resolved by itself: one of the programs we measure beside us needs an older Kafka client than ours.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCKS = {
    "run": ("pyproject.toml",),
    "dev": ("pyproject.toml", "--group", "dev"),
    "bench": ("--group", "bench"),
}
FLAGS = ("--universal", "--generate-hashes", "--no-emit-index-url", "--no-annotate", "--no-header", "--quiet", "--python-version", "3.11")


def main() -> int:
    """Write every lock; the exit status of the first resolution that fails."""
    uv = str(Path(sys.executable).with_name("uv"))
    for name, source in LOCKS.items():
        target = f"requirements/{name}.txt"
        status = subprocess.run([uv, "pip", "compile", *source, *FLAGS, "--output-file", target], cwd=ROOT, check=False).returncode
        if status != 0:
            return status
        print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
