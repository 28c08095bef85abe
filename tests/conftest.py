"""Everything runs offline: models come from packages or are made on the spot."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

# Model runs have no natural time limit; examples are few because each is a whole attribution.
settings.register_profile(
    "lig_lens", deadline=None, derandomize=True, max_examples=3, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("lig_lens")


@pytest.fixture
def ids() -> torch.Tensor:
    """Six tokens of the tiny vocabulary, none of them special."""
    return torch.tensor([5, 12, 30, 7, 22, 39])


@pytest.fixture
def corrupted_ids() -> torch.Tensor:
    return torch.tensor([8, 31, 12, 25, 6, 17])
