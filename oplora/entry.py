"""Entry points of the experiments: Hydra's, with errors that a user can read."""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
USER_ERRORS = (HydraException, OmegaConfBaseException, ValueError, FileNotFoundError)


def experiment(name: str) -> Callable:
    """Decorate a main(cfg) whose config is configs/<name>.yaml.

    Wrong input ends with one line on stderr and exit code 2; a traceback is a bug of ours
    (OPLORA_TRACEBACK=1 shows it for wrong input too).
    """

    def decorate(main: Callable[[DictConfig], None]) -> Callable[[], None]:
        run = hydra.main(config_path=str(CONFIGS), config_name=name, version_base="1.3")(main)

        @functools.wraps(main)
        def entry() -> None:
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra re-raises instead of printing its own
            try:
                run()
            except USER_ERRORS as error:
                if os.environ.get("OPLORA_TRACEBACK"):
                    raise
                print(f"error: {_one_line(error)}", file=sys.stderr)
                sys.exit(2)

        return entry

    return decorate


def _one_line(error: Exception) -> str:
    cause = error
    while cause.__cause__ is not None and isinstance(cause, HydraException):
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return " ".join(lines)
