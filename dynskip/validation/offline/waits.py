"""What a kernel may do before it waits for the kernel that was launched before it, read from its PTX.

A kernel that is launched to overlap with the one before it must wait on every way to its end: one that returned early,
unwaited, would count as done, and the next one could start before the work of the first is to be seen. What it loads
before it waits may be out of date, and may stay in L1 so; a load that goes past L1, volatile or ".cg", says that it
knows.
"""

from __future__ import annotations

import re

_LABEL = re.compile(r"(\$\w+):")
_INSTRUCTION = re.compile(r"(?P<predicate>@!?%\w+\s+)?(?P<name>[a-z][\w.:]*)\s*(?P<operands>[^;]*);")
# What changes global memory; addresses without a state space may lie there.
_WRITE = re.compile(r"(?:st|red|atom)\.(?!.*shared)|cp\.(?:reduce\.)?async\.bulk\.(?:tensor\.\w+\.)?global\.")
# What may read global memory into registers. Asynchronous copies are none: they bring weights, which nobody writes.
_READ = re.compile(r"ld\.(?!param|shared|const|local|volatile|global\.cg)")
_WAIT = "griddepcontrol.wait"


def acts_before_wait(ptx: str) -> list[str]:
    """Of "reads", "returns" and "writes", what some way through the one kernel in `ptx` does before it waits."""
    lines = [line.strip() for line in ptx[ptx.index(".entry") :].splitlines()]
    labels = {match[1]: index for index, line in enumerate(lines) if (match := _LABEL.match(line))}
    found: set[str] = set()
    seen: set[int] = set()
    ways = [0]
    while ways:
        index = ways.pop()
        while index not in seen:
            seen.add(index)
            assert index < len(lines), "a kernel ends with an instruction that ends it"
            match = _INSTRUCTION.search(lines[index])
            index += 1
            if match is None:
                continue
            name, certain = match["name"], match["predicate"] is None
            assert not name.startswith(("brx", "call")), f"nobody follows {name}"
            if _WRITE.match(name):
                found.add("writes")
            if _READ.match(name):
                found.add("reads")
            if name == _WAIT and certain:
                break
            if name.partition(".")[0] == "bra":
                ways.append(labels[match["operands"].strip()])
            if name in ("ret", "exit"):
                found.add("returns")
            if certain and name.partition(".")[0] in ("bra", "ret", "exit", "trap"):
                break
    return sorted(found)
