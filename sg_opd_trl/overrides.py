"""Whether a subclass decides something itself."""


def inherits(kind: type, base: type, *names: str) -> bool:
    """Whether a class has these methods from `base` as they are there."""
    return all(getattr(kind, name) is getattr(base, name) for name in names)
