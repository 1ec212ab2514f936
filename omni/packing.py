"""
Rows laid end to end: how the networks compute on sequences of several lengths without padding.

Why: dialogues differ in length, and a batch that pads each to the longest spends half of its time on nothing.
Every layer but attention works on single positions, so it does not care where a row ends. Only attention
does: here the rows are gathered into rectangles of similar length, attended, and put back. It is registered
as an attention function of transformers, so Qwen2 stays theirs.
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
    if q.is_cuda:
        mask = None if causal else mask
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)
    # on CPU the backward of torch's fused attention is slower than plain products: 348 against 300 ms a step
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    weights = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if causal:
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        weights = weights.masked_fill(~mask, -torch.inf)
    return weights.float().softmax(-1).to(v.dtype) @ v


class Rows:
    """Rows of several lengths laid end to end, (T, ...) with T the sum of the lengths. The networks compute
    on these, so no position is padding. Only attention needs rows side by side: it gets rectangles of rows of
    similar length."""

    def __init__(self, lengths, device="cpu", tolerance=0.8):
        """lengths: list of the rows' lengths; tolerance: shortest row of a rectangle, as a share of its
        longest."""
        ends = torch.tensor(lengths).cumsum(0).tolist()
        groups = []
        for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
            if not groups or lengths[i] < tolerance * lengths[groups[-1][0]]:
                groups.append([])
            groups[-1].append(i)
        self.shapes = [(len(group), lengths[group[0]]) for group in groups]          # (B, L) of each
        rectangles = []
        for group, (_, L) in zip(groups, self.shapes):
            column = torch.arange(L)
            rows = [torch.where(column < lengths[i], ends[i] - lengths[i] + column, -1) for i in group]
            rectangles.append(torch.stack(rows))      # (B, L): place in T, or -1
        self.masks = []                               # of the keys, (B, 1, 1, L)
        for at in rectangles:
            ragged = bool((at < 0).any())
            self.masks.append((at >= 0)[:, None, None].to(device) if ragged else None)
        index = torch.cat([at.flatten() for at in rectangles])                       # (sum of B L,)
        back = torch.empty(ends[-1], dtype=torch.long)
        back[index[index >= 0]] = torch.arange(len(index))[index >= 0]
        self.index, self.back = index.to(device), back.to(device)
        self.position = torch.cat([torch.arange(n) for n in lengths]).to(device)     # (T,): place in its row

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
