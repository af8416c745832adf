"""The recipes and hardware profiles of a checkout, with the first line of each one's header."""

from __future__ import annotations

from pathlib import Path

RECIPES, PROFILES = Path("yamls"), Path("yamls/hardware")
NOT_PROFILES = ("prices.yaml",)  # beside the profiles, with another content


def recipe_files(root: Path = Path()) -> list[Path]:
    """The recipes below `root`."""
    return sorted((root / RECIPES).glob("*.yaml"))


def profile_files(root: Path = Path()) -> list[Path]:
    """The hardware profiles below `root`."""
    return [path for path in sorted((root / PROFILES).glob("*.yaml")) if path.name not in NOT_PROFILES]


def listing(root: Path = Path()) -> str:
    """A line for each file: its path and the first line of its header."""
    recipes, profiles = recipe_files(root), profile_files(root)
    if not recipes and not profiles:
        return f"no recipes in {root / RECIPES} and no profiles in {root / PROFILES}; run this in the project's folder"
    width = max(len(str(path)) for path in (*recipes, *profiles))
    return "\n".join(
        [
            "recipes: run.py -f RECIPE",
            *(_line(path, width) for path in recipes),
            "",
            "hardware profiles: run.py -f RECIPE -f PROFILE",
            *(_line(path, width) for path in profiles),
        ]
    )


def _line(path: Path, width: int) -> str:
    try:
        first = path.read_text().partition("\n")[0]
    except (OSError, UnicodeDecodeError):
        first = "# (cannot be read)"
    return f"  {path!s:<{width}}  {first.removeprefix('#').strip() if first.startswith('#') else ''}".rstrip()
