"""placeholder."""


def split() -> None: ...
