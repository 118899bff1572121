"""Programs for people: `python -m tools.NAME --help`."""

import os
import signal
import sys

if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    # A tool is about to be run: `cli.run` handles interrupts, and nothing is lost before.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
