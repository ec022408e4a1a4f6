"""Exit codes, and how exceptions become one of them and a message."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import typer

from .console import error_console, escape

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

_CODES = "Exit codes: 0 done; 1 failed while running; 2 bad input or usage (nothing was run); 130 interrupted with Ctrl-C"
EXIT_CODES = f"{_CODES}, after the checkpoint was saved (--resume goes on)."
#: Of the commands that make many runs and keep what is finished.
EXIT_CODES_OF_MANY = f"{_CODES}, with what is done saved (the same command goes on)."

#: Module -> the extra that installs it.
EXTRAS = {
    "torchvision": "vision",
    "PIL": "vision",
    "pycocotools": "coco",
    "accelerate": "train",
    "matplotlib": "report",
    "jinja2": "report",
}

Command = TypeVar("Command", bound=Callable[..., Any])


class UserError(Exception):
    """Something the user has to change; the message is for the user."""


def guarded(command: Command) -> Command:
    """Turn what a command raises into a message on stderr and an exit code. Unforeseen exceptions keep their traceback (code 1)."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except UserError as error:
            _say("error", error)
            raise typer.Exit(BAD_INPUT) from None
        except KeyboardInterrupt as error:  # TrainingInterrupted is one
            _say("stopped", error if str(error) else KeyboardInterrupt("interrupted"))
            raise typer.Exit(INTERRUPTED) from None
        except OSError as error:
            _say("failed", error)
            raise typer.Exit(FAILED) from None
        except (RuntimeError, FloatingPointError) as error:
            # torch's own RuntimeErrors need their traceback; these say all there is to say.
            if type(error).__name__ not in ("TrainingDiverged", "NonFiniteError"):
                raise
            _say("failed", error)
            raise typer.Exit(FAILED) from None

    return run  # type: ignore[return-value]


@contextmanager
def checking_input() -> Iterator[None]:
    """Within it, ValueError, OSError, ImportError and BadDataError are the user's input being wrong."""
    from kdkernels.data.records import BadDataError

    try:
        yield
    except BadDataError as error:
        raise UserError(f"{error}\n--skip-bad goes on without these images") from error
    except (ValueError, OSError, ImportError) as error:
        raise UserError(str(error)) from error


def need(*modules: str) -> None:
    """Raises UserError naming the extras to install when a module is not there."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        extras = sorted({EXTRAS[module] for module in missing})
        raise UserError(f"this command needs {', '.join(missing)}: pip install 'kdkernels[{','.join(extras)}]'")


def check_backend() -> None:
    """Raises UserError with the reason when the backend that KDKERNELS_BACKEND names cannot run."""
    import torch

    from kdkernels import backend

    try:
        backend.resolve("attention", [torch.zeros(1, 1, 1, 1)])
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from error


def _say(label: str, error: BaseException) -> None:
    text = str(error)
    error_console().print(f"[bold red]{label}[/]{': ' if text else ''}{escape(text)}", soft_wrap=True, highlight=False)
