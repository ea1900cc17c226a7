"""Many keys in little memory: what a set of them takes, a fifth of it. Pure."""

from __future__ import annotations

#: The size of a key in bytes. The first one of a digest is as good as random.
SIZE = 16


class Keys:
    """A multiset of keys: some 18 bytes for each, where a dictionary takes a hundred.

    Those with the same first byte follow each other in one array, which is searched from its
    beginning: with 25,000 keys, that is a hundred of them.
    """

    def __init__(self) -> None:
        self._arrays: dict[int, bytearray] = {}
        self._count = 0

    def add(self, key: bytes) -> None:
        array = self._arrays.get(key[0])
        if array is None:
            array = self._arrays[key[0]] = bytearray()
        array += key
        self._count += 1

    def remove(self, key: bytes) -> bool:
        """Take out one such key; returns whether there was one."""
        array = self._arrays.get(key[0])
        if array is None:
            return False
        at = array.find(key)
        while at > 0 and at % SIZE:  # the end of one key and the beginning of the next
            at = array.find(key, at + 1)
        if at < 0:
            return False
        del array[at : at + SIZE]
        self._count -= 1
        return True

    def __len__(self) -> int:
        return self._count
