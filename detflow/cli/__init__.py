"""The `detflow` command, built on the SDK."""

import io
import signal
import sys
import threading

__all__ = ["main"]


def main() -> None:
    """Runs the command line and exits: 0, 1 (it failed) or 2 (bad usage).

    What went wrong is one line on stderr, with the remedy; violations are listed below it.
    """
    # Until there is something to end in order, Ctrl-C ends it as any program, without a word.
    is_main = threading.current_thread() is threading.main_thread()
    if is_main:
        interrupted = signal.signal(signal.SIGINT, signal.SIG_DFL)

    from typer.exceptions import Abort, TyperException

    from detflow.cli.app import app
    from detflow.cli.output import complain, complain_about
    from detflow.errors import DetflowError
    from detflow.local.running import StackError

    if is_main:
        signal.signal(signal.SIGINT, interrupted)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for LC_ALL=C and odd terminals

    try:
        code = app(standalone_mode=False)
    except TyperException as error:
        complain(f"{error.format_message().rstrip('.')}; see {_command(error)} --help")
        code = error.exit_code
    except DetflowError as error:
        complain_about(error)
        code = 1
    except StackError as error:
        complain(str(error))
        code = 1
    except (Abort, KeyboardInterrupt):
        code = 130
    except BrokenPipeError:
        # The reader, such as `head`, has had enough.
        sys.stdout = None
        code = 0
    except UnicodeEncodeError as error:
        complain(f"{error.object[:80]!r} cannot be written in {error.encoding}; use UTF-8")
        code = 2
    except OSError as error:
        complain(f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror))
        sys.stdout = None  # what could not be written is not tried again
        code = 1
    sys.exit(code or 0)


def _command(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return str(context.command_path) if context is not None else "detflow"


if __name__ == "__main__":
    main()
