"""Processes to kill and to signal: forks of this one, which have imported all that they need."""

import contextlib
import multiprocessing
import os
import signal


@contextlib.contextmanager
def forked(function, *arguments):
    """A process that calls the function, leader of a group of its own; the group is killed when the block ends."""

    def lead():
        os.setpgid(0, 0)
        function(*arguments)

    process = multiprocessing.get_context("fork").Process(target=lead)
    process.start()
    with contextlib.suppress(PermissionError, ProcessLookupError):
        os.setpgid(process.pid, process.pid)  # whoever comes first
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
