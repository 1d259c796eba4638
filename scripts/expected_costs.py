"""What every paper preset needs on one GPU, by its dry run: results/benchmarks/paper_scale.json.

scripts/report.py renders it into docs/experiments.md.
"""

import argparse
import json
import runpy
from pathlib import Path

from hydra import compose, initialize_config_dir

from oplora.harness.entry import CONFIGS
from oplora.harness.runs import write_atomically
from oplora.report.titles import Scope

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("lora", "oplora", "dora", "opdora", "full")
TABLES = {  # their methods, and options of the largest runs
    "sdxl": (METHODS[:4], []),
    "commonsense": (METHODS[:4], []),
    "vl_bart": (METHODS, []),
    "llava_cars": (METHODS[:2], ["rank=64"]),
    "subjects": (METHODS[:4], []),
    "glue": (("vera", "opvera", *METHODS[:2]), ["task=qnli"]),
}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = []
    for experiment, (methods, options) in TABLES.items():
        script = runpy.run_path(str(ROOT / "experiments" / f"{experiment}.py"))
        for method in methods:
            overrides = [f"method={method}", "dry_run=true", *options]
            with initialize_config_dir(str(CONFIGS), version_base="1.3"):
                cfg = compose(experiment, overrides=overrides, return_hydra_config=True)
            numbers = {k: round(v) for k, v in script["main"].expected(cfg).items()}
            assumed = {k: cfg.estimate[k] for k in ("peak_tflops", "utilisation")}
            rows.append({"title": str(Scope(**cfg.title)), "method": method, **numbers, **assumed})
            print(json.dumps(rows[-1]))
    path = ROOT / "results" / "benchmarks" / "paper_scale.json"
    write_atomically(path, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
