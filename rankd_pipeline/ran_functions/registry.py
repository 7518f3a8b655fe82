"""The RAN functions by name: a folder under ran_functions/ with a `function.py` that defines FUNCTION."""

from importlib import import_module
from pathlib import Path

from rankd_pipeline.errors import RankdError
from rankd_pipeline.ran_functions.contract import RanFunction


def function_names() -> list[str]:
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/function.py"))


def load_function(name: str) -> RanFunction:
    """The function called `name`.

    Raises: RankdError if there is none.
    """
    if name not in function_names():
        raise RankdError(f"RAN function {name!r}: unknown; expected one of {', '.join(function_names())}.")
    return import_module(f"rankd_pipeline.ran_functions.{name}.function").FUNCTION()
