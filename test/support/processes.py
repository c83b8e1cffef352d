"""How tests start processes."""

from __future__ import annotations

import signal


def interruptible() -> None:
    """As `preexec_fn`: a test run that ignores Ctrl-C (nohup, a background job) does not pass that on to the child."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
