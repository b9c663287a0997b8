import os

# Two workers share the cores with each other; one thread each also makes sums reproducible.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("default")
