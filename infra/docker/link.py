"""Run once while the image is built: makes /app importable in /venv and installs the `marketstream` command, without build tools."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from infra.bootstrap import link_project

    link_project(str(ROOT), sys.executable)
