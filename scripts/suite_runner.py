"""Runs the parts of a suite one after the other, each under a time limit, and writes down what became of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: Seconds from the interrupt that ends a part to its being killed.
GRACE = 8.0
#: With less than this many seconds left for it, a part is not started.
WORTHWHILE = 5.0
LOG_BYTES = 8 << 20
FAILURES = ("failed", "timeout")
RESULTS = (
    "suite.json",
    "junit-gpu.xml",
    "junit-gpu-alone.xml",
    "junit-cpu.xml",
    "kernels.jsonl",
    "steps.jsonl",
    "speed-of-light.md",
    "ncu.csv",
    "codegen.json",
)


@dataclass(frozen=True)
class Part:
    """One command of a suite.

    limit:       seconds until it is interrupted
    required:    the suite fails when it fails
    absent:      why it cannot run here; "" when it can
    output:      file of OUT that gets its stdout; None: the log
    result:      file of OUT that counts when the time was up: if the part has added to it, it is "cut short", which is no failure
    found:       the only exit code that is a failure: any other but 0, or no end in time, means that the tool cannot work here;
                 None: all but 0 are failures
    environment: variables in addition to the suite's
    """

    name: str
    command: list[str]
    limit: float
    required: bool = True
    absent: str = ""
    output: str | None = None
    result: str | None = None
    found: int | None = None
    environment: dict[str, str] = field(default_factory=dict)


class Suite:
    """Writes suite.json after each part, so that a suite that is killed leaves what it knew.

    out: folder of the results;   scratch: folder for caches, removed by the caller;   seconds: for all parts together
    """

    def __init__(self, out: Path, scratch: Path, form: str, seconds: float) -> None:
        self.out = out
        self.start = time.monotonic()
        self.end = self.start + seconds
        # What an earlier suite left must not count as this one's.
        for old in RESULTS:
            (out / old).unlink(missing_ok=True)
        self.log = (out / "suite.log").open("wb")
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.report: dict[str, Any] = {"schema": 1, "form": form, "started": started, "passed": False, "parts": []}
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            "PYTHONDONTWRITEBYTECODE": "1",
            # Compiled code starts cold, and none of it stays on the machine.
            "TRITON_CACHE_DIR": str(scratch / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        }

    def ask(self, program: str, *arguments: str, limit: float) -> dict[str, Any]:
        """The JSON object that a small Python program prints last; {"error": ...} when it does not."""
        command = [sys.executable, "-c", program, *arguments]
        try:
            done = subprocess.run(command, capture_output=True, timeout=limit, env=self.environment, cwd=ROOT, check=False)
            self.log.write(done.stderr)
            answer: dict[str, Any] = json.loads(done.stdout.decode().splitlines()[-1])
            return answer
        except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
            return {"error": f"{type(error).__name__}: {error}"}

    def run(self, part: Part) -> None:
        self.say(f"== {part.name}: {' '.join(part.command)}")
        begin = time.monotonic()
        limit = min(part.limit, self.end - begin - GRACE)
        if part.absent:
            status, reason = "absent", part.absent
        elif self.end - begin - GRACE < WORTHWHILE:
            status, reason = "skipped", "no time was left"
        else:
            status, reason = self._execute(part, limit)
        self.record(part.name, status, reason, time.monotonic() - begin, part.required)

    def record(self, name: str, status: str, reason: str, seconds: float, required: bool) -> None:
        """Add a part to the report. Absent tools and tools that cannot work here are said, not held against the code."""
        entry = {"name": name, "status": status, "reason": reason, "required": required, "seconds": round(seconds, 1)}
        self.report["parts"].append(entry)
        line = f"{name}: {status}{', ' + reason if reason else ''} ({seconds:.0f} s)"
        self.say(f"== {line}")
        print(line, flush=True)
        self._write()

    def say(self, line: str) -> None:
        self.log.write(line.encode() + b"\n")
        self.log.flush()

    def finish(self) -> int:
        """The exit code."""
        bad = [part["name"] for part in self.report["parts"] if part["required"] and part["status"] in FAILURES]
        self.report["passed"] = not bad
        self.report["complete"] = not any(part["status"] in ("cut short", "skipped") for part in self.report["parts"])
        self._write()
        self.say(f"== suite: {'passed' if not bad else 'failed: ' + ', '.join(bad)}")
        self.log.close()
        log = self.out / "suite.log"
        if log.stat().st_size > LOG_BYTES:
            log.write_bytes(b"(the beginning is left out)\n" + log.read_bytes()[-LOG_BYTES:])
        return 1 if bad else 0

    def _size(self, result: str | None) -> int:
        path = self.out / result if result else None
        return path.stat().st_size if path is not None and path.exists() else 0

    def _write(self) -> None:
        self.report["seconds"] = round(time.monotonic() - self.start, 1)
        (self.out / "suite.json").write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")

    def _execute(self, part: Part, limit: float) -> tuple[str, str]:
        stdout = (self.out / part.output).open("wb") if part.output else self.log
        before = self._size(part.result)
        try:
            code = _run(part.command, limit, stdout=stdout, stderr=self.log, env={**self.environment, **part.environment}, cwd=ROOT)
        finally:
            if stdout is not self.log:
                stdout.close()
        if code is None:
            if self._size(part.result) > before:
                return "cut short", f"after {limit:.0f} s; {part.result} has what was measured until then"
            return "timeout" if part.found is None else "unable", f"after {limit:.0f} s"
        if code == 0:
            return "passed", ""
        if part.found is not None and code != part.found:
            return "unable", f"exit code {code}: the tool could not work here, see suite.log"
        return "failed", f"exit code {code}, see suite.log"


def _run(command: list[str], limit: float, **options: Any) -> int | None:
    """Exit code, or None when the time was up. What the command started ends with it: it has a session of its own."""
    try:
        process = subprocess.Popen(command, start_new_session=True, **options)
    except OSError:
        return 127
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        # As Ctrl-C does: measurements keep what they have.
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def find_tool(name: str) -> str | None:
    """Path of a CUDA tool: on PATH, or where toolkits are installed."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    return shutil.which(name) or shutil.which(name, path=str(home / "bin"))
