"""What the losses do in training: the experiments behind the pages on SPO and DPO."""


class InputError(Exception):
    """What the user asks for cannot be done; the message says why in one sentence."""
