"""Runs the parts of a suite, each under a time limit, and writes down what became of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
#: Seconds from the interrupt that ends a part to its being killed.
GRACE = 8.0
#: With less than this many seconds left for it, a part is not started.
WORTHWHILE = 5.0
#: Seconds between looks at what runs.
LOOK = 0.05
LOG_BYTES = 8 << 20
FAILURES = ("failed", "timeout")
#: What is no failure, but leaves something undone that this machine could have done.
UNDONE = ("cut short", "skipped", "unable")
#: Patterns of what a suite leaves in OUT, besides its log.
RESULTS = (
    "suite.json",
    "junit-*.xml",
    "kernels.jsonl",
    "steps.jsonl",
    "speed-of-light.md",
    "traffic-*.md",
    "ncu-*.csv",
    "choices-sm_*.json",
    "tables-sm_*.json",
    "codegen.json",
)


@dataclass(frozen=True)
class Part:
    """One command of a suite.

    limit:       seconds until it is interrupted
    required:    the suite fails when it fails
    absent:      why it cannot run here; "" when it can
    output:      file of OUT that gets its stdout; None: the log
    result:      file of OUT that counts when the time was up: if the part has added to it, it is "cut short", which is no failure;
                 of one that lies elsewhere OUT gets a copy, FOLDER-NAME
    found:       the only exit code that is a failure: any other but 0, no end in time, or no test that ran, means that the tool was
                 unable to work; None: all but 0 are failures
    junit:       file in which the command leaves what became of its tests; None: it has none
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
    junit: Path | None = None
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
        for old in [path for pattern in RESULTS for path in out.glob(pattern)]:
            old.unlink()
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

    def run(self, *parts: Part) -> None:
        """Runs the parts side by side and returns when all of them have ended."""
        left = self.end - time.monotonic() - GRACE
        with ExitStack() as stack:
            running = []
            for part in parts:
                if part.absent or left < WORTHWHILE:
                    status, reason = ("absent", part.absent) if part.absent else ("skipped", "no time was left")
                    self.say(f"== {part.name}")
                    self.record(part.name, status, reason, 0.0, part.required)
                else:
                    running.append(stack.enter_context(Running(self, part, min(part.limit, left), alone=len(parts) == 1)))
            while running:
                for one in [one for one in running if one.ended()]:
                    running.remove(one)
                    one.close()
                    self.keep(one.part.result)
                    self.record(one.part.name, *one.outcome(), one.seconds, one.part.required, counted(one.part.junit))
                time.sleep(LOOK)

    def record(
        self, name: str, status: str, reason: str, seconds: float, required: bool, tests: Mapping[str, int] | None = None
    ) -> None:
        """Add a part to the report. Absent tools and tools that cannot work here are said, not held against the code.

        tests: as `counted`
        """
        entry = {"name": name, "status": status, "reason": reason, "required": required, "seconds": round(seconds, 1)}
        self.report["parts"].append({**entry, **({"tests": dict(tests)} if tests else {})})
        words = [status, *([reason] if reason else []), *([f"{count} {what}" for what, count in tests.items() if count] if tests else [])]
        line = f"{name}: {', '.join(words)} ({seconds:.0f} s)"
        self.say(f"== {line}")
        print(line, flush=True)
        self._write()

    def say(self, line: str) -> None:
        self.log.write(line.encode() + b"\n")
        self.log.flush()

    def finish(self) -> int:
        """The exit code."""
        bad = [part["name"] for part in self.report["parts"] if part["required"] and part["status"] in FAILURES]
        undone = [part["name"] for part in self.report["parts"] if part["status"] in UNDONE]
        self.report["passed"], self.report["complete"] = not bad, not undone
        self._write()
        line = f"suite: {'failed: ' + ', '.join(bad) if bad else 'passed'}{'; not complete: ' + ', '.join(undone) if undone else ''}"
        self.say(f"== {line}")
        print(line, flush=True)
        self.log.close()
        log = self.out / "suite.log"
        if log.stat().st_size > LOG_BYTES:
            log.write_bytes(b"(the beginning is left out)\n" + log.read_bytes()[-LOG_BYTES:])
        return 1 if bad else 0

    def size(self, result: str | None) -> int:
        """Bytes of a file of OUT; 0 where there is none."""
        path = self.out / result if result else None
        return path.stat().st_size if path is not None and path.exists() else 0

    def keep(self, result: str | None) -> None:
        """A copy in OUT of a result that lies elsewhere."""
        path = self.out / (result or "")
        if path.is_file() and not path.is_relative_to(self.out):
            shutil.copyfile(path, self.out / f"{path.parent.name}-{path.name}")

    def _write(self) -> None:
        self.report["seconds"] = round(time.monotonic() - self.start, 1)
        (self.out / "suite.json").write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")


