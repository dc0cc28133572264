"""The one exception that means "the user can mend this"; the CLI prints it as a single line and exits with 2."""


class UserError(Exception):
    """Wrong input, settings or environment. The message says what was wrong, where, and what to do about it."""
