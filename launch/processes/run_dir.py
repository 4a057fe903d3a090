"""A run directory: claimed by one supervisor at a time, and what is written there about its cluster.

The claim is a lock that the operating system drops when the supervisor ends, however that ends; its
children do not inherit it (Python's descriptors close on exec).  The lock file itself stays.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict, Field, ValidationError

STATE_FILE = "cluster.json"
LOCK_FILE = "lock"


class RunDirError(RuntimeError):
    """The message names the directory, what is wrong with it, and the remedy."""


class Claim:
    """The exclusive use of a run directory, until `release`."""

    def __init__(self, run_dir: Path):
        """Raises RunDirError when another process has claimed it, OSError when it cannot be written."""
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = os.open(run_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._file, 20).decode(errors="replace").strip()
            os.close(self._file)
            raise RunDirError(
                f"{run_dir}: a cluster runs there (process {holder or 'unknown'}); stop it, or name another "
                "directory"
            ) from None
        except OSError:
            os.close(self._file)
            raise
        if survivors := _survivors(run_dir):
            os.close(self._file)
            raise RunDirError(
                f"{run_dir}: a cluster runs there, without its supervisor: {survivors}; end them, or name "
                "another directory"
            )
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        os.ftruncate(self._file, 0)
        os.close(self._file)


class _Written(BaseModel):
    model_config = ConfigDict(frozen=True)


class ProcessState(_Written):
    pid: int | None = Field(None, gt=0, lt=2**31)
    """None while it is not running."""
    started_s: float = 0.0
    """psutil's creation time: tells the process from a stranger that got its number."""
    log: str
    restarts: int = 0
    """How often the supervisor has started it again."""
    last_end: str = ""
    """How it ended before it was started again."""
    silent: bool = False
    """It runs, but answers nobody."""

    @property
    def alive(self) -> bool:
        if self.pid is None:
            return False
        try:
            found = psutil.Process(self.pid)
            return found.create_time() == self.started_s and found.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


class ClusterState(_Written):
    """What runs where, for `dualpath status`."""

    name: str
    mode: str
    url: str
    scheduler: str | None
    scheduler_keys: tuple[Path, Path] | None = None
    """Key files of whoever asks it: a peer's secret key file and its public one."""
    engines: dict[str, str]
    """Name -> URL."""
    relays: dict[str, str] = {}
    """Name -> where prefill engines ask it."""
    processes: dict[str, ProcessState]

    def write(self, run_dir: Path) -> None:
        """Replaces the file in one step: a reader sees the old state or the new one."""
        staged = run_dir / f".{STATE_FILE}"
        staged.write_text(self.model_dump_json(indent=1))
        staged.replace(run_dir / STATE_FILE)


def read_state(run_dir: Path) -> ClusterState | None:
    """None when there is none.  Raises RunDirError when it cannot be read or is something else."""
    path = run_dir / STATE_FILE
    try:
        return ClusterState.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunDirError(f"{path}: {error.strerror}; name another --run-dir") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"])) or "file"
        raise RunDirError(
            f"{path}: is not what `dualpath up` writes ({field}: {first['msg'][:200]}); remove it and start "
            "the cluster again"
        ) from None


def _survivors(run_dir: Path) -> str:
    """Recorded processes that run although nobody holds the directory: name and number of each."""
    try:
        state = read_state(run_dir)
    except RunDirError:
        return ""
    found = state.processes.items() if state is not None else ()
    return ", ".join(f"{name} (process {process.pid})" for name, process in found if process.alive)
