"""Reading a JSON file that holds an object, as every configuration does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def json_object(file: str | os.PathLike[str], error: type[ValueError] = ValueError) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        file: path of the file.
        error: the exception class to raise.

    Raises:
        ValueError: or `error`, if the file is not valid JSON, does not hold an object or is nested too deeply; names
            the file.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except RecursionError:
        raise error(f"{file} is damaged: it is nested too deeply. Copy or save it again.") from None
    except ValueError as found:
        raise error(f"{file} is damaged: {found}. Copy or save it again.") from found
    if not isinstance(content, dict):
        raise error(f"{file} is damaged: it does not hold a JSON object. Copy or save it again.")
    return content
