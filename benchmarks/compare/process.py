"""The other end of a worker: started, asked, and ended whatever it does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

#: Seconds from the end of a worker's output to the end of the worker.
CLOSING = 2.0


class WorkerError(RuntimeError):
    """The worker died, said nothing in time, or said what is no answer; the message tells which, with the end of its stderr.

    It is closed then.
    """


class Worker:
    """A process with JSON lines in and out.

    Starting does not wait for it, so two can start at once. It has a session of its own: a Ctrl-C at the terminal reaches only us, and
    closing it ends the processes that it started. `log` takes its stderr.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None, folder: Path | None = None) -> None:
        self._log, self._closed = log, False
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                env=environment,
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
        self._lines: Queue[str | None] = Queue()
        Thread(target=self._listen, daemon=True).start()

    def send(self, request: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(OSError, ValueError):  # A dead worker is told of by `receive`, which knows why.
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def receive(self, seconds: float) -> dict[str, Any]:
        """The next answer. Raises WorkerError."""
        try:
            line = self._lines.get(timeout=seconds)
        except Empty:
            raise self._failure(f"no answer within {seconds:g} s") from None
        if line is None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(CLOSING)
            raise self._failure(f"the process died ({_ending(self._process.poll())})")
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or "status" not in answer:
            raise self._failure(f"an answer that is none: {line.strip()[:200]!r}")
        return answer

    def close(self) -> None:
        """Ends the process, with all that it started; may be called twice."""
        if self._closed:
            return
        self._closed = True
        # The group outlives its leader as long as something that the worker started does.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()

    def _failure(self, what: str) -> WorkerError:
        last = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        self.close()
        return WorkerError(": ".join([what, *(line[:500] for line in last)]))

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout:
            for line in self._process.stdout:
                self._lines.put(line)
        self._lines.put(None)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"
