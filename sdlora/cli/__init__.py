"""The command line: verbs over the functions that do the work. What is heavy is imported where it is used."""

import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from typing import NoReturn

from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError

from sdlora import __version__
from sdlora.cli import comparing, files, making
from sdlora.errors import SdloraError

app = App(
    name="sdlora",
    help="Train Stable Diffusion LoRAs, mix them, and know what they hold.",
    version=__version__,
    default_parameter=Parameter(negative_iterable=()),
    print_error=False,
    exit_on_error=False,
    suppress_keyboard_interrupt=False,
    result_action="return_value",
)
VERBS: dict[str, Callable[..., None]] = {
    "train": making.train,
    "generate": making.generate,
    "app": making.web_app,
    "demo": making.demo,
    "inspect": files.inspect,
    "convert": files.convert,
    "blend": files.blend,
    "resize": files.resize,
    "extract": files.extract,
    "merge": files.merge,
    "conflicts": comparing.conflicts,
}
for name, verb in VERBS.items():
    app.command(verb, name=name)

FAILED, INTERRUPTED = 2, 130  # exit codes


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command (None: that of this process). Whatever a person can mend is one line on stderr and exit code 2.

    What the terminal has no letters for is printed escaped: names of files may hold anything.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(sys.argv[1:] if argv is None else list(argv))
    except UnusedCliTokensError as error:
        tokens = " ".join(map(repr, error.unused_tokens or ()))
        _exit(FAILED, f"cannot tell what {tokens} is for; quote texts with spaces, and repeat a flag for each value")
    except (CycloptsError, SdloraError) as error:
        _exit(FAILED, str(error))
    except KeyboardInterrupt as interrupt:
        _exit(INTERRUPTED, str(interrupt) or "interrupted")


def _exit(code: int, why: str) -> NoReturn:
    from sdlora.cli.show import escaped

    print("sdlora:", escaped(" ".join(why.split())), file=sys.stderr)
    sys.exit(code)
