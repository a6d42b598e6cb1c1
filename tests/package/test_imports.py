"""Imports run one way: a folder imports only what stands above it in ``ORDER``, and no module is part of a cycle."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import dynskip

ROOT = Path(__file__).resolve().parents[2]

# Top to bottom. An entry is a module at the root of dynskip, or a folder, whose modules may import each other.
ORDER = [
    # what to run: pure data, no device
    "version",
    "arguments",
    "files",
    "host",
    "assets",
    "found",
    "paths",
    "sampling",
    "prompts",
    "controllers",
    "routing",
    # what is computed, and by whom
    "kernels",
    "ops",
    "models",
    "execution",
    "causal_lm",
    # from prompts to texts
    "costs",
    "speculation",
    "scheduler",
    "simulation",
    "engine",
    "llm",
    "async_llm",
    "serving",
    "integrations",
    # what stands around it
    "data",
    "training",
    "measure",
    "validation",
    "tuning",
    "benchmark",
    "evaluation",
    "search",
    "cli",
    "__main__",
]
KERNELS_MAY_IMPORT = {"torch", "triton", "dynskip.kernels", *sys.stdlib_module_names}
MAX_ROOT_MODULES = 14


def sources() -> dict[str, str]:
    """Source text of every module of dynskip and kernels, by dotted name without ``dynskip.``; the facade is ''."""
    found = {}
    for folder, prefix in ((ROOT / "dynskip", ()), (ROOT / "kernels", ("kernels",))):
        for path in sorted(folder.rglob("*.py")):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            if not prefix and parts[0] == "kernels":
                continue  # the symlink, where a Python version follows it
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = path.read_text(encoding="utf-8")
    return found


def imported_names(source: str) -> Iterator[str]:
    """Every module that ``source`` imports, wherever: in functions and for types, too.

    ``from a import b`` yields ``a.b``: b may be a module; if it is not, its module is a prefix of the name.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def unit_of(name: str) -> str:
    """The entry of ``ORDER`` that the module ``name`` (without ``dynskip.``) belongs to."""
    return name.split(".")[0]


def complaints(name: str, source: str) -> list[str]:
    """What is wrong with the imports of the module ``name``."""
    unit, found = unit_of(name), []
    if unit and unit not in ORDER:
        return [f"{name}: not in ORDER of tests/package/test_imports.py. Add it where it belongs."]
    for imported in imported_names(source):
        if imported.startswith("."):
            found.append(f"{name}: {imported}: relative imports hide the direction; write dynskip.<module>")
            continue
        package, _, rest = imported.partition(".")
        if package == "kernels":
            found.append(f"{name}: {imported}: that is Hugging Face's package; ours is dynskip.kernels")
        if unit == "kernels" and not any(
            imported == allowed or imported.startswith(f"{allowed}.") for allowed in KERNELS_MAY_IMPORT
        ):
            found.append(f"{name}: {imported}: kernels import torch, triton and each other only")
        # The facade imports from all, no module imports from it: `from dynskip import LLM` would be a cycle.
        if package != "dynskip" or not unit:
            continue
        target = unit_of(rest)
        if target not in ORDER:
            found.append(f"{name}: {imported}: import the name from its module, not from the facade")
        elif ORDER.index(target) > ORDER.index(unit):
            found.append(f"{name}: {imported}: {target} stands below {unit}")
    return found


