"""`merged`: one page for Prometheus from those of several replicas."""

from __future__ import annotations

from collections.abc import Mapping


def merged(pages: Mapping[str, str]) -> str:
    """The values of all ``pages``, each with the label ``replica``: the name of its page."""
    headings: dict[str, list[str]] = {}
    values: dict[str, list[str]] = {}
    for replica, page in pages.items():
        family = ""
        for line in page.splitlines():
            if line.startswith("# "):
                _, kind, family, *_ = line.split(" ", 3)
                lines = headings.setdefault(family, [])
                if not any(known.startswith(f"# {kind} ") for known in lines):
                    lines.append(line)
            elif line:
                values.setdefault(family, []).append(_labelled(line, replica))
    return "".join(f"{line}\n" for family, lines in headings.items() for line in (*lines, *values.get(family, ())))


def family(name: str, kind: str, text: str, values: Mapping[str, float]) -> str:
    """The lines of a family of one value a replica. kind: ``counter`` or ``gauge``."""
    lines = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
    lines += [f'{name}{{replica="{replica}"}} {float(value)}' for replica, value in values.items()]
    return "\n".join(lines) + "\n"


def _labelled(line: str, replica: str) -> str:
    name, brace, rest = line.partition("{")
    if brace:
        return f'{name}{{replica="{replica}",{rest}'
    name, _, value = line.partition(" ")
    return f'{name}{{replica="{replica}"}} {value}'
