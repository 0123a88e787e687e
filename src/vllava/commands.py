"""The command lines of the package: argparse, whose mistakes are a user's like any other."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Callable
from typing import Any, NoReturn

from vllava.checks import possible, require
from vllava.errors import UserError, stop


class Parser(argparse.ArgumentParser):
    """A parser that ends a command at a mistake with one paragraph and exit status 1.

    `example` is the rest of a command line, shown below the help.
    """

    def __init__(self, prog: str, description: str | None = None, example: str = "", **settings: Any) -> None:
        shown = {"epilog": f"example: {prog} {example}"} if example else {}
        super().__init__(prog=prog, description=description, **{**shown, **settings})

    def error(self, message: str) -> NoReturn:
        stop(UserError(f"{message} (see {self.prog} --help)"))


def number(hint: Any) -> Callable[[str], Any]:
    """A `type` for an argument: the number that it says, of a type as in vllava.checks."""
    whole = typing.get_args(hint)[0] is int

    def read(text: str) -> Any:
        try:
            value: Any = int(text) if whole else float(text)
            require("", value, hint)
        except (ValueError, UserError):
            raise argparse.ArgumentTypeError(f"{text!r} is not {possible(hint)}") from None
        return value

    return read
