"""The exceptions that end a command, or a job of it, in an orderly way: common/run/command.py maps them to exit statuses."""


class InputError(ValueError):
    """Input that cannot be used: options, files, data. The message is one line: what is wrong, and what to do."""


class Failed(Exception):
    """A run, or one job of it, that cannot be completed. The message is one line with the reason."""


class Interrupted(Exception):
    """A signal has come, and what is needed to resume is saved. The message says where the work stands."""
