"""The one error of this package."""


class CodecError(ValueError):
    """The bytes are not a container that this version can read, or the targets cannot be encoded.

    `row` is the first row at fault where one row is.
    """

    def __init__(self, message: str = "", row: int | None = None) -> None:
        super().__init__(message)
        self.row = row

    def __reduce__(self) -> tuple[type["CodecError"], tuple[str, int | None]]:
        return type(self), (str(self), self.row)
