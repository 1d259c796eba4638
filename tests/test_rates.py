"""Published learning rates: told to scripts and to a run, and names that are spelt alike."""

import json
import subprocess
import sys
from pathlib import Path

from hydra.errors import MissingConfigException
from omegaconf import OmegaConf
from stored_runs import store_vl_bart

from oplora.harness import entry

ROOT = Path(__file__).resolve().parent.parent


def test_rates_of_the_published_sweeps(tmp_path):
    for lr, loss in ((1e-3, 0.5), (1e-2, 0.2), (1e-1, 0.4)):
        store_vl_bart(tmp_path / "vl_bart" / "small", "lora", lr, 0, loss)
    command = [sys.executable, str(ROOT / "scripts/rates.py"), "vl_bart", "--runs", str(tmp_path)]
    done = subprocess.run([*command, "lora"], capture_output=True, text=True)
    assert done.stdout == "lora=0.01\n"
    done = subprocess.run([*command, "lora", "oplora"], capture_output=True, text=True)
    assert done.returncode == 2 and "sweep_learning_rates.sh vl_bart method=oplora" in done.stderr


def test_names_that_are_not_known_are_told_with_those_that_are_spelt_alike(tmp_path):
    script = [sys.executable, str(ROOT / "scripts/rates.py")]
    for words, told in (
        (["vl_bart", "oplra"], "there is no oplra: did you mean oplora"),
        (["vl_brt", "--grids"], "there is no vl_brt: did you mean vl_bart?"),
        (["vl_bart", "--grids", "doora"], "there is no doora: did you mean dora"),
    ):
        done = subprocess.run([*script, *words], capture_output=True, text=True)
        assert done.returncode == 2 and told in done.stderr
    missing = MissingConfigException("In 'x': …", "method/oplra", ["lora", "oplora", "vera"])
    assert entry._one_line(missing) == "there is no method/oplra: did you mean oplora or lora?"


def test_a_run_is_told_the_rate_that_the_published_sweep_chose(tmp_path, capsys):
    told = tmp_path / "summary.json"
    cfg = OmegaConf.create({"preset": "small", "method": {"name": "lora"}, "lr": 1e-4})
    entry.tell_rate(cfg, "vl_bart", told)
    told.write_text(json.dumps({"rates": {"vl_bart": {"small": {"lora": 3e-3}}}}))
    entry.tell_rate(cfg, "sdxl", told)
    assert capsys.readouterr().out == ""
    entry.tell_rate(cfg, "vl_bart", told)
    cfg.lr = 3e-3
    entry.tell_rate(cfg, "vl_bart", told)
    words = "lr=0.0001; the published sweep's best for lora is lr=0.003\n"
    assert capsys.readouterr().out == words
