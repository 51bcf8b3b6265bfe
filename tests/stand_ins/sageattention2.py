"""What the package sageattention 2.x does and refuses, as far as it is used here: see `sageattention.py` beside it."""
import torch
from sageattention import dense


def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
    assert tensor_layout == "HND" and not is_causal and not return_lse, "the stand-in knows no other"
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert q.dtype == k.dtype == v.dtype and q.device == k.device == v.device
    assert q.shape[-1] <= 128
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    return dense(q, k - k.mean(2, keepdim=True), v, q.shape[-1] ** -0.5 if sm_scale is None else sm_scale)


sageattn_qk_int8_pv_fp16_triton = sageattn  # a name that 1.x does not have
