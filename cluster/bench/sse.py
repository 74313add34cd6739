"""Server-sent events out of bytes that may be cut anywhere."""

from collections.abc import Iterator


class EventReader:
    """Collects bytes and gives the data of each event once it is whole.

    Lines end with LF, CRLF or CR, as the standard has it; comments and fields other than `data` are skipped.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._after_cr = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The data of the events that these bytes complete."""
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]
        if data:
            self._after_cr = data.endswith(b"\r")
        lines = (
            (self._rest + data).splitlines(keepends=True) if self._rest else data.splitlines(keepends=True)
        )
        self._rest = lines.pop() if lines and not lines[-1].endswith((b"\n", b"\r")) else b""
        for line in lines:
            yield from self._line(line.rstrip(b"\r\n"))

    def _line(self, line: bytes) -> Iterator[bytes]:
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
        elif self._data:
            whole, self._data = b"\n".join(self._data), []
            yield whole