class Running:
    """A part at work, and, as a context, the end of it and of all that it started: it has a session of its own.

    limit: seconds until it is interrupted;   alone: no other part runs meanwhile, so that its lines can go into the log as they come
    """

    def __init__(self, suite: Suite, part: Part, limit: float, alone: bool) -> None:
        self.suite = suite
        self.part = part
        self.limit = limit
        self.alone = alone

    def __enter__(self) -> Running:
        part, suite = self.part, self.suite
        self.before = suite.size(part.result)
        self.log: IO[bytes] = suite.log if self.alone else tempfile.TemporaryFile()
        self.output: IO[bytes] = (suite.out / part.output).open("wb") if part.output else self.log
        self.log.write(f"== {part.name}: {' '.join(part.command)}\n".encode())
        self.log.flush()
        self.begin = time.monotonic()
        self.seconds = 0.0
        self.late = self.closed = False
        environment = {**suite.environment, **part.environment}
        self.process: subprocess.Popen[bytes] | None = None
        with suppress(OSError):
            self.process = subprocess.Popen(
                part.command, start_new_session=True, stdout=self.output, stderr=self.log, env=environment, cwd=ROOT
            )
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def ended(self) -> bool:
        """Whether it has ended, by itself or as its time was up."""
        self.seconds = time.monotonic() - self.begin
        if self.process is None or self.process.poll() is not None:
            return True
        if self.seconds >= self.limit and not self.late:
            # As Ctrl-C does: measurements keep what they have.
            self.late = True
            os.killpg(self.process.pid, signal.SIGINT)
        return self.seconds >= self.limit + GRACE

    def close(self) -> None:
        """Ends what is left of it, and its output. Only once: later the number of the process may be another's."""
        if self.closed:
            return
        self.closed = True
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self.output is not self.log:
            self.output.close()
        if self.log is not self.suite.log:
            self.log.seek(0)
            shutil.copyfileobj(self.log, self.suite.log)
            self.log.close()

    def outcome(self) -> tuple[str, str]:
        """Status and reason."""
        part, code = self.part, 127 if self.process is None else self.process.returncode
        if self.late:
            if self.suite.size(part.result) > self.before:
                return "cut short", f"after {self.limit:.0f} s; {part.result} has what was measured until then"
            return "timeout" if part.found is None else "unable", f"after {self.limit:.0f} s"
        if code == 0:
            idle = part.found is not None and part.junit is not None and not counted(part.junit).get("ran")
            return ("unable", "no test ran under it") if idle else ("passed", "")
        if part.found is not None and code != part.found:
            return "unable", f"exit code {code}, and nothing found: the tool, or a test under it, does not work here, see suite.log"
        return "failed", f"exit code {code}, see suite.log"


def counted(junit: Path | None) -> dict[str, int]:
    """Tests that ran, those of them that failed, and those that were skipped, by what pytest has left; {} where it has left nothing."""
    try:
        suites = list(ElementTree.parse(junit).iter("testsuite")) if junit else []
    except (OSError, ElementTree.ParseError):
        return {}
    found = {name: sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")}
    failed = found["failures"] + found["errors"]
    return {"ran": found["tests"] - found["skipped"], "failed": failed, "skipped": found["skipped"]} if suites else {}


def find_tool(name: str) -> str | None:
    """Path of a CUDA tool: on PATH, or where toolkits are installed."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    return shutil.which(name) or shutil.which(name, path=str(home / "bin"))
