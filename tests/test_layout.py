"""The shape of the repository: who may import whom, and what no file may contain."""

import ast
import subprocess
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "oplora"
# Later layers of the library may import earlier ones, never the other way round.
LIBRARY = [
    "arguments",
    "mlp",
    "rank1",
    "tensors",
    "rows",
    "stack",
    "dcp",
    "saving",
    "optimizer",
    "adamw",
    "scale",
    "diagnostics",
    "peft",
    "generators",
    "trainer",
]
STUDIES = ("hydra", "omegaconf", "diffusers", "datasets", "pandas", "matplotlib", "torchmetrics")
BUILDS_ON = {"subjects": "sdxl"}  # rooms that share a model with another one
ROOMS = sorted(path.name for path in (PACKAGE / "studies").iterdir() if any(path.glob("*.py")))
EXPERIMENTS = [p.stem for p in (ROOT / "experiments").glob("*.py")]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def of(*folders: str) -> list[tuple[Path, set[str]]]:
    """(file, what it imports) of all Python files in these folders of the repository."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert paths
    return [(path, imports(path)) for path in paths]


def ours(used: set[str]) -> set[str]:
    return {name for name in used if name.startswith(("oplora.", "base_models"))}


def within(name: str, *modules: str) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def test_the_library_is_layered():
    assert sorted(LIBRARY) == sorted(p.stem for p in PACKAGE.glob("*.py") if p.stem != "__init__")
    for position, name in enumerate(LIBRARY):
        allowed = [f"oplora.{earlier}" for earlier in LIBRARY[:position]]
        for used in ours(imports(PACKAGE / f"{name}.py")):
            assert within(used, *allowed), (name, used)


def test_the_library_knows_no_study():
    allowed = ["oplora.baselines", *(f"oplora.{name}" for name in LIBRARY)]
    flat = [(path, imports(path)) for path in PACKAGE.glob("*.py")]
    for path, used in [*flat, *of("oplora/baselines")]:
        assert not {name for name in used if name.split(".")[0] in STUDIES}, path
        assert all(within(name, *allowed) for name in ours(used)), path


def test_the_harness_knows_no_experiment():
    for path, used in of("oplora/harness"):
        assert not any(
            within(name, "oplora.studies", "oplora.report", "base_models") for name in used
        ), path


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_know_neither_one_another_nor_how_base_models_were_made(room):
    known = (room, BUILDS_ON.get(room))
    others = [f"oplora.studies.{name}" for name in ROOMS if name not in known]
    for path, used in of(f"oplora/studies/{room}"):
        assert not any(within(name, *others, "base_models", "experiments") for name in used), path


def test_every_experiment_has_a_room_and_its_script_enters_no_other():
    assert sorted(EXPERIMENTS) == ROOMS
    for name in EXPERIMENTS:
        rooms = filter(None, (name, BUILDS_ON.get(name)))
        allowed = ("oplora.harness", *(f"oplora.studies.{room}" for room in rooms))
        for used in ours(imports(ROOT / "experiments" / f"{name}.py")):
            assert within(used, *allowed), (name, used)


def test_runs_and_reports_need_no_torch():
    runs = PACKAGE / "harness" / "runs.py"
    frame = ("oplora.harness.runs", "oplora.report")
    rooms = [
        (path, imports(path), (*frame, f"oplora.studies.{path.parent.name}.report"))
        for path in PACKAGE.glob("studies/*/report.py")
    ]
    for path, used, allowed in [
        (runs, imports(runs), frame),
        *((path, used, frame) for path, used in of("oplora/report")),
        *rooms,
    ]:
        assert not {name for name in used if within(name, "torch", "transformers", "peft")}, path
        assert all(within(name, *allowed) for name in ours(used)), path


def test_only_tests_look_into_base_models():
    for path, used in of("oplora", "experiments", "scripts"):
        assert not any(within(name, "base_models") for name in used), path


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
