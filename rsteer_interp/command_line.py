"""What every analysis does with its command line: parse a Config, run, and turn errors for the user into one line."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from rsteer_interp.errors import UserError
from rsteer_interp.processes import leave, together

ConfigT = TypeVar("ConfigT")


def run(config_type: type[ConfigT], function: Callable[[ConfigT], object], argv: Sequence[str] | None = None) -> int:
    """Exit code of `function(Config from argv)`: what it returns if that is a number, else 0; 2 after a UserError (one line on
    stderr), 130 when interrupted. Under torchrun the processes work together (see `processes`).

    The help text is the docstring of the analysis and of its Config's fields; nothing heavy is imported to print it.
    """
    description = sys.modules[config_type.__module__].__doc__
    config = tyro.cli(config_type, args=argv, description=description)
    code = _run(function, config)
    leave(code)
    return code


def _run(function: Callable[[ConfigT], object], config: ConfigT) -> int:
    try:
        _check_numbers(config)
        with together(getattr(config, "device_map", None)):
            found = function(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue from the last finished stage", file=sys.stderr)
        return 130
    return found if isinstance(found, int) else 0


def _check_numbers(config: object) -> None:
    """UserError for an option that is NaN or infinite, or overflows (1e999): it would come out as a result."""
    for name, value in vars(config).items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"--{name.replace('_', '-')} is {number}; give a finite number")
