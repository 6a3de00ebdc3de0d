"""placeholder."""


def inspect() -> None: ...
