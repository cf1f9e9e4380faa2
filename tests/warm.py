"""A Python that has imported mgtrain and torch: it forks where `python ...` would start, and import them for seconds.

What is forked is a process of its own, with its own process id, session, environment, folder and files, that ends as
Python ends. So are the ranks and the runs of a study that it starts. Tests of how Python starts (isolation, imports,
torchrun, `python -m`) start it really.

One server per test process has imported everything and computed nothing: it has one thread. It is told what to run in
lines of JSON, and tells process ids and, later, exit codes.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import pkgutil
import resource
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

Start = Callable[..., "subprocess.CompletedProcess[str]"]  # the fixture `mgtrain`
# What commands import late.
LATE = ("matplotlib.backends.backend_svg", "torch.utils.tensorboard", "torch.utils.flop_counter", "torchvision.io")


class Warm:
    """A process that runs `python *words`; its stdout and stderr go to files. Used as `subprocess.Popen` is."""

    def __init__(
        self, words: Sequence[object], cwd: Path, *, start_new_session: bool = False, largest_file: int | None = None
    ) -> None:
        self.returncode: int | None = None
        self.pid, self._said = _Server.running().start(
            words=list(map(str, words)),
            cwd=str(cwd),
            env=dict(os.environ),
            session=start_new_session,
            largest_file=largest_file,
        )

    def poll(self) -> int | None:
        """The exit code, if it has ended."""
        return self._ended(0)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for its end; what it wrote to stdout and stderr."""
        if self._ended(timeout) is None:
            raise subprocess.TimeoutExpired("python", timeout, stderr=self._said[1].read_bytes())
        out, err = (file.read_text(encoding="utf-8") for file in self._said)
        return out, err

    def errors(self) -> str:
        """What it has written to stderr so far."""
        return self._said[1].read_text(encoding="utf-8")

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it."""
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout: float) -> int | None:
        if self.returncode is None:
            self.returncode = _Server.running().exit_code(self.pid, timeout)
        return self.returncode


def run(words: Sequence[object], cwd: Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run `python *words` to its end."""
    process = Warm(words, cwd)
    try:
        out, err = process.communicate(timeout)
    finally:
        process.kill()
    assert process.returncode is not None
    return subprocess.CompletedProcess(list(map(str, words)), process.returncode, out, err)


class _Server:
    """The client's side of this process's server."""

    _running: _Server | None = None

    @classmethod
    def running(cls) -> _Server:
        if cls._running is None:
            cls._running = cls()
        return cls._running

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        quiet = {"TORCH_CPP_LOG_LEVEL": "FATAL"}  # as `launch` sets it for ranks; torch reads it when it is imported
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=os.environ | quiet,
            start_new_session=True,
        )  # fmt: skip
        theirs.close()
        self._socket, self._lines = ours, b""
        self._codes: dict[int, int] = {}
        self._folder, self._started = Path(tempfile.mkdtemp(prefix="warm-")), 0
        atexit.register(self._close)

    def start(self, **request: Any) -> tuple[int, tuple[Path, Path]]:
        """The id of a new process, and the files of its stdout and stderr."""
        files = self._folder / f"{self._started}.out", self._folder / f"{self._started}.err"
        self._started += 1
        for file in files:
            file.touch()
        self._socket.sendall(json.dumps({**request, "files": list(map(str, files))}).encode() + b"\n")
        while (pid := self._read()) is None:
            pass
        return pid, files

    def exit_code(self, pid: int, timeout: float) -> int | None:
        """The exit code of a process once it has ended, or None when the time is over."""
        deadline = time.monotonic() + timeout
        while pid not in self._codes:
            left = deadline - time.monotonic()
            if not select.select([self._socket], [], [], max(0.0, left))[0]:
                return None
            self._read()
        return self._codes.pop(pid)

    def _read(self) -> int | None:
        """Take in one line: the id of a process that was started, which is returned, or one that has ended."""
        while b"\n" not in self._lines:
            got = self._socket.recv(1 << 16)
            assert got, "the server of warm processes has ended"
            self._lines += got
        line, _, self._lines = self._lines.partition(b"\n")
        pid, code = json.loads(line)
        if code is None:
            return int(pid)
        self._codes[pid] = code
        return None

    def _close(self) -> None:
        self._socket.close()
        self.process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def serve(connection: socket.socket) -> None:
    """Fork a process for each request; kill what is left when the tests end."""
    import mgtrain

    for module in pkgutil.walk_packages(mgtrain.__path__, "mgtrain."):
        if not module.name.endswith(("__main__", "fused.kernels")):  # nor what needs Triton
            importlib.import_module(module.name)
    for name in LATE:
        importlib.import_module(name)
    assert threading.active_count() == 1
    gc.collect()
    gc.freeze()

    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    running: set[int] = set()
    lines = b""
    while True:
        ready, _, _ = select.select([connection, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                running.discard(ended[0])
                connection.sendall(json.dumps([ended[0], os.waitstatus_to_exitcode(ended[1])]).encode() + b"\n")
        if connection in ready:
            got = connection.recv(1 << 16)
            if not got:
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
                return
            lines += got
            while b"\n" in lines:
                line, _, lines = lines.partition(b"\n")
                request = json.loads(line)
                pid = os.fork()
                if not pid:
                    _become(**request)
                running.add(pid)
                connection.sendall(json.dumps([pid, None]).encode() + b"\n")


def _become(
    words: list[str],
    env: Mapping[str, str],
    session: bool,
    cwd: str | None = None,
    files: Sequence[str] = (),
    largest_file: int | None = None,
) -> NoReturn:
    """Be what `python *words` would be, in a forked process."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if session:
            os.setsid()
        for number, file in enumerate(files, 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
        os.closerange(3, 1 << 12)  # those of the server, and of a launcher
        if cwd is not None:
            os.chdir(cwd)
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        os.environ.clear()
        os.environ.update(env)
        for name in ("processes.distributed", "runs.study.jobs"):
            starts: Any = sys.modules[f"mgtrain.{name}"]
            starts.subprocess = types.SimpleNamespace(Popen=Rank, DEVNULL=subprocess.DEVNULL)
        code = _run(words)
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        code = 0 if end.code is None else end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                code = 120
        os._exit(code & 0xFF)


def _run(words: list[str]) -> int:
    """`python *words`, for `-m module`, `-c code` and a script."""
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(words[1], main.__dict__)
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")
    return 0


class Rank:
    """A rank or a study's run that a forked process starts, forked as well, used as `subprocess.Popen` is."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], start_new_session: bool, stdout: Any = None, **_: Any
    ) -> None:
        assert command[0] == sys.executable
        files = (stdout.name, stdout.name) if stdout else ()  # a study's run writes both to one file
        self.returncode: int | None = None
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self.pid = os.fork()
        if not self.pid:
            _become(list(command[1:]), env, start_new_session, files=files)

    def poll(self) -> int | None:
        """The exit code, if it has ended."""
        return self._wait(os.WNOHANG)

    def wait(self) -> int | None:
        """The exit code, once it has ended."""
        return self._wait(0)

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it."""
        self.send_signal(signal.SIGKILL)

    def _wait(self, flags: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, flags)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
