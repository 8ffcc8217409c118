"""The figures of the papers beside this project's, in docs/results/paper.md.

    python benchmarks/paper.py              # all tables
    python benchmarks/paper.py time hydra   # some

Nothing is measured: what other benchmarks have left in docs/results is gathered, the planner and the time model are
asked, and every row names the command that gives this project's figure. The tables go between their marks, the prose
about them stays; the same figures are in paper.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from measuring import ROOT, fill


def main() -> None:
    from papers.published import SOURCES
    from papers.tables import TABLES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"{', '.join(TABLES)}; default: all")
    parser.add_argument("--output", default=str(ROOT / "docs/results/paper.md"), help="a Markdown file with the marks")
    args = parser.parse_args()
    if unknown := set(args.tables) - TABLES.keys():
        parser.error(f"no table {', '.join(sorted(unknown))}; expected {', '.join(TABLES)}")
    document = Path(args.output)
    record = document.with_suffix(".json")
    kept = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    for name in args.tables or TABLES:
        try:
            section = TABLES[name]()
        except LookupError as error:
            sys.exit(f"error: table {name}: {error}; an input has another form than benchmarks/papers reads")
        fill(document, section.blocks(name))
        kept[name] = section.record()
        print(name, flush=True)
    fill(document, {"sources": [f"- **{name}**: {source}." for name, source in SOURCES.items()]})
    kept = {name: kept[name] for name in TABLES if name in kept}
    record.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
