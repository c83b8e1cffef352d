"""The one exception a user may cause."""


class UserError(Exception):
    """Something outside the program is wrong. The message, one line: what was found, what was expected, what to do."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())
