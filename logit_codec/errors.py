"""The one error of this package."""


class CodecError(ValueError):
    """Raised for bytes that are not a container of this version, and for targets with bad rows.

    `row` is the first bad row, if the error is about a row.
    """

    def __init__(self, message: str = "", row: int | None = None) -> None:
        super().__init__(message)
        self.row = row

    def __reduce__(self) -> tuple[type["CodecError"], tuple[str, int | None]]:
        return type(self), (str(self), self.row)
