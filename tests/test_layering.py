"""Who may import whom: an AST walk over the packages, so that the architecture cannot erode unseen."""
from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

#: Modules of the core from the ground up; each may import those before it, and its own folder.
LAYERS = (
    "errors", "drafts", "detectors", "settings_text", "settings", "ranges", "config", "structures", "boxes", "anchors", "stateless",
    "focal", "deltas", "matching", "protocol", "postprocess", "guidance", "losses", "models", "data", "engine",
)
#: What the detector packages may know of the core.
OPEN_TO_DETECTORS = {
    "structures", "boxes", "anchors", "stateless", "focal", "deltas", "matching", "protocol", "postprocess", "config", "ranges",
    "models.backbone",
}
DETECTORS = sorted(path.name for path in ROOT.glob("*_dtg"))
FOLDERS = ("dtg_core", *DETECTORS, "scripts")
#: Libraries that only some modules may import.
RESERVED = {
    "timm": ("dtg_core/models/backbone.py",),
    "accelerate": ("dtg_core/engine/", "scripts/"),
    "pycocotools": ("dtg_core/engine/",),
    "yaml": ("dtg_core/settings.py",),
    "onnx": ("dtg_core/engine/",),
    "onnxscript": ("dtg_core/engine/",),
    "onnxruntime": ("dtg_core/engine/",),
    "av": ("dtg_core/data/",),
}


def imports(file: Path) -> set[str]:
    """Dotted names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def layer(name: str) -> int | None:
    """Place of a core module in LAYERS."""
    parts = name.split(".")
    return LAYERS.index(parts[1]) if len(parts) > 1 and parts[0] == "dtg_core" and parts[1] in LAYERS else None


def test_every_module_of_the_core_has_its_layer():
    assert {path.stem for path in (ROOT / "dtg_core").iterdir() if path.suffix == ".py" or path.is_dir()} - {"__init__", "__pycache__"} == set(LAYERS)


@pytest.mark.parametrize("file", python_files("dtg_core"), ids=lambda file: str(file.relative_to(ROOT)))
def test_core_imports_downwards_only(file):
    own = layer(".".join(file.relative_to(ROOT).with_suffix("").parts))
    for name in imports(file):
        assert name.split(".")[0] not in {*DETECTORS, "scripts"}, f"{file} imports {name}"
        target = layer(name)
        if own is not None and target is not None:
            assert target <= own, f"{file} imports {name}, which stands above it"


@pytest.mark.parametrize("package", DETECTORS)
def test_detectors_know_only_the_open_part_of_the_core(package):
    for file in python_files(package):
        for name in imports(file):
            assert name.split(".")[0] not in {*DETECTORS} - {package}, f"{file} imports {name}"
            if name.startswith("dtg_core."):
                inner = name.removeprefix("dtg_core.")
                assert any(inner == open_ or inner.startswith(open_ + ".") for open_ in OPEN_TO_DETECTORS), f"{file} imports {name}"


@pytest.mark.parametrize("library", RESERVED)
def test_libraries_stay_in_their_place(library):
    for folder in FOLDERS:
        for file in python_files(folder):
            place = str(file.relative_to(ROOT))
            if not place.startswith(RESERVED[library]):
                found = [name for name in imports(file) if name.split(".")[0] == library]
                assert not found, f"{place} imports {found}"


def test_every_module_opens_with_a_legend():
    for folder in FOLDERS:
        for file in python_files(folder):
            if file.name != "__init__.py" or file.read_text().strip():
                assert ast.get_docstring(ast.parse(file.read_text())), f"{file} has no module docstring"


def test_no_code_comes_from_data():
    """Fault 82: nothing that a user hands over is run, whatever it holds."""
    for folder in FOLDERS:
        for file in python_files(folder):
            assert not imports(file) & {"pickle", "dill", "joblib", "marshal", "shelve"}, file
            for node in ast.walk(ast.parse(file.read_text())):
                if not isinstance(node, ast.Call):
                    continue
                name, keywords = ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert name not in {"eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}, f"{file}:{node.lineno}"
                assert name != "torch.load" or keywords.get("weights_only") == "True", f"{file}:{node.lineno}"
                assert keywords.get("shell", "False") == "False", f"{file}:{node.lineno}"
                assert keywords.get("allow_pickle", "False") == "False", f"{file}:{node.lineno}"
