"""A sequence moves from the engine that prefills it to the one that decodes it.

    prefill                                   decode
      RESERVE   request ------------------->    takes pages, now or when there is room
      <--------------- GRANT  lease, page       pages before that one are known there already
      PAGES     lease, layer, page -------->    written as they come: layer by layer, chunk by chunk
      HAND_OVER lease, first token -------->    checks that nothing is missing, and goes on
      <--------------- ADOPTED                  the source's copy is free to be forgotten

The first token goes to the client as soon as it is drawn; it waits for none of this. Either side may DROP.
Both ends hold their pages under a lease: it ends with the peer, with the request's own deadline, or when
nothing has moved for `lease_seconds`. The two sides are `page_sender.py` and `page_receiver.py`.

PAGES: header: sequence = lease, layer, step = number of the first page within the sequence; tensors: latents
[n, ..] and index keys [n, ..] of n pages, in the cache's own format; by way of the host if they lie on a GPU.
PUSHED says the same of pages that come from GPU to GPU by the way that GRANT names (`page_ways.py`): n alone,
int64 [1]; epoch = the way's. A way that fails takes with it every lease that was granted with it.
"""

from dataclasses import dataclass

from model.pages import LayerPages
from workers.transport.protocol import Deadline
from workers.wire import Why

MESSAGE_BYTES = 8 * 2**20  # of pages in one message, or in one push
MOST_PUSHES = 4  # under way from one GPU to another: announced, and not known to have landed


@dataclass(frozen=True)
class Lease:
    """What both ends agree on: pages are worth something for the same weights only, and not for ever.

    `seconds` is how long a lease lives in which nothing moves; `digest` names the weights.
    """

    digest: str
    seconds: float


@dataclass(frozen=True)
class Lapse:
    """A request whose hand-over failed, for the client that waits for it."""

    uid: str
    why: Why


def at_once(pages: LayerPages) -> int:
    """How many pages of a layer go in one message, or in one push, at most."""
    return max(1, MESSAGE_BYTES // (pages.latents[0].nbytes + pages.index_keys[0].nbytes))


def why_over(deadline: Deadline) -> Why:
    """Why a lease is over: the request's own time, or somebody who does not go on."""
    return "timeout" if deadline.is_over else "replica_lost"


def sooner(one: Deadline, other: Deadline) -> Deadline:
    return min(one, other, key=lambda deadline: deadline.at)
