"""Who owns which page of the KV cache, and which pages may be shared. Numbers only, no tensors.

scheduler --allocate, grow, register, release--> KVCache

A block holds BLOCK_TOKENS tokens. A full block whose K and V are computed is registered under the hash of
everything up to its end; a later request with the same beginning shares it. A block that nobody holds keeps
its content until the space is needed; the longest idle goes first.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from service.model.batch import BLOCK_TOKENS


def num_blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_TOKENS)


def extend_hashes(hashes: list[bytes], token_ids: Sequence[int], salt: bytes) -> None:
    """Brings `hashes` up to one SHA-256 digest for each full block of `token_ids`.

    A digest covers the digest before it and the block's ids; the first covers the salt's, so a chain under
    another salt has no digest in common.
    """
    digest = hashes[-1] if hashes else hashlib.sha256(salt).digest()
    for start in range(len(hashes) * BLOCK_TOKENS, len(token_ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        ids = array("q", token_ids[start : start + BLOCK_TOKENS])
        digest = hashlib.sha256(digest + ids.tobytes()).digest()
        hashes.append(digest)


class KVCache:
    """Reference counts and hashes of `num_blocks` blocks. Block 0 is never handed out."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._holders = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._blank = list(range(num_blocks - 1, 0, -1))  # free, content worthless
        self._idle: OrderedDict[int, None] = OrderedDict()  # free, content reusable, longest idle first

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out now, those kept for reuse included."""
        return len(self._blank) + len(self._idle)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    @property
    def num_held(self) -> int:
        return self.num_blocks - 1 - self.num_free

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the longest known prefix, not yet held."""
        blocks: list[int] = []
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def allocate(self, shared: Sequence[int], num_new: int, num_spare: int = 0) -> list[int] | None:
        """Holds the `shared` blocks (from `match`) and `num_new` others, in this order.

        None, and nothing is held, unless `num_spare` blocks stay free after that.
        """
        num_woken = sum(self._holders[block] == 0 for block in shared)
        if self.num_free - num_woken < num_new + num_spare:
            return None
        for block in shared:
            if self._holders[block] == 0:
                del self._idle[block]
            self._holders[block] += 1
        return [*shared, *(self._take() for _ in range(num_new))]

    def register(self, block: int, digest: bytes) -> None:
        """Makes a full, computed block findable; where an equal one is known already, that one stays."""
        if digest not in self._block_of and block not in self._hash_of:
            self._block_of[digest] = block
            self._hash_of[block] = digest

    def release(self, blocks: Sequence[int]) -> None:
        """Gives up one hold on each. The end of a sequence goes idle first: it is the least shared."""
        for block in reversed(blocks):
            assert self._holders[block] > 0, f"block {block} released twice"
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._hash_of:
                    self._idle[block] = None
                else:
                    self._blank.append(block)

    def _take(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._block_of[self._hash_of.pop(block)]
        self._holders[block] = 1
        return block

    def forget(self, blocks: Iterable[int]) -> None:
        """No later request shall find these; whoever shares them already keeps them."""
        for block in blocks:
            if digest := self._hash_of.pop(block, b""):
                del self._block_of[digest]

    def check(self, tables: Iterable[tuple[Sequence[int], int]]) -> None:
        """Asserts that the block tables of all living sequences account for every hold.

        With each table comes how many of its blocks, from the start, are full and computed.
        """
        held = [0] * self.num_blocks
        unfinished: set[int] = set()
        for table, num_full in tables:
            assert len(set(table)) == len(table), "a sequence holds a block twice"
            unfinished.update(table[num_full:])
            for block in table:
                held[block] += 1
        assert held == self._holders, "holds differ from the living sequences"
        assert all(held[block] == 1 for block in unfinished), "a block is shared before it is full"
        free = sorted([*self._blank, *self._idle])
        assert free == [block for block in range(1, self.num_blocks) if not held[block]], "blocks leaked"
        assert held[0] == 0, "block 0 handed out"
        assert set(self._blank).isdisjoint(self._hash_of), "a findable block lies among the blank ones"
        assert set(self._idle) <= set(self._hash_of), "an idle block cannot be found"
        assert {block: digest for digest, block in self._block_of.items()} == self._hash_of, "hashes disagree"
