"""The audit re-derives the published tables, and finds a number that is not the runs'."""

import ast
import importlib.util
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TABLES = ROOT / "results" / "published" / "report" / "tables"
SCRIPT = ROOT / "scripts" / "audit.py"


@pytest.fixture(scope="module")
def audit():
    spec = importlib.util.spec_from_file_location("audit", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    runs = module.read(module.PUBLISHED)  # once: the tests only change tables
    module.read = lambda folder: runs
    return module


def test_the_published_tables_are_what_the_runs_say(audit, capsys):
    assert audit.main([]) == 0, capsys.readouterr().out
    told, runs = capsys.readouterr().out.split(" numbers of ")
    assert int(told) > 60 and int(runs.split()[0]) == len(audit.read(None))


@pytest.mark.parametrize(
    ("table", "old", "new"),
    [
        ("vl_bart_small", "(10)", "(11)"),  # a mean's seeds
        ("vl_bart_small_rates", "*", ""),  # a chosen rate
        ("mf_summary", "0.06", "0.05"),
        ("which", "±", "+-"),
        ("price_small_training", "4%", "5%"),
    ],
)
def test_a_number_that_is_not_the_runs_is_found(audit, tmp_path, capsys, table, old, new):
    shutil.copytree(TABLES, tmp_path / "tables")
    path = tmp_path / "tables" / f"{table}.csv"
    path.write_text(path.read_text().replace(old, new))
    assert audit.main([str(audit.PUBLISHED), str(tmp_path / "tables")]) == 1
    assert capsys.readouterr().out.startswith(table)


def test_it_uses_none_of_the_reports_code():
    nodes = ast.walk(ast.parse(SCRIPT.read_text(encoding="utf-8")))
    found = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {a.name for n in found for a in n.names} | {getattr(n, "module", None) for n in found}
    assert not any(name and name.startswith("oplora") for name in names)
