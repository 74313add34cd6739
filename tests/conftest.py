import torch

# One thread a process: `make test` runs a process a core, and torch's threads that wait for each other by
# spinning slow everything down where processes share cores.
torch.set_num_threads(1)
