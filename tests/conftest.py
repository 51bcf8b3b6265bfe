"""What every test shares: which marks run here, a fixed seed, few threads, no network."""
import os
import random

import hypothesis
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run in Triton's interpreter; read when Triton is imported
torch.set_num_threads(min(torch.get_num_threads(), 4))  # tests are small; more threads only wait for each other
# Wall-clock deadlines fail on busy machines; on CI the examples are the same at every run.
hypothesis.settings.register_profile("flashvsr_nb", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("flashvsr_nb")


def pytest_collection_modifyitems(config, items):
    "Skip what this machine cannot run and what was not asked for by `-m`."
    asked = config.getoption("-m")
    reasons = {mark: f"run with -m {mark}" for mark in ("slow", "network") if mark not in asked}
    if not torch.cuda.is_available():
        reasons["cuda"] = "no CUDA device"
    for item in items:
        for mark, reason in reasons.items():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seed():
    "Every test starts from the same random state."
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture
def one_thread():
    "For tiny tensors: on a busy machine a second thread makes them many times slower."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Largest(TorchDispatchMode):
    "Inside the block: how many elements the largest tensor has that was made."

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else [out]
        self.elements = max([self.elements, *(t.numel() for t in made if torch.is_tensor(t))])
        return out
