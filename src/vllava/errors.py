"""The one exception for mistakes a user can mend."""

from __future__ import annotations


class UserError(Exception):
    """What is wrong, where, and what to do. Entry points print it as one paragraph, without a traceback, and exit 1."""

    @property
    def paragraph(self) -> str:
        """The message alone, also where a data worker has wrapped it in its traceback."""
        return str(self).rsplit("UserError: ", 1)[-1].strip()
