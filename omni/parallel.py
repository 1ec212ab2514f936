"""
One process, several with the whole model each (DDP), or several that share the model out (FSDP 2).

Why a file: the loop in train.py is the same in all three cases. What differs is here: where weights come
from, who holds them, when gradients are summed, and how the states are gathered for a checkpoint, which is
the same whoever wrote it: stop with one process, continue with eight.

How: the launcher decides. `accelerate launch` with a file of config/accelerate/ that names FSDP shards the
model; more than one process without it is DDP. Accelerate's own FSDP makes the loss bf16 and ignores CPUs, so
torch's `fully_shard` is called here: fp32 masters, fp32 sums, tested on CPUs.
"""
import contextlib
import dataclasses
import datetime
import os
import sys

import accelerate
import torch
import torch.distributed as dist
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from model import Omni, SpeechEncoder
from omni.configure import fail

# what is trained, gathered on the first process, also when sharded
TRAINED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def flag(name):
    """Is an environment variable of `accelerate launch` set to true?"""
    return os.environ.get(name, "false").lower() == "true"


def start(precision, tracker, out_dir):
    """Join the other processes, if there are any.

    Returns (accelerator, sharding): None, "gpu" (FSDP 2), or "cpu" (FSDP 2 with weights and optimizer in the
    machine's memory).
    """
    sharding = None
    if flag("ACCELERATE_USE_FSDP"):
        sharding = "cpu" if flag("FSDP_OFFLOAD_PARAMS") else "gpu"
        del os.environ["ACCELERATE_USE_FSDP"]         # or Accelerate shards by itself
    no_gpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    group = InitProcessGroupKwargs(timeout=datetime.timedelta(hours=3))      # to write 200 GB
    if sharding == "cpu" and not no_gpu:
        group.backend = "cuda:nccl,cpu:gloo"          # gradient norms are summed where the gradients are
    accelerator = accelerate.Accelerator(
        cpu=no_gpu,                                   # said aloud, or it ignores torchrun on CPU
        mixed_precision=precision, project_dir=out_dir, log_with=None if tracker == "none" else tracker,
        kwargs_handlers=[group])
    if accelerator.device.type == "cpu":              # `accelerate launch` leaves each process one thread
        here = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        torch.set_num_threads(max(1, os.cpu_count() // here))
    return accelerator, sharding


def build(load):
    """Call load() -> (omni, tokenizer, tts_tokenizer) in the first process only: the others get the shapes
    now and the weights from `wrap`. So a machine holds one model, not one per GPU, and only one process
    downloads.

    If load() raises OSError, ValueError or RuntimeError, fail() with its text: the first process says it.
    """
    first = accelerate.PartialState().is_main_process
    plan, problem = [None], None
    if first:
        try:
            omni, *tokenizers = load()
            encoder = omni.model.speech_encoder
            sizes = (encoder.n_mels, *encoder.positional_embedding.shape, encoder.blocks[0].attn.n_head,
                     len(encoder.blocks))
            plan = [(omni.config, sizes, tokenizers)]
        except (OSError, ValueError, RuntimeError) as e:
            problem = e
    broadcast_object_list(plan)
    if problem:
        fail(f"the model cannot be loaded: {problem}")
    if plan[0] is None:
        raise SystemExit(2)                           # the first process says why
    if not first:
        config, sizes, tokenizers = plan[0]
        with torch.device("meta"):
            omni = Omni(config, SpeechEncoder(*sizes))
            if "lora_rank" in config:
                omni.add_lora(config["lora_rank"])
        omni.to_empty(device="cpu")                   # memory that nobody touches costs nothing
        omni.tie()                                    # to_empty unties
    return omni, *tokenizers


def once(make):
    """make()'s result in all processes: the first one calls it, the others wait for what it sends."""
    result = [make() if accelerate.PartialState().is_main_process else None]
    broadcast_object_list(result)
    return result[0]


def wrap(omni, accelerator, sharding):
    """Put the model where it is trained, with the weights of the first process -> the module to call."""
    if not sharding:
        return accelerator.prepare(omni.to(accelerator.device))      # DDP sends out parameters and buffers
    weights = omni.state_dict() if accelerator.is_main_process else {}
    precision = MixedPrecisionPolicy()
    if accelerator.mixed_precision == "bf16":
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    offload = OffloadPolicy()
    if sharding == "cpu":
        offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    layers = [module for module in omni.modules() if isinstance(module, Qwen2DecoderLayer)]
    for module in (*layers, omni):
        fully_shard(module, mp_policy=precision, offload_policy=offload)
    if accelerator.num_processes > 1:
        set_model_state_dict(omni, weights, options=FROM_FIRST)
        for buffer in omni.buffers():                 # those that no state dict holds, too
            dist.broadcast(buffer, 0)
    return omni


def accumulate(model, last):
    """A context for a micro-batch. DDP sums gradients over processes once a step, after the `last` one.
    Sharded, each micro-batch's gradients go where they belong at once, or every process would hold all of
    them."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


def clip(model, max_norm):
    """Scale the gradients to at most max_norm (0: leave them) -> their norm before, a tensor."""
    trained = [p for p in model.parameters() if p.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(trained, max_norm or torch.inf)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@contextlib.contextmanager
def unsharded(omni):
    """Every process has the whole model for a while, so that each can evaluate and talk at its own pace."""
    shards = [module for module in omni.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in shards:
        module.set_reshard_after_forward(True, recurse=False)
        module.reshard()


def get_states(omni, optimizers):
    """(weights, optimizer state) of what is trained, whole, by parameter name, on the first process. All take
    part."""
    weights = get_model_state_dict(omni, options=TRAINED)
    return weights, get_optimizer_state_dict(omni, optimizers, options=TRAINED)


def set_optimizers(omni, optimizers, states):
    """The reverse; `states` is only looked at in the first process. All take part."""
    options = dataclasses.replace(TRAINED, broadcast_from_rank0=accelerate.PartialState().num_processes > 1)
    set_optimizer_state_dict(omni, optimizers, states, options=options)


def end(accelerator):
    """Close the trackers; on CPU end a process of several at once, since gloo's threads sometimes abort one
    that ends while others do."""
    accelerator.end_training()
    if accelerator.device.type == "cpu" and accelerator.num_processes > 1:
        sys.stdout.flush()
        os._exit(0)
