"""For runs that nobody watches: what does not end is ended, and another process goes on with the rest.

A piece of work is noted in a file when it begins. If it takes too long, a watchdog ends the process, whatever that
waits for; a crash ends it too. A process that is started again leaves out what is noted. As a pytest plugin
(``-p unattended``) the pieces are tests. Without the variable for the file nothing is noted and nothing is ended.
"""

import faulthandler
import os
from pathlib import Path

VARIABLE = "LRKERNELS_NOTES"  # the file's path
END = "end of the run"
SECONDS = 30.0  # for one piece
stderr = os.dup(2)  # pytest puts a file in its place


class Notes:
    """What has begun, in this process and in those before it."""

    def __init__(self) -> None:
        self.path = Path(os.environ[VARIABLE]) if VARIABLE in os.environ else None
        self.before = self.path.read_text().splitlines() if self.path and self.path.exists() else []

    def _write(self, line: str) -> None:
        if self.path:
            with self.path.open("a") as file:
                file.write(line + "\n")

    def begin(self, name: str, seconds: float = SECONDS) -> None:
        """Note it, and have the process end unless something else begins in time."""
        self._write(name)
        if self.path:
            faulthandler.dump_traceback_later(seconds, exit=True, file=stderr)

    def end(self) -> None:
        """All is done."""
        if self.path:
            faulthandler.cancel_dump_traceback_later()
        self._write(END)


notes = Notes()


def pytest_collection_modifyitems(config, items):
    gone = [item for item in items if item.nodeid in notes.before]
    items[:] = [item for item in items if item.nodeid not in notes.before]
    config.hook.pytest_deselected(items=gone)


def pytest_runtest_protocol(item):
    notes.begin(item.nodeid)


def pytest_runtest_teardown(item):
    """Find the device's error in the test that made it; no later one survives it, so the rest needs a new process."""
    import torch

    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError as error:
        item.session.shouldstop = f"the device is lost: {error}"
        raise


def pytest_runtest_logreport(report):
    """Write what failed at once, should the end of the run not be reached."""
    if report.failed:
        os.write(stderr, f"\nFAILED {report.nodeid}\n{report.longreprtext}\n".encode())


def pytest_sessionfinish(session):
    if not session.shouldstop:
        notes.end()
