"""The shape of the repository: who may import whom, and what no file may contain."""

import ast
import subprocess
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "oplora").rglob("*.py"))
# Later layers may import earlier ones, never the other way round.
CORE = [
    "mlp",
    "rank1",
    "tensors",
    "rows",
    "stack",
    "saving",
    "optimizer",
    "adamw",
    "peft",
    "trainer",
]
EXPERIMENTS = [p.stem for p in (ROOT / "experiments").glob("*.py")]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_the_core_is_layered():
    for position, name in enumerate(CORE):
        used = imports(ROOT / "oplora" / f"{name}.py")
        allowed = {f"oplora.{earlier}" for earlier in CORE[:position]}
        ours = {u for u in used if u.startswith("oplora.") and u.count(".") == 1}
        assert ours <= allowed, name


@pytest.mark.parametrize("folder", ["data", "models", "metrics"])
def test_data_models_and_metrics_stand_alone(folder):
    """Data and metrics may look through a model's eyes, models know neither."""
    allowed = (f"oplora.{folder}", "oplora.models")
    for path in (ROOT / "oplora" / folder).rglob("*.py"):
        for used in imports(path):
            assert not used.startswith("oplora.") or used.startswith(allowed), path


def test_runs_and_report_need_no_torch():
    for path in [ROOT / "oplora/runs.py", *(ROOT / "oplora/report").rglob("*.py")]:
        for used in imports(path):
            assert used.split(".")[0] not in ("torch", "transformers", "peft"), path
            assert not used.startswith("oplora.") or used.startswith(
                ("oplora.runs", "oplora.report")
            ), path


def test_experiments_are_wiring():
    for name in EXPERIMENTS:
        path = ROOT / "experiments" / f"{name}.py"
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 150
        assert not any(used.startswith("experiments") for used in imports(path))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_choice_of_an_experiment_composes(experiment):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        presets = ["paper"] if experiment == "matrix_factorization" else ["paper", "small"]
        for preset in presets:
            chosen = [] if experiment == "matrix_factorization" else [f"preset={preset}"]
            config = compose(experiment, overrides=chosen)
            assert config.experiment == experiment and config.preset == preset


def tracked() -> list[Path]:
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    paths = [ROOT / name for name in names] if names else list(ROOT.rglob("*.*"))
    kinds = (".py", ".md", ".yaml", ".yml", ".toml", ".sh")
    return [p for p in paths if p.suffix in kinds and p.exists()]


def test_no_registry_host_and_no_unsafe_loading():
    hosts = ["py" + "pi.org", "pytorch" + ".org/whl", "npm" + "js.org", "python" + "hosted"]
    unsafe = ["trust_remote_code" + "=True", "weights_only" + "=False", "import " + "pickle"]
    for path in tracked():
        text = path.read_text(encoding="utf-8")
        for word in hosts + unsafe:
            assert word not in text, f"{path} contains {word}"


def test_base_models_name_no_path_of_a_machine():
    for path in (ROOT / "results" / "base_models").rglob("*config.json"):
        assert '"/' not in path.read_text(encoding="utf-8"), path  # at any depth
