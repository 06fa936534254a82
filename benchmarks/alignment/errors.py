"""What can be wrong with what the user asks for."""


class InputError(Exception):
    """The request cannot be carried out; the message says why in one sentence."""
