"""Whether two runs found the same."""


def same(one, other):
    """Whether results differ in nothing but the time that they took, and by what command."""
    origins = ("seconds", "resumed", "command")
    one, other = (part.assign_attrs({name: "" for name in origins}) for part in (one, other))
    return one.identical(other)
