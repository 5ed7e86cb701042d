"""Checks what is in a built wheel: all of the package, nothing else, and the version that a tag says.

python .github/check_wheel.py dist [--tag v0.1.0]
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUFFIXES = {".py", ".yaml", ".html", ".css", ".js", ".typed"}


def wanted(root: Path) -> set[str]:
    """The files of the package, those behind the links to callbacks/ and recipes/ included."""
    package = root / "aen_lightning"
    folders = [package, *(path for path in package.iterdir() if path.is_symlink())]
    return {
        path.relative_to(root).as_posix()
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in SUFFIXES
    }


def main(folder: str, tag: str | None = None) -> None:
    """Check the only wheel in a folder.

    Raises:
        SystemExit: With what is wrong with it.
    """
    (wheel,) = Path(folder).glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    packed = {name for name in names if ".dist-info/" not in name}
    version = wheel.name.split("-")[1]
    problems = [f"lacks {name}" for name in sorted(wanted(ROOT) - packed)]
    problems += [f"holds {name}" for name in sorted(packed) if not name.startswith("aen_lightning/")]
    problems += [] if any(name.endswith("licenses/LICENSE") for name in names) else ["lacks the licence"]
    problems += (
        [f"is version {version}, the tag says {tag}"] if tag and tag.removeprefix("v") != version else []
    )
    if problems:
        raise SystemExit("\n".join(f"{wheel.name} {problem}" for problem in problems))
    print(f"{wheel.name}: {len(packed)} files, as they should be")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[3] if sys.argv[2:3] == ["--tag"] else None)
