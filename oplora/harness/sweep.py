"""What a sweep does about members that fail: the others go on, and all failed ones are named."""

import atexit
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from oplora.harness.entry import USER_ERRORS


class ListFailures(Callback):
    """Hydra callback: at the end of a multirun its failed members, and exit code 2 if there are.

    Hydra's sweeper raises the first failed member's error and says nothing of the others. Members
    may be other processes or machines: each failed one leaves a file in a folder beside the runs.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None  # pickled with this callback, so that members know it

    def on_multirun_start(self, config: DictConfig, **_) -> None:
        runs = Path(config.hydra.sweep.dir).resolve()
        runs.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix=".failed-", dir=runs))
        atexit.register(self._tell)  # also where a member was killed, which ends joblib's sweep

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_) -> None:
        if self._folder is None or job_return.status is not JobStatus.FAILED:
            return
        try:
            job_return.return_value  # noqa: B018 (raises the member's error)
        except Exception as error:
            if not isinstance(error, USER_ERRORS):
                traceback.print_exception(error)
            text = f"{' '.join(job_return.overrides)}: {type(error).__name__}: {error}"
            name = f"{config.hydra.job.num:05d}"
            (self._folder / name).write_text(" ".join(text.split()), encoding="utf-8")
        job_return.return_value, job_return.status = None, JobStatus.COMPLETED

    def on_multirun_end(self, config: DictConfig, **_) -> None:
        if self._tell():
            sys.exit(2)

    def _tell(self) -> int:
        """Print the failed members, once; their number."""
        if not self._folder.exists():
            return 0
        failed = [path.read_text(encoding="utf-8") for path in sorted(self._folder.iterdir())]
        shutil.rmtree(self._folder)
        (self._folder.parent / "multirun.yaml").unlink(missing_ok=True)  # Hydra's, of the last one
        if failed:
            print(f"{len(failed)} failed:", *failed, sep="\n  ", file=sys.stderr)
        return len(failed)
