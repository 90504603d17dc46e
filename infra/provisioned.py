"""Starts one of our processes on servers that hold what it needs: ``python -m infra.provisioned infra.worker [arguments]``.

Topics, schemas and tables are made before the first process of a stack runs, once per supervisor: the processes start at the same time,
one of them provisions and the others wait for it. Restarted processes find the mark and lose no time. The worker has its kernels loaded
before it joins its group: a kernel that must be compiled first (a changed checkout) would stop its event loop for a minute.
"""

from __future__ import annotations

import fcntl
import os
import runpy
import sys
from pathlib import Path

from infra.errors import MarketstreamError
from infra.settings import Settings, load_settings
from infra.stack.spec import start_ticks

WORKER = "infra.worker"
MARK = Path("run") / "provisioned"
"""In the data folder: pid and start time of the supervisor under which provisioning was done last; locked while it is done."""


def ensure_provisioned(settings: Settings, supervisor: tuple[int, int]) -> bool:
    """Provision unless it was done under this ``supervisor`` (pid, start ticks). Returns whether it was done now.

    Raises as :func:`infra.provision.provision` does.
    """
    mark = settings.data_dir / MARK
    mark.parent.mkdir(parents=True, exist_ok=True)
    with mark.open("a+", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.seek(0)
        if stream.read() == _text(supervisor):
            return False
        from infra.provision import provision  # 0.4 s of Kafka and ClickHouse clients, which only the first process needs for it

        provision(settings)
        stream.truncate(0)
        stream.write(_text(supervisor))
        return True


def _text(supervisor: tuple[int, int]) -> str:
    return f"{supervisor[0]} {supervisor[1]}\n"


def main() -> int:
    """Provision, then become the module on the command line; the exit code when provisioning fails."""
    module, *arguments = sys.argv[1:]
    try:
        parent = os.getppid()
        ensure_provisioned(load_settings(), (parent, start_ticks(parent) or 0))
        if module == WORKER:
            from infra.warm import warm

            warm()
    except MarketstreamError as exc:
        print(exc, file=sys.stderr)
        return exc.exit_code
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
