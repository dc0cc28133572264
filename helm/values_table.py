"""Writes the table of values in the chart's README from the comments of values.yaml.

    python helm/values_table.py            write it
    python helm/values_table.py --check    exit 1 if the README is not what values.yaml says

A row is made of each key under a comment that begins with `# --`; the comment goes on until the key.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent / "sapo-pipelines"
BEGIN, END = "<!-- values: made by helm/values_table.py -->", "<!-- end of values -->"
BAR = "\\|"  # a bar inside a cell


def documented(text: str) -> Iterator[tuple[str, str]]:
    """(dotted key, description) of every documented key of a values file, in its order."""
    path: list[tuple[int, str]] = []
    about: list[str] | None = None
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("# --"):
            about = [stripped.removeprefix("# --").strip()]
        elif stripped.startswith("#"):
            if about is not None:
                about.append(stripped.removeprefix("#").strip())
        elif key := re.match(r"( *)([A-Za-z][\w.]*):", line):
            indent = len(key[1])
            path = [(depth, name) for depth, name in path if depth < indent] + [(indent, key[2])]
            if about is not None:
                yield ".".join(name for _, name in path), " ".join(about)
            about = None


def default(values: dict[str, Any], key: str) -> Any:
    """The value of a dotted key. Raises KeyError if there is none."""
    value: Any = values
    for name in key.split("."):
        value = value[name]
    return value


def table(text: str) -> str:
    """The values file as a Markdown table."""
    values = yaml.safe_load(text)
    rows = ["| Value | Default | What |", "|---|---|---|"]
    for key, about in documented(text):
        cells = (f"`{key}`", f"`{json.dumps(default(values, key))}`", about)
        rows.append(f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |")
    return "\n".join(rows)


def with_table(readme: str, text: str) -> str:
    """The README with its table made anew. Raises ValueError if it has no place for one."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README needs the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{table(text)}\n\n{END}{after}"


def main(argv: Sequence[str]) -> int:
    readme = CHART / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = with_table(old, (CHART / "values.yaml").read_text(encoding="utf-8"))
    if "--check" in argv:
        if old != new:
            print(f"{readme}: not what values.yaml says; run `python helm/values_table.py`", file=sys.stderr)
        return int(old != new)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
