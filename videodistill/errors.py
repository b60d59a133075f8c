"""The one exception that means: the input is at fault, and here is what to do about it."""

from __future__ import annotations


class UserError(Exception):
    """Bad input, told in one line that names the thing and the remedy.

    The command line prints it on stderr without a traceback and exits with status 2.
    """
