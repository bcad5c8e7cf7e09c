"""What a command shows: results on stdout, everything else (progress, messages, errors) on stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rep_fast.errors import RepFastError

# Without a terminal rich assumes 80 columns, which cuts tables that a file could hold.
_PIPED_WIDTH = 140
_PIPED_REPORT_S = 30.0


class Screen:
    """One command's output.

    Attributes:
        as_json: results are one JSON object instead of tables.
        debug: tracebacks are wanted.
        interrupted: sentence shown on Ctrl-C; commands set it to say what is kept.
        warnings: every warning shown so far.
    """

    def __init__(self, *, as_json: bool = False, debug: bool = False) -> None:
        self.as_json = as_json
        self.debug = debug
        self.interrupted = "interrupted; nothing was written"
        self.warnings: list[str] = []
        self._out = _console(sys.stdout)
        self._messages = _console(sys.stderr)
        self._bars: Progress | None = None
        self._tasks: dict[str, Any] = {}
        self._last_line: dict[str, float] = {}

    def show(self, *things: Any) -> None:
        """A result for people: to stdout, unless JSON is wanted there."""
        self.end_progress()
        if not self.as_json:
            self._out.print(*things)

    def answer(self, data: dict[str, Any]) -> None:
        """The result for machines: exactly one JSON object, with `--json` only."""
        self.end_progress()
        if self.as_json:
            sys.stdout.write(json.dumps(data, ensure_ascii=False, allow_nan=False, indent=1) + "\n")
            sys.stdout.flush()

    def say(self, text: str) -> None:
        """A message about the work."""
        self._messages.print(text, markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A warning, shown once."""
        if text not in self.warnings:
            self.warnings.append(text)
            self.say(f"warning: {text}")

    def progress(self, label: str, done: int, total: int | None) -> None:
        """How far a long step is; a bar with the time left on a terminal, a line now and then elsewhere."""
        if not self._messages.is_terminal:
            self._progress_line(label, done, total)
            return
        if self._bars is None:
            self._bars = _bars(self._messages)
            self._bars.start()
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(label, total=total)
        self._bars.update(self._tasks[label], completed=done, total=total)

    def _progress_line(self, label: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if label not in self._last_line:
            self._last_line[label] = now
            self.say(f"{label} …")
        elif now - self._last_line[label] > _PIPED_REPORT_S:
            self._last_line[label] = now
            self.say(f"{label}: {done}" + ("" if total is None else f" of {total}"))

    def end_progress(self) -> None:
        """Take the bars away, so that what follows stands on clean lines."""
        if self._bars is not None:
            self._bars.stop()
            self._bars, self._tasks = None, {}


@contextlib.contextmanager
def opened(*, as_json: bool = False, debug: bool = False) -> Iterator[Screen]:
    """A screen for one command; errors become one sentence and exit status 1, with `debug` also the traceback."""
    screen = Screen(as_json=as_json, debug=debug)
    try:
        with _warnings_on(screen):
            yield screen
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        screen.end_progress()
        screen.say(screen.interrupted)
        raise typer.Exit(1) from None
    except RepFastError as error:
        _fail(screen, f"error: {error}")
    except (typer.BadParameter, BrokenPipeError):
        raise
    except Exception as error:  # a defect of ours: still one sentence, and the way to the rest
        hint = "" if debug else "; run again with --debug to see where"
        _fail(screen, f"unexpected error: {type(error).__name__}: {_first_line(error)}{hint}")
    finally:
        screen.end_progress()


def _fail(screen: Screen, sentence: str) -> None:
    screen.end_progress()
    if screen.debug:
        screen.say(traceback.format_exc())
    screen.say(sentence)
    raise typer.Exit(1)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


@contextlib.contextmanager
def _warnings_on(screen: Screen) -> Iterator[None]:
    """Warnings and log records of this package appear as sentences, those of others only with `--debug`."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            screen.warn(record.getMessage())

    def show(message: Warning | str, category: type[Warning], filename: str, *_: Any) -> None:
        ours = "rep_fast" in filename or "rep-fast" in filename
        if screen.debug or (ours and not issubclass(category, DeprecationWarning)):
            screen.warn(str(message))

    handler, logger = Handler(logging.WARNING), logging.getLogger("rep_fast")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show  # type: ignore[assignment]
            yield
    finally:
        logger.removeHandler(handler)


def _console(stream: Any) -> Console:
    console = Console(file=stream, highlight=False)
    return console if console.is_terminal else Console(file=stream, width=_PIPED_WIDTH, highlight=False)


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
