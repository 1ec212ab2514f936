"""The same code on a CUDA device. Where there is none, these checks say that they did not run."""
import pytest
import torch
from conftest import load

from data import collate
from model import STAGES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU check: no CUDA device here, NOT RUN")


@pytest.mark.parametrize("stage", STAGES)
def test_loss_on_gpu_is_that_of_cpu(items, stage):
    batch = collate(items)
    omni = load()[0]
    loss, targets, _ = omni(batch, stage)
    on_gpu = omni.cuda()({k: v.cuda() if torch.is_tensor(v) else v for k, v in batch.items()}, stage)
    torch.testing.assert_close(on_gpu[0].cpu(), loss, rtol=1e-3, atol=0)
    assert on_gpu[1] == targets


def test_greedy_reply_on_gpu_is_that_of_cpu(items):
    """Text and units, through both caches."""
    omni = load()[0].eval()
    ask = lambda: list(omni.generate([1, 2, 3, -200, 4], items[0]["mels"], eos=-1, max_tokens=7, max_units=30, temperature=0.0))
    here = ask()
    omni.cuda()
    assert ask() == here
