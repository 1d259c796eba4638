"""One folder per run: config.yaml and environment.json first, metrics.json last.

A run is finished exactly if its metrics.json is there; it is written in one step (temporary file,
then rename), so a killed run is never mistaken for a finished one. The folder's name ends in a
hash of `identity(config)`.
"""

import contextlib
import ctypes
import gc
import glob
import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

# of a method: how it is shown and swept
PRESENTATION = ("title", "role", "mlp", "family", "grid", "order")
# of a config: how, and what it is
NOT_COMPUTED = ("runtime", "title", "estimate", "licences", "diagnostics")
DIAGNOSTICS = "diagnostics.jsonl"  # in the folder of a run that has them
_PACKAGES = ("oplora", "torch", "transformers", "diffusers", "peft", "accelerate", "datasets")


class RunError(ValueError):
    """A run that cannot start; the message says why and what to do."""


class Run:
    """An open run: `path` is its folder; use as a context manager, which holds its lock.

    lock: None where another process owns the run and this one takes part: nothing is written.
    """

    def __init__(
        self, path: Path, finished: bool, lock: FileLock | None, file: str = "metrics.json"
    ):
        self.path, self.finished, self._lock, self._file = path, finished, lock, file

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, *_) -> None:
        """Release the lock; a run that failed before it wrote anything leaves no folder."""
        if self._lock is None:
            return
        if kind is not None and not self.finished:
            own = {"config.yaml", "environment.json", ".lock"}
            written = [p for p in self.path.iterdir() if not p.is_dir() or any(p.iterdir())]
            if {p.name for p in written} <= own:
                shutil.rmtree(self.path)
                for parent in list(self.path.parents)[:3]:
                    if parent.exists() and not any(parent.iterdir()):
                        parent.rmdir()
        self._lock.release()

    def part(self, name: str) -> "Run":
        """A run within this one, in a folder of its own, under the same lock.

        Its metrics are in part.json: only whole runs have a metrics.json.
        """
        path, file = self.path / name, "part.json"
        path.mkdir(parents=True, exist_ok=True)
        return Run(path, (path / file).exists(), self._lock, file)

    def metrics(self) -> dict[str, Any]:
        """What it was finished with."""
        return json.loads((self.path / self._file).read_text(encoding="utf-8"))

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write metrics.json; numbers that do not exist are None, never NaN or a sentinel."""
        if self._lock is None:
            return
        text = json.dumps(metrics, indent=1, allow_nan=False)
        write_atomically(self.path / self._file, text + "\n")
        self.finished = True


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that says what is computed.

    Left out are `runtime` (where and how to run), `diagnostics`, which only look on, titles,
    licences and a method's presentation, what a dry run estimates from, options that are null (a
    new option does not make earlier runs other ones), and of dotted names of our own code all but
    the last part (code may move).
    """
    config = {key: value for key, value in config.items() if key not in NOT_COMPUTED}
    if isinstance(method := config.get("method"), dict):
        config["method"] = {k: v for k, v in method.items() if k not in PRESENTATION}
    return _essential(config)


