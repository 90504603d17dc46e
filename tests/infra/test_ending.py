"""A process ends within 5 s of the request, with code 0, whatever its threads wait for."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

HANGS = """
import asyncio, time
from infra.ending import on_request_to_end_loop

async def main():
    stopped = asyncio.Event()
    on_request_to_end_loop(asyncio.get_running_loop(), stopped.set)
    call = asyncio.create_task(asyncio.to_thread(time.sleep, 60))
    print("ready", flush=True)
    await stopped.wait()
    call.cancel()

asyncio.run(main())
"""
HANGS_OUTSIDE_A_LOOP = """
import time
from infra.ending import on_request_to_end

on_request_to_end(lambda: None)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("program", [HANGS, HANGS_OUTSIDE_A_LOOP], ids=["a thread of a loop", "the main thread"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_call_that_hangs_does_not_keep_a_process(program: str, number: signal.Signals) -> None:
    """A loop's end waits for its threads: the repair took over 20 s to end while the broker was stopped."""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            asked = time.monotonic()
            process.send_signal(number)
            _, told = process.communicate(timeout=30)
            took = time.monotonic() - asked
        finally:
            process.kill()
    assert process.returncode == 0 and took < 10, told
    assert "did not answer within" in told
