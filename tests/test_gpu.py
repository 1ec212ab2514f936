"""The same code on a CUDA device. Where there is none, these checks say that they did not run."""
import pytest
import torch
from conftest import generate, load

from data import collate
from model import SPEECH, STAGES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(),
                                reason="GPU check: no CUDA device here, NOT RUN")


@pytest.mark.parametrize("stage", STAGES)
def test_loss_on_gpu_is_that_of_cpu(items, stage):
    batch = collate(items)
    omni = load()[0]
    loss, targets, _ = omni(batch, stage)
    on_gpu = {key: x.cuda() if torch.is_tensor(x) else x for key, x in batch.items()}
    gpu_loss, gpu_targets, _ = omni.cuda()(on_gpu, stage)
    torch.testing.assert_close(gpu_loss.cpu(), loss, rtol=1e-3, atol=0)
    assert gpu_targets == targets


def test_greedy_reply_on_gpu_is_that_of_cpu(items):
    """Text and units, through both caches."""
    omni = load()[0].eval()
    prompt, mels = [1, 2, 3, SPEECH, 4], items[0]["mels"]

    def reply():
        return list(generate(omni, prompt, mels, eos=-1, max_tokens=7, max_units=30, temperature=0.0))

    here = reply()
    omni.cuda()
    assert reply() == here
