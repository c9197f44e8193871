"""The command `fictl`, also as ``python -m cluster``.

Its own imports are few, so that Ctrl-C while the rest is loaded ends it as later: exit code 130, and no word.
"""

import os
import signal
import types

INTERRUPTED = 130


def main() -> None:
    """Loads the command line and runs the verb that the process's arguments name; exits with its code."""
    # Not where it is ignored, as in a shell's background.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    from cluster.cli import main as fictl

    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        fictl()
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    finally:
        # While the interpreter ends, whoever waits there would print it.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: types.FrameType | None) -> None:
    # At once: an exception that comes up in the middle of an import may be taken for another one, or printed.
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
