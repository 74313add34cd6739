"""How busy a worker is, as the router and the autoscaler see it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerLoad:
    """One engine's load.

    Attributes:
        waiting: requests that have got no token yet.
        running: requests that decode.
        parked: sequences that hold pages and do not run: reserved ones, and ones to be handed over.
        free_pages: pages that can be taken.
        num_pages: all pages.
        cached_pages: those of the free ones that hold a prefix, which would be forgotten.
        queued_tokens: tokens of prompts that have not been run.
    """

    waiting: int = 0
    running: int = 0
    parked: int = 0
    free_pages: int = 0
    num_pages: int = 0
    cached_pages: int = 0
    queued_tokens: int = 0
