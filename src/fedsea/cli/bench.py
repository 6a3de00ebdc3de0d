"""placeholder."""


def bench() -> None: ...
