"""What the processes of a comparison say to one another, and who may run when."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import time
from typing import IO, Any


@dataclass(frozen=True)
class Task:
    """What a process is asked for.

    Attributes:
        args: What `lightning-sage fit` would be given.
        method: `dense`, `checkpointing`, the name of a preset, or `yours`.
        steps: Optimizer steps.
        turn: Steps in a row, before another method's.
        folder: For what callbacks of the user's own write.
    """

    args: list[str]
    method: str
    steps: int
    turn: int
    folder: str


class Parent:
    """In the child: the other end of its standard input and output, which nobody else gets.

    Attributes:
        turns: Begin and end of each turn, in seconds since the epoch.
    """

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        # a process that is forked here would keep the pipe open when this one is gone
        os.register_at_fork(after_in_child=self._out.close)
        # whatever is printed goes where the errors go
        os.dup2(2, 1)
        self.turns: list[list[float]] = []

    def task(self) -> Task:
        """What is to be done; the first thing that is read."""
        return Task(**json.loads(sys.stdin.readline()))

    def tell(self, kind: str, **values: Any) -> None:
        """One line of JSON."""
        self._out.write(json.dumps({"kind": kind, **values}) + "\n")

    def end_turn(self) -> None:
        """Note when the running turn ended."""
        if self.turns and len(self.turns[-1]) == 1:
            self.turns[-1].append(time())

    def wait_for_turn(self, step: int) -> None:
        """Say how many steps are done, and wait until the others have had their turn.

        Raises:
            SystemExit: The parent is gone.
        """
        self.end_turn()
        self.tell("turn", step=step)
        if not sys.stdin.readline():
            raise SystemExit("the comparison is over")
        self.turns.append([time()])


class Child:
    """In the parent: one method's process.

    Args:
        task: What it is to do.
        command: How to start it.
        log: File for all that it prints.

    Attributes:
        record: What is known of its method; complete when it has ended.
        step: Steps done.
        started: Whether it came as far as its first step.
        again: Whether it has only prepared what a fresh process then finds.
        code: Its exit status; None while it runs.
    """

    def __init__(self, task: Task, command: Sequence[str], log: Path) -> None:
        self.task, self.log = task, log
        self.record: dict[str, Any] = {"name": task.method, "steps": task.steps}
        self.step, self.started, self.again = 0, False, False
        self.code: int | None = None
        # the same modules as here are found there; in a group of its own, which can be ended whole
        # and which the terminal's Ctrl-C does not reach
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                bufsize=1,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,
            )
        self._send(json.dumps(asdict(task)))

    def _send(self, line: str) -> None:
        # one that has died meanwhile is found out by reading
        with suppress(BrokenPipeError):
            self._pipe(self._process.stdin).write(f"{line}\n")

    @staticmethod
    def _pipe(stream: IO[str] | None) -> IO[str]:
        assert stream is not None
        return stream

    def go(self) -> None:
        """Give it a turn."""
        self._send("go")

    def advance(self) -> bool:
        """Wait until it asks for a turn; False once it has ended instead."""
        finished = False
        for line in self._pipe(self._process.stdout):
            message = json.loads(line)
            kind = message["kind"]
            if kind == "turn":
                self.step, self.started = message["step"], True
                return True
            self.again |= kind == "again"
            finished |= kind == "result"
            self.record |= message.get("record", {})
        self.code = self._process.wait()
        if not finished:
            self.record |= self._death(self.code)
        return False

    def _death(self, code: int) -> dict[str, Any]:
        if code == -signal.SIGKILL:
            error = "killed by signal 9, as the system does to who takes too much host memory"
            return {"status": "killed", "error": error}
        last = [line for line in self.output().splitlines() if line.strip()][-1:]
        return {"status": "failed", "error": (last or ["it said nothing"])[0], "exit": code}

    def output(self) -> str:
        """All that it has printed."""
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """End it and what it has started; again is no error."""
        # what it has started may be there when it is gone itself
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):
                self._pipe(stream).close()


def take_turns(children: Sequence[Child], tell: Callable[[Child], None]) -> None:
    """Let processes that all ask for a turn run one at a time, round and round, until all ended.

    Args:
        children: Those that wait; one that ends, or dies, loses its turn only.
        tell: Called after every turn.
    """
    waiting = list(children)
    while waiting:
        for child in list(waiting):
            child.go()
            if not child.advance():
                waiting.remove(child)
            tell(child)