def cycle(modules: Mapping[str, str]) -> list[str]:
    """The modules of one import cycle, the first once more at the end; none where there is no cycle."""

    def resolve(imported: str) -> str:
        name = imported.removeprefix("dynskip.")
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name

    graph = {
        name: {
            found
            for imported in imported_names(source)
            # `from dynskip.ops import reference` is no import of the folder's own __init__.py
            if imported.startswith("dynskip.") and (found := resolve(imported)) not in ("", name)
        }
        for name, source in modules.items()
        if name
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def test_imports_run_one_way() -> None:
    modules = sources()
    assert {"", "paths", "cli.generate", "kernels.scatter_add"} <= set(modules), "the walk has lost part of the tree"
    found = [complaint for name, source in modules.items() for complaint in complaints(name, source)]
    assert not found, "\n".join(found)


def test_no_module_imports_itself_in_a_circle() -> None:
    found = cycle(sources())
    assert not found, " imports ".join(found)


@pytest.mark.parametrize(
    "way_back",
    [
        "from dynskip.engine import engine",
        "import dynskip.engine.engine",
        "def f():\n    from dynskip.engine.engine import Engine",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dynskip.engine.engine import Engine",
    ],
)
def test_a_cycle_is_found(way_back: str) -> None:
    modules = {
        "engine": "",
        "engine.engine": "from dynskip.engine.stats import EngineStats",
        "engine.stats": "from dynskip.engine.totals import Totals",
        "engine.totals": "import torch",
    }
    assert cycle(modules) == []
    modules["engine.totals"] = way_back
    found = cycle(modules)
    assert found[0] == found[-1] and set(found) == {"engine.engine", "engine.stats", "engine.totals"}
    start = found.index("engine.engine")
    assert (found[:-1] + found[:-1])[start + 1] == "engine.stats", "each imports the next"


def test_the_root_stays_small() -> None:
    modules = sorted(path.stem for path in (ROOT / "dynskip").glob("*.py"))
    assert len(modules) <= MAX_ROOT_MODULES, modules


def test_the_facade_has_what_it_names_and_loads_it_late() -> None:
    code = "import sys, dynskip; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'triton')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    assert set(dynskip.__all__) == {*dynskip._HOME, *dynskip._MODULES, "__version__"}
    assert dir(dynskip) == sorted(dynskip.__all__)
    for name, home in dynskip._HOME.items():
        assert getattr(dynskip, name) is vars(importlib.import_module(home))[name]
    assert dynskip.OPTForCausalLM is dynskip.CausalLM
    for name, home in dynskip._MODULES.items():
        assert getattr(dynskip, name) is importlib.import_module(home)


def test_neither_a_model_nor_its_steps_load_a_compiler() -> None:
    """PyTorch's takes a second and more, and Triton, which comes with it, reports leaks of its own at the end."""
    code = (
        "import sys; from dynskip import Engine, LLM, SamplingParams; llm = LLM('opt-mini', backend='torch');"
        "llm.generate(['a'], SamplingParams(max_tokens=2, temperature=1.0)); Engine(llm.model, policy='cohort');"
        "print({'torch._dynamo', 'triton'} & {*sys.modules})"
    )
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_structures_names_every_folder() -> None:
    page = (ROOT / "docs" / "structures.md").read_text(encoding="utf-8")
    folders = {name.rpartition(".")[0].replace(".", "/") for name in sources() if "." in name}
    missing = sorted(folder for folder in folders if f"| `{folder}/` |" not in page)
    assert not missing, f"docs/structures.md must have a line on {', '.join(missing)}"
    assert len(page.splitlines()) <= 120
    named = {line.split("`")[1].rstrip("/") for line in page.splitlines() if line.startswith("| `")}
    gone = sorted(folder for folder in named if not any((ROOT / place / folder).is_dir() for place in ("", "dynskip")))
    assert not gone, f"docs/structures.md must name folders that are there, got {', '.join(gone)}"


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("paths", "import dynskip.llm", "llm stands below paths"),
        ("paths", "from dynskip.llm import LLM", "llm stands below paths"),
        ("paths", "from dynskip import llm", "llm stands below paths"),
        (
            "routing.plan",
            "def f():\n    from dynskip.causal_lm import OPTForCausalLM",
            "causal_lm stands below routing",
        ),
        ("models.checkpoint", "from dynskip.causal_lm import OPTForCausalLM", "causal_lm stands below models"),
        ("scheduler.groups", "from dynskip.engine.request import Request", "engine stands below scheduler"),
        ("llm", "from dynskip import LayerPath", "not from the facade"),
        ("llm", "from .paths import LayerPath", "relative imports"),
        ("llm", "import kernels.scatter_add", "Hugging Face's package"),
        ("llm", "from kernels import scatter_add", "Hugging Face's package"),
        ("kernels.scatter_add", "from dynskip.paths import LayerPath", "kernels import torch, triton"),
        ("kernels.scatter_add", "import transformers", "kernels import torch, triton"),
        ("kernels.scatter_add", "import torchvision", "kernels import torch, triton"),
        ("newcomer", "", "not in ORDER"),
    ],
)
def test_a_bad_import_is_found(name: str, source: str, complaint: str) -> None:
    assert any(complaint in found for found in complaints(name, source)), complaints(name, source)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("llm", "from dynskip.paths import LayerPath\nfrom dynskip.ops import reference\nimport torch"),
        ("causal_lm", "def f():\n    from dynskip.models.checkpoint import load"),
        ("kernels.scatter_add", "import triton.language as tl\nfrom collections import Counter\nimport torch"),
        ("kernels.scatter_add", "from dynskip.kernels.launches import launch"),
        ("training.pretrain.run", "from dynskip.training.schedule import PathMenu"),
        ("", "from dynskip.llm import LLM"),
    ],
)
def test_a_good_import_passes(name: str, source: str) -> None:
    assert complaints(name, source) == []
