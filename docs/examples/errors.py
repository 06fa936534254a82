"""The two errors that end a run early. Each message is one sentence."""


class InputError(Exception):
    """The command line, the pairs or the model cannot be used."""


class DivergedError(Exception):
    """The loss or its gradient is no longer finite."""
