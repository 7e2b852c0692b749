"""Where examples stand, `file:row` each, kept as numbers: twelve bytes a place, whose text is made when asked for."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np

from lmray.data.lazy import LazySequence


class Places(LazySequence[str]):
    """M places in the files `names`: `names[files_M[i]]`, row `rows_M[i]`. A place without a row is a name alone."""

    def __init__(self, names: tuple[str, ...], files_M: np.ndarray, rows_M: np.ndarray):
        self.names, self.files_M, self.rows_M = names, files_M, rows_M

    @classmethod
    def of(cls, places: Iterable[str]) -> Places:
        """`places` in short."""
        made = PlacesMaker()
        for place in places:
            made.add(place)
        return made.made()

    def __len__(self) -> int:
        return len(self.files_M)

    def item(self, index: int) -> str:
        name, row = self.names[self.files_M[index]], int(self.rows_M[index])
        return name if row == NO_ROW else f"{name}:{row}"

    def chosen(self, indices: np.ndarray) -> Places:
        """Those of the examples at `indices`."""
        return Places(self.names, self.files_M[indices], self.rows_M[indices])


NO_ROW = -1
NOWHERE = Places((), np.zeros(0, np.int32), np.zeros(0, np.int64))


class PlacesMaker:
    """Places that come one after the other."""

    def __init__(self):
        self.names: dict[str, int] = {}
        self._files, self._rows = array("i"), array("q")

    def add(self, place: str) -> None:
        name, _, row = place.rpartition(":")
        if not (row.isascii() and row.isdigit() and str(int(row)) == row):  # else the text would come out otherwise
            name, row = place, NO_ROW
        self._files.append(self.names.setdefault(name, len(self.names)))
        self._rows.append(int(row))

    def made(self) -> Places:
        """All that were added."""
        files, rows = np.array(self._files, dtype=np.int32), np.array(self._rows, dtype=np.int64)
        return Places(tuple(self.names), files, rows)
