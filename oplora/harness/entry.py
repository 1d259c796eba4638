"""Entry points of the experiments: Hydra's, with errors that a user can read."""

import functools
import json
import os
import sys
from collections.abc import Callable
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from oplora.harness.precision import use_in_configs

use_in_configs()
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SUMMARY = CONFIGS.parent / "results" / "published" / "report" / "summary.json"
NUMBERS = {  # options that are numbers: (whole ones alone?, the least)
    "rank": (True, 1),
    "mlp_width": (True, 0),
    "lr": (False, 0),
    "alpha": (False, 0),
    "dropout": (False, 0),
    "weight_decay": (False, 0),
    "runtime.threads": (True, 1),
}
FLAGS = ("diagnostics", "dry_run", "fine_tune", "measure", "score_test")
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
                checked(cfg)  # a failed member must not end the others: Hydra reports it afterwards
            else:
                _reported(checked, cfg)

        def checked(cfg: DictConfig) -> None:
            name_preset(cfg)
            check_values(cfg)
            if HydraConfig.get().mode != RunMode.MULTIRUN:
                tell_rate(cfg, name)
            main(cfg)

        run = hydra.main(config_path=str(CONFIGS), config_name=name, version_base="1.3")(job)

        @functools.wraps(main)
        def entry() -> None:
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra re-raises instead of printing its own
            if {"--help", "-h"} & set(sys.argv[1:]):
                print(commands(name))
            _reported(run)

        return entry

    return decorate


def commands(name: str) -> str:
    """What configs/<name>.yaml says of itself at its beginning: how it is started."""
    lines = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return "\n".join(line[2:] for line in takewhile(lambda line: line.startswith("#"), lines))


def tell_rate(cfg: DictConfig, experiment: str, summary: Path = SUMMARY) -> None:
    """Print the learning rate that the published sweep chose, where this run has another."""
    told = json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {}
    settings = told.get("rates", {}).get(experiment, {}).items()
    rates = next((rates for setting, rates in settings if _is_of(cfg, setting)), {})
    method = OmegaConf.select(cfg, "method.name")
    if method in rates and rates[method] != cfg.lr:
        print(f"lr={cfg.lr:g}; the published sweep's best for {method} is lr={rates[method]:g}")


def _is_of(cfg: DictConfig, setting: str) -> bool:
    """Is the run of this setting: a preset, and choices as "task=sst2"?"""
    preset, *choices = setting.split()
    chosen = (choice.split("=") for choice in choices)
    return cfg.get("preset") == preset and all(
        OmegaConf.select(cfg, f"{group}.name") == name for group, name in chosen
    )


def name_preset(cfg: DictConfig) -> None:
    """Complete `preset` where the chosen file of configs/preset/ is empty."""
    choices = HydraConfig.get().runtime.choices
    if "preset" in choices and not cfg.get("preset"):  # Hydra makes an empty file an empty group
        with open_dict(cfg):
            cfg.preset = choices["preset"]


def check_values(cfg: DictConfig) -> None:
    """ValueError that names an option whose value is of the wrong kind."""
    for name, (whole, least) in NUMBERS.items():
        value = OmegaConf.select(cfg, name)
        kinds = int if whole else int | float
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, kinds) or value < least
        ):
            kind = "a whole number" if whole else "a number"
            raise ValueError(f"{name}={value} must be {kind}, at least {least}")
    for name in FLAGS:
        if not isinstance(value := cfg.get(name, False), bool):
            raise ValueError(f"{name}={value} must be true or false")


def _reported(function: Callable, *arguments) -> None:
    try:
        function(*arguments)
    except USER_ERRORS as error:
        if os.environ.get("OPLORA_TRACEBACK"):
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)


def _one_line(error: BaseException) -> str:
    overrides = isinstance(error, HydraException)
    while isinstance(error, HydraException) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, MissingConfigException):
        name = Path(error.missing_cfg_file or "").name
        if near := get_close_matches(name, error.options or ()):
            return f"there is no {error.missing_cfg_file}: did you mean {' or '.join(near)}?"
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        group, _, rest = str(error.full_key).partition(".")
        if rest and not overrides:
            return f"this {group} is not for this experiment: it has no {error.full_key}"
        return f"there is no option {error.full_key!r}: --cfg job shows them all"
    text = " ".join(str(error).split())
    return text.partition(" Config search path:")[0]
