"""The one error that is meant for the user."""


class UserError(Exception):
    """One line that names the thing and the remedy; the command line prints it and exits with code 2."""
