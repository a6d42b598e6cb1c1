"""The environment variables that change how kernels are launched: what each of it is worth can be timed on a card."""

from __future__ import annotations

import os
from pathlib import Path

PDL = "DYNSKIP_PDL"
"""0: no kernel starts while the one before it ends, whatever the tables say (programmatic dependent launch)."""
CONFIGS = "DYNSKIP_CONFIGS"
"""A file with a table of constants that takes the place of the device's own."""
CARVEOUT = "DYNSKIP_CARVEOUT"
"""0 to 100: the percentage of L1 that every kernel asks to have as shared memory; unset, as the driver sees fit."""


def pdl() -> bool:
    """Whether kernels may overlap. Raises ValueError for anything but 0 and 1."""
    value = os.environ.get(PDL, "1")
    if value not in ("0", "1"):
        raise ValueError(f"switches: {PDL} must be 0 or 1, got {value!r}. Set it to 0 to switch overlap off.")
    return value == "1"


def configs() -> Path | None:
    """The table to use on every device; None for the device's own. Raises ValueError where there is no such file."""
    value = os.environ.get(CONFIGS)
    if value is None:
        return None
    path = Path(value).expanduser()
    if not path.is_file():
        raise ValueError(f"switches: {CONFIGS} must name a file, got {value!r}. Name a table, or unset it.")
    return path


def carveout() -> int | None:
    """The percentage of L1 to ask for as shared memory; None: none is asked for. Raises ValueError outside 0..100."""
    value = os.environ.get(CARVEOUT)
    if value is None:
        return None
    if not (value.isdecimal() and int(value) <= 100):
        raise ValueError(f"switches: {CARVEOUT} must be 0..100, got {value!r}. Set it to 100 for all of L1.")
    return int(value)


def describe() -> dict[str, str]:
    """What each switch is set to, for people to read. Raises ValueError where one is set to nonsense."""
    table, percent = configs(), carveout()
    return {
        PDL: "1: kernels may overlap" if pdl() else "0: no kernel overlaps with the one before it",
        CONFIGS: "the device's own table" if table is None else str(table),
        CARVEOUT: "as the driver sees fit" if percent is None else f"{percent} % of L1",
    }
