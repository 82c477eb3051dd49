"""The one exception that is meant for the person at the keyboard."""


class UserError(ValueError):
    """Something the user can mend. The message is one line: what was wrong (file or value), and what to do.

    Entry points print it without a traceback and leave with exit code 2 (`defi.config.entry`).
    """
