"""Things that belong together, by pairs of which that is known."""

from __future__ import annotations


class Groups:
    """Sets of things that belong together, by their positions."""

    def __init__(self, number: int) -> None:
        self._parents = list(range(number))

    def find(self, position: int) -> int:
        """Returns the position that stands for the group of this one."""
        while self._parents[position] != position:
            self._parents[position] = self._parents[self._parents[position]]
            position = self._parents[position]
        return position

    def join(self, first: int, second: int) -> bool:
        """Makes one group of two; returns whether they were two."""
        first, second = sorted((self.find(first), self.find(second)))
        self._parents[second] = first
        return first != second
