"""Where the files that come with the course lie.

A checkout keeps them in the repository's data/ folder, beside the package; a wheel carries the same files inside
the package, in dsv3_mini/_shipped/. Code asks for a name and never cares which of the two it runs from.
"""

from pathlib import Path, PurePosixPath

from dsv3_mini.errors import DataError

PACKAGE = Path(__file__).resolve().parents[1]


def shipped(name: str = "") -> Path:
    """The path of one shipped file or folder, such as `shipped("tiny/config.json")`; without a name, the folder of all.

    Args:
        name: a relative path, written with forward slashes on every system.

    Raises:
        DataError: the name leaves the folder, or nothing of that name ships.
    """
    return find(name, shipped_root(PACKAGE))


def shipped_root(package: Path) -> Path:
    """The folder of shipped files for a package folder: its own in a wheel, its neighbour data/ in a checkout."""
    inside = package / "_shipped"
    return inside if inside.is_dir() else package.parent / "data"


def find(name: str, root: Path) -> Path:
    """`name` under `root`, checked to stay inside it and to exist. The root itself need not: `make data` fills it."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        raise DataError(f"shipped file {name!r} must be a path inside data/: leave out '..' and the leading '/'")
    path = root.joinpath(*parts.parts)
    if parts.parts and not path.exists():
        raise DataError(
            f"shipped file {name!r} is not in {root}: reinstall dsv3-mini, or run `make data` in a checkout"
        )
    return path
