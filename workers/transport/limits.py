"""What an endpoint takes from others, and how much it queues."""

from dataclasses import dataclass

MAX_RECORDS = 16  # of the format: what a decoder stages has room for so many


@dataclass(frozen=True, slots=True)
class Limits:
    """What an endpoint takes from others and how much it queues.

    Attributes:
        message_bytes: largest message, counted without header and records. 4096 tokens of 7168 bf16 fit.
        tensors: most tensors in one message.
        ring_bytes: shared memory for each direction of a pair.
        inbox_bytes: unread messages of one peer; beyond it nothing more is read from that peer.
        peers: most peers connected at once.
    """

    message_bytes: int = 64 * 2**20
    tensors: int = MAX_RECORDS
    ring_bytes: int = 2 * 2**20
    inbox_bytes: int = 128 * 2**20
    peers: int = 128
