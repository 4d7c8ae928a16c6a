"""Tests for a GPU, or for one that is not there."""

import pytest
import torch

needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are fewer than two GPUs")
