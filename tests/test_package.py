"""``import aen_lightning`` costs nothing, and SAELens knows ``aen`` all the same."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pickle
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

import aen_lightning
from aen_lightning.registration import after_import

PACKAGE = Path(aen_lightning.__file__).parent


def run_python(code: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(
        command, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120, check=False
    )


def test_importing_the_package_imports_none_of_the_libraries() -> None:
    code = (
        "import aen_lightning, sys\n"
        "print([m for m in ('torch', 'sae_lens', 'lightning', 'numpy') if m in sys.modules])\n"
        "print('SAEModule' in dir(aen_lightning))"
    )
    assert run_python(code).stdout.split("\n")[:2] == ["[]", "True"]


def test_every_public_name_is_there_and_no_other() -> None:
    for name in aen_lightning.__all__:
        assert getattr(aen_lightning, name) is not None
    with pytest.raises(AttributeError, match="module 'aen_lightning' has no attribute 'SAEModul'"):
        aen_lightning.SAEModul  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "import aen_lightning\nimport sae_lens",
        "import sae_lens\nimport aen_lightning",
        "import aen_lightning, importlib\nimportlib.reload(aen_lightning)\nfrom sae_lens.registry import "
        "get_sae_class",
    ],
    ids=["ours first", "SAELens first", "ours twice, a module of SAELens first"],
)
def test_saelens_knows_aen_in_either_order_of_imports(first: str, tmp_path: Path) -> None:
    sae = aen_lightning.AENSAE(aen_lightning.AENSAEConfig(d_in=4, d_sae=8))
    sae.save_model(tmp_path)
    code = first + (
        "\nimport importlib, sys, aen_lightning\n"
        "from sae_lens import SAE, TrainingSAE\n"
        "importlib.reload(aen_lightning)\n"
        "sae = TrainingSAE.from_dict({'architecture': 'aen', 'd_in': 4, 'd_sae': 8})\n"
        "print(type(sae).__name__, type(SAE.load_from_disk(sys.argv[1])).__name__)\n"
        "print([f for f in sys.meta_path if type(f).__module__.startswith('aen_lightning')])"
    )
    done = run_python(code, tmp_path)
    assert done.stdout.splitlines() == ["AENTrainingSAE AENSAE", "[]"], done.stderr


@pytest.mark.slow
def test_a_config_unpickles_in_a_process_that_has_imported_nothing(tmp_path: Path) -> None:
    cfg = aen_lightning.AENTrainingSAEConfig(d_in=4, d_sae=8, gamma=0.25)
    (tmp_path / "cfg.pkl").write_bytes(pickle.dumps(cfg))
    done = run_python(
        "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb')).gamma)", tmp_path / "cfg.pkl"
    )
    assert done.stdout == "0.25\n", done.stderr


def _imports(path: Path) -> set[str]:
    """Names of the modules that a file imports when it is itself imported."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _file_of(module: str) -> Path | None:
    base = PACKAGE.joinpath(*module.split(".")[1:])
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def test_what_registration_needs_imports_sae_lens_only_under_saes() -> None:
    # else that module, imported first, would import sae_lens, which would import it again, half made, by registration
    waiting, seen = {"aen_lightning.saes.aen"}, set[str]()
    while waiting:
        module = waiting.pop()
        seen.add(module)
        path = _file_of(module)
        if path is None:
            continue
        imports = _imports(path)
        if not module.startswith("aen_lightning.saes"):
            assert not any(name.split(".")[0] == "sae_lens" for name in imports), module
        waiting |= {name for name in imports if name.startswith("aen_lightning.")} - seen
    assert "aen_lightning.saes.penalty" in seen


# --- after_import, with a module of the test's own -----------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Name of a module that exists and was never imported."""
    name = f"late_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def test_the_action_runs_once_and_after_the_module(module: str) -> None:
    seen: list[int] = []
    after_import(module, lambda: seen.append(sys.modules[module].value))
    after_import(module, lambda: seen.append(-1))
    assert seen == []
    n_finders = len(sys.meta_path)
    importlib.import_module(module)
    assert seen == [1]
    assert len(sys.meta_path) == n_finders - 1
    importlib.reload(sys.modules[module])
    assert seen == [1]


def test_the_action_runs_at_once_for_a_module_that_is_there(module: str) -> None:
    importlib.import_module(module)
    seen: list[int] = []
    after_import(module, lambda: seen.append(1))
    assert seen == [1]


def test_looking_for_the_module_imports_nothing_and_changes_nothing(module: str, tmp_path: Path) -> None:
    plain = importlib.util.find_spec(module)
    seen: list[int] = []
    after_import(module, lambda: seen.append(1))
    spec = importlib.util.find_spec(module)
    assert plain is not None
    assert spec is not None
    assert (spec.name, spec.origin, spec.submodule_search_locations) == (plain.name, plain.origin, None)
    assert isinstance(spec.loader, SourceFileLoader)
    assert spec.loader.get_data(str(tmp_path / f"{module}.py")) == b"value = 1\n"
    assert seen == []
    assert importlib.util.find_spec("no_such_module_anywhere") is None
    assert importlib.import_module(module).__spec__ == plain
    assert seen == [1]


def test_an_error_of_the_module_stays_that_error_and_the_action_waits(module: str, tmp_path: Path) -> None:
    path = tmp_path / f"{module}.py"
    path.write_text("raise RuntimeError('its own error')\n")
    seen: list[int] = []
    after_import(module, lambda: seen.append(1))
    with pytest.raises(RuntimeError, match=r"^its own error$"):
        importlib.import_module(module)
    assert seen == []
    path.write_text("value = 'mended'\n")
    importlib.invalidate_caches()
    importlib.import_module(module)
    assert seen == [1]


def test_a_missing_module_is_missing(module: str) -> None:
    after_import(f"{module}_missing", lambda: None)
    with pytest.raises(ModuleNotFoundError, match=f"No module named '{module}_missing'"):
        importlib.import_module(f"{module}_missing")
