"""What a person can put right: bad input, a failed request, a cluster that is not as asked."""


class EvalError(ValueError):
    """The message names what was wrong (file, field, value) and the remedy."""
