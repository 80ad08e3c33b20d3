"""The program `qlora-jax`.

The status is 130 after Ctrl-C and 143 after SIGTERM, with one line on stderr. This
module is outside of the package, whose import takes a second.
"""

import signal
import sys
from importlib import metadata


def process() -> None:
    """Runs the program."""
    if sys.argv[1:] == ["--version"]:  # needs no JAX
        print("qlora-jax", metadata.version("qlora-jax"))
        return
    # `train` replaces this handler by its own, which saves a state.
    if signal.getsignal(signal.SIGTERM) != signal.SIG_IGN:
        signal.signal(signal.SIGTERM, terminate)
    try:
        from qlora_jax.llm.cli.main import run_program

        run_program()
    except KeyboardInterrupt:
        print("qlora-jax: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def terminate(number: int, frame: object) -> None:
    """Ends the process at SIGTERM, after unfinished files are deleted."""
    del frame
    print("qlora-jax: terminated", file=sys.stderr)
    sys.exit(128 + number)


if __name__ == "__main__":
    process()