def _essential(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _essential(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_essential(each) for each in value]
    if isinstance(value, str) and value.startswith("oplora."):
        return value.rsplit(".", 1)[-1]
    return value


def run_folder(config: dict[str, Any]) -> Path:
    """runs_dir / experiment / preset / run_name-<hash>, all from the config."""
    mine = identity(config)
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()[:8]
    parent = Path(config["runtime"]["runs_dir"]) / config["experiment"] / config["preset"]
    path = parent / f"{config['run_name']}-{digest}"
    if not path.exists():  # a run from before the code moved has the hash of its time
        for earlier in sorted(parent.glob(f"{glob.escape(config['run_name'])}-????????")):
            with contextlib.suppress(ValueError):
                if identity(_read_yaml(earlier / "config.yaml") or {}) == mine:
                    return earlier
    return path


def open_run(config: dict[str, Any], folder: Path | None = None) -> Run:
    """The run of this config: new, cut (its files are kept, to resume from) or finished.

    RunError if the folder is not writable, is in use by another process or holds a run of
    another config. A folder whose files cannot be read is renamed, named on stderr, and replaced.
    """
    path = folder or run_folder(config)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"{path} is in use by another process: wait for it or stop it") from None
    except OSError as error:
        raise RunError(
            f"cannot write to {path} ({error.strerror}): choose another runtime.runs_dir"
        ) from None
    try:
        stored, metrics = _read_yaml(path / "config.yaml"), _read_json(path / "metrics.json")
    except ValueError as error:
        lock.release()
        aside = _set_aside(path)
        print(f"{error}; moved to {aside}, starting afresh", file=sys.stderr)
        return open_run(config, folder)
    if stored is not None and identity(stored) != identity(config):
        lock.release()
        difference = _difference(identity(stored), identity(config))
        raise RunError(f"{path} holds another run: {difference}")
    if metrics is None:
        shown = {key: value for key, value in config.items() if key != "runtime"}
        text = yaml.safe_dump(shown, sort_keys=False)
        write_atomically(path / "config.yaml", text)
        text = json.dumps(environment(), indent=1)
        write_atomically(path / "environment.json", text + "\n")
    reset_peak_memory()
    return Run(path, metrics is not None, lock)


@dataclass(frozen=True)
class Record:
    """A finished run as the report reads it."""

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: dict[str, Any]


def load_runs(root: Path) -> tuple[list[Record], list[str]]:
    """Finished runs below `root` in a fixed order, and a line for each folder left out.

    Of several runs of one config the first (by path) counts.
    """
    records, problems, seen = [], [], {}
    for config_path in sorted(Path(root).rglob("config.yaml")):
        path = config_path.parent
        if ".corrupt" in path.name:
            continue
        name = path.relative_to(root)
        try:
            config, metrics = _read_yaml(config_path), _read_json(path / "metrics.json")
            facts = _read_json(path / "environment.json") or {}
        except ValueError as error:
            problems.append(f"{name}: unreadable ({error})")
            continue
        if metrics is None:
            problems.append(f"{name}: not finished")
            continue
        key = json.dumps(identity(config), sort_keys=True)
        if key in seen:
            problems.append(f"{name}: the same config as {seen[key]}, not counted twice")
            continue
        seen[key] = name
        if facts.get("dirty"):
            problems.append(f"{name}: run from code with uncommitted changes")
        records.append(Record(path, config, facts, metrics))
    return records, problems


def environment() -> dict[str, Any]:
    """Versions, code revision and hardware: what a reader needs to judge a number."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None
    changed = _git("status", "--porcelain", "--", "oplora", "experiments", "configs")
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "revision": _git("rev-parse", "HEAD"),
        "dirty": None if changed is None else bool(changed),
    }


def peak_memory_bytes() -> int:
    """The most that this process has held: of GPU memory where there is one, else resident."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory() -> None:
    """Start counting anew, for several runs in one process; where the system allows it."""
    gc.collect()  # the last run's model may hang in a cycle
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory resident
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _read_json(path: Path) -> dict | None:
    if not path.exists():
        return None
    try:
        return _mapping(json.loads(path.read_text(encoding="utf-8")), path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _read_yaml(path: Path) -> dict | None:
    if not path.exists():
        return None
    try:
        return _mapping(yaml.safe_load(path.read_text(encoding="utf-8")), path)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {str(error).splitlines()[0]}") from None


def _mapping(value: Any, path: Path) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds no mapping")
    return value


def _set_aside(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.corrupt{number}")).exists():
        number += 1
    return path.rename(aside)


def _difference(stored: dict, wanted: dict) -> str:
    keys = [k for k in {**stored, **wanted} if stored.get(k) != wanted.get(k)]
    shown = ", ".join(f"{k} is {stored.get(k)!r} there and {wanted.get(k)!r} here" for k in keys)
    return f"{shown}. Delete the folder or choose another one"


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", Path(__file__).parents[2], *arguments], capture_output=True, text=True
        )
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
