"""A recipe's settings under dotted keys, as the command line names them."""

from __future__ import annotations

from typing import Any


def flat_keys(settings: Any, path: str = "") -> dict[str, Any]:
    """Nested settings as one level: {"data": {"train": {"image_size": 20}}} is {"data.train.image_size": 20}.

    Lists and empty mappings are values.
    """
    if isinstance(settings, dict) and settings:
        return {
            key: value
            for name, item in settings.items()
            for key, value in flat_keys(item, f"{path}.{name}" if path else str(name)).items()
        }
    return {path: settings}
