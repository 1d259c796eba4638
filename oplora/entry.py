"""Entry points of the experiments: Hydra's, with errors that a user can read."""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
USER_ERRORS = (
    HydraException,
    OmegaConfBaseException,
    ValueError,
    FileNotFoundError,
    FloatingPointError,  # a run that diverged
)


def experiment(name: str) -> Callable:
    """Decorate a main(cfg) whose config is configs/<name>.yaml.

    Wrong input ends with one line on stderr and exit code 2; a traceback is a bug of ours
    (OPLORA_TRACEBACK=1 shows it for wrong input too).
    """

    def decorate(main: Callable[[DictConfig], None]) -> Callable[[], None]:
        @functools.wraps(main)
        def job(cfg: DictConfig) -> None:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                main(cfg)  # a failed member must not end the others: Hydra reports it afterwards
            else:
                _reported(main, cfg)

        run = hydra.main(config_path=str(CONFIGS), config_name=name, version_base="1.3")(job)

        @functools.wraps(main)
        def entry() -> None:
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra re-raises instead of printing its own
            _reported(run)

        return entry

    return decorate


def _reported(function: Callable, *arguments) -> None:
    try:
        function(*arguments)
    except USER_ERRORS as error:
        if os.environ.get("OPLORA_TRACEBACK"):
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)


def _one_line(error: BaseException) -> str:
    while isinstance(error, HydraException) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        return f"there is no option {error.full_key!r}: --cfg job shows them all"
    text = " ".join(str(error).split())
    return text.partition(" Config search path:")[0]
