"""What the package spas_sage_attn 0.1.0 does, faults included, on the CPU: without the adapter's guards tests fail."""
import torch

from flashvsr_nb.small_caches import dequantize_blocks, quantize_blocks

arch = (8, 0)  # compute capability of the GPU that it pretends to run on


def block_sparse_sage2_attn_cuda(q, k, v, mask_id=None, dropout_p=0.0, scale=None, smooth_k=True, pvthreshd=50,
                                 attention_sink=False, tensor_layout="HND", output_dtype=torch.float16,
                                 return_sparsity=False):
    if tensor_layout == "NHD":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    assert q.size(-2) >= 128, "seq_len should be not less than 128."
    q, k, v = (x.contiguous() for x in (q, k, v))
    if q.dtype == torch.float32:
        q, k = q.half(), k.half()
    v = v.half()  # bfloat16 beyond 65,504 becomes infinite
    if smooth_k:
        km = k.mean(-2, keepdim=True)
    q8, k8 = quantize_blocks(q, 128), quantize_blocks(k - km, 64)  # smooth_k=False: km is not there
    assert q.size(-1) in (64, 128), "headdim should be in [64, 128]."
    mask = _read(mask_id, q.size(-2), k.size(-2))
    scale = q.size(-1) ** -0.5 if scale is None else scale
    score = dequantize_blocks(*q8, block=128) @ dequantize_blocks(*k8).mT * scale
    score = score.masked_fill(~mask, -torch.inf)
    p = (score - score.amax(-1, keepdim=True)).exp()
    out = torch.zeros_like(q, dtype=torch.float32)
    for pj, vj in zip(p.split(64, -1), v.split(64, -2)):
        tile = pj.float() @ vj.float()
        out += tile.half() if arch < (8, 9) else tile  # the old tensor cores add up a tile in float16
    out = out / p.sum(-1, keepdim=True)
    garbage = torch.where(torch.arange(out.size(-1)) % 2 == 0, torch.nan, 12345.0)  # rows without keys are not written
    out = torch.where(mask.any(-1, keepdim=True), out, garbage).to(q.dtype)
    out = out.transpose(1, 2) if tensor_layout == "NHD" else out
    return (out, 1 - mask.float().mean().item()) if return_sparsity else out


def _read(mask_id, lq, lk):
    "The mask token by token, as the kernel of this architecture finds it in memory."
    assert mask_id.dim() == 4 and mask_id.is_contiguous()  # None has no dim()
    bq, bk = (64, 128) if arch == (9, 0) else (128, 64)
    if arch == (9, 0) and lk % 128:
        raise SystemExit("padded_kv_len % 128: the process is aborted")
    shape = (*mask_id.shape[:2], -(-lq // bq), -(-lk // bk))
    if arch != (9, 0) and mask_id.shape != shape:
        raise RuntimeError(f"lut must have shape {shape}")
    mask = mask_id.flatten()[:torch.Size(shape).numel()].view(shape) != 0  # sm_90: whatever shape it had
    return mask.repeat_interleave(bq, -2)[..., :lq, :].repeat_interleave(bk, -1)[..., :lk]
