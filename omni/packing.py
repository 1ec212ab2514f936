"""
Rows laid end to end: how the networks compute on sequences of several lengths without padding.

Why: dialogues differ in length, and a batch that pads each to the longest spends half of its time on nothing.
Every layer but attention works on single positions, so it does not care where a row ends. Only attention
does: here the rows are gathered into rectangles of similar length, attended, and put back. It is registered
as an attention function of transformers, so Qwen2 stays theirs.

Few shapes: oneDNN, which computes matrix products on CPUs, builds a new kernel for each shape that it meets,
and that takes longer than the product. So the sum of the lengths is rounded up, and on CPUs the sides of the
rectangles are too; what is added holds zeros, and nothing reads it.
"""
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


class Gather(torch.autograd.Function):
    """x[index], with zeros where the index is -1. `back` undoes `index`, so the gradient is gathered too and
    never added up: fast, and the same bits every time."""

    @staticmethod
    def forward(ctx, x, index, back):
        ctx.save_for_backward(index, back)
        return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[index]

    @staticmethod
    def backward(ctx, grad):
        index, back = ctx.saved_tensors
        return torch.cat([grad, grad.new_zeros(1, *grad.shape[1:])])[back], None, None


def attention(q, k, v, mask, causal):
    """q (B, H, L, d), k and v (B, H or fewer, L, d), mask of the keys (B, 1, 1, L) or None -> (B, H, L, d).

    Rows are padded on the right, so causal attention needs no mask.
    """
    in_bf16 = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if in_bf16 and not causal and torch.is_inference_mode_enabled():
        # a clip of 30 s, 1,500 positions, takes half the time by products; those of training are too short
        y, k = [], k.transpose(2, 3) * q.shape[-1] ** -0.5
        for some in q.split(512, 2):                  # so that the scores stay in a cache
            scores = some @ k
            y.append((scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1) @ v)
        return torch.cat(y, 2)
    if q.is_cuda or not causal or not torch.is_grad_enabled():
        mask = None if causal else mask
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)
    # on CPU the backward of torch's fused attention is slower than that of plain products
    B, H, L, d = q.shape
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1).flatten(0, 1) for x in (k, v))           # (B H, L, d)
    future = torch.full((L, L), -torch.inf, dtype=q.dtype).triu(1)
    weights = torch.baddbmm(future, q.flatten(0, 1), k.transpose(1, 2), alpha=d ** -0.5)
    weights = weights.softmax(-1, dtype=torch.float32).to(v.dtype)
    return (weights @ v).view(B, H, L, d)


def round_up(n, step=256):
    return -(-n // step) * step


def pad_to(x, n):
    """x (m, ...) -> (n, ...), with zeros after it."""
    return torch.cat([x, x.new_zeros(n - len(x), *x.shape[1:])])


class Rows:
    """Rows of several lengths laid end to end, (T, ...) with T the sum of the lengths, rounded up. The
    networks compute on these, so hardly a position is padding. Only attention needs rows side by side: it
    gets rectangles of rows of similar length."""

    def __init__(self, lengths, device="cpu", tolerance=0.8):
        """lengths: list of the rows' lengths; tolerance: shortest row of a rectangle, as a share of its
        longest."""
        ends = torch.tensor(lengths).cumsum(0).tolist()
        self.total = round_up(ends[-1])               # T
        groups = []
        for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
            if not groups or lengths[i] < tolerance * lengths[groups[-1][0]]:
                groups.append([])
            groups[-1].append(i)
        rectangles, self.masks = [], []               # masks of the keys, (B, 1, 1, L), or None
        steps = (4, 16) if torch.device(device).type == "cpu" else (1, 1)
        for group in groups:
            B, L = len(group), round_up(lengths[group[0]], steps[1])
            if B > steps[0]:                          # a clip alone should not cost as much as four
                B = round_up(B, steps[0])
            at = torch.full((B, L), -1)               # place in T, or -1
            for row, i in enumerate(group):
                at[row, :lengths[i]] = torch.arange(ends[i] - lengths[i], ends[i])
            rectangles.append(at)
            mask = at >= 0
            mask[len(group):] = True                  # rows of zeros: a softmax over no keys would be NaN
            self.masks.append(None if mask.all() else mask[:, None, None].to(device))
        self.shapes = [at.shape for at in rectangles]
        index = torch.cat([at.flatten() for at in rectangles])                       # (sum of B L,)
        back = torch.full((self.total,), -1)
        back[index[index >= 0]] = torch.arange(len(index))[index >= 0]
        self.index, self.back = index.to(device), back.to(device)
        position = torch.cat([torch.arange(n) for n in lengths])
        self.position = pad_to(position, self.total).to(device)       # (T,): place in its row

    def rectangles(self, x):
        """(T, H, d) -> for each rectangle (B, H, L, d)."""
        parts = Gather.apply(x, self.index, self.back).split([B * L for B, L in self.shapes])
        return [part.view(*shape, *x.shape[1:]).transpose(1, 2) for part, shape in zip(parts, self.shapes)]

    @torch.compiler.disable
    def attend(self, q, k, v, causal):
        """q (T, H, d), k and v (T, H or fewer, d) -> (T, H, d): a position sees its own row, if `causal` its
        past."""
        qkv = zip(self.rectangles(q), self.rectangles(k), self.rectangles(v), self.masks)
        y = [attention(q, k, v, mask, causal) for q, k, v, mask in qkv]
        return Gather.apply(torch.cat([x.transpose(1, 2).flatten(0, 1) for x in y]), self.back, self.index)


def qwen2_attention(module, q, k, v, mask, rows=None, **more):
    """Attention as Qwen2 calls it, q (B, H, L, d). With `rows`, B is 1 and L holds rows end to end; without,
    it streams."""
    if rows is None:
        return sdpa_attention_forward(module, q, k, v, mask, **more)
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))                               # (T, H, d)
    return rows.attend(q, k, v, causal=True)[None], None


AttentionInterface.register("rows", qwen2_attention)
AttentionMaskInterface.register("rows", sdpa_mask)
