"""Health check of a container: ``python -m infra.docker.probe URL`` asks URL and exits 0 for a 2xx answer, 1 for anything else.

The image has neither curl nor wget, and needs neither for this.
"""

from __future__ import annotations

import sys
import urllib.error
import urllib.request

TIMEOUT_S = 4.0
"""Less than the 5 s after which the container engine gives up on a check."""


def probe(url: str, timeout_s: float = TIMEOUT_S) -> tuple[bool, str]:
    """Whether ``url`` answers well, and what it said."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:
            return True, answer.read(2000).decode("utf-8", "replace")
    except urllib.error.HTTPError as exc:
        with exc:
            return False, f"{exc.code} {exc.read(2000).decode('utf-8', 'replace')}"
    except (urllib.error.URLError, OSError, ValueError) as exc:
        return False, str(exc)


def main() -> int:
    """Probe the URL on the command line; the exit status."""
    if len(sys.argv) != 2:
        print("usage: python -m infra.docker.probe URL", file=sys.stderr)
        return 2
    good, text = probe(sys.argv[1])
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
