"""Requests to end a run early, e.g. by a signal."""

import os
import signal


class StopRequest:
    """Tells a run to stop; the run checks it between steps.

    Attributes:
      number: the number of the signal that asked for the stop; 0 if there was none.
    """

    def __init__(self):
        self.number = 0
        self._is_deferred = False

    def defer(self) -> None:
        """From now on, only notes a signal: the run checks for it and saves its state."""
        self._is_deferred = True

    def receive(self, number: int, _frame: object = None) -> None:
        """Handles a signal: notes it, or ends the process if there is nothing to save.

        A second signal ends the process at once. No exception is raised: libraries swallow those
        raised in the middle of an import or a callback.
        """
        if self.number:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.number = number
        if not self._is_deferred:
            os.write(2, b"Stopped; nothing was lost\n")
            os._exit(128 + number)
