"""On a GPU: the official size within the memory that is claimed for it. Random weights, made where they are used."""
import pytest
import torch

from flashvsr_nb.dit import ModelConfig

pytestmark = [pytest.mark.cuda, pytest.mark.slow]


@pytest.fixture(scope="module")
def net():
    from bench_memory import model
    with torch.inference_mode():
        return model(ModelConfig.wan1_3b(), "cuda", torch.bfloat16)


@pytest.mark.parametrize("height, width, cap", [(192, 192, 4.5), (192, 352, 6), (256, 448, 7)])
def test_whole_frames_within_the_cap(net, height, width, cap):
    "Three chunks with KV caches in the host's memory; PyTorch may not reserve more than `cap` GiB."
    from bench_memory import case
    with torch.inference_mode():
        out = case(net, height, width, cap=cap, kind="offload", decoder_host=True, decoder_tile=(32, 16 * -(-4 * width // 128)))
    assert "error" not in out and out["peak_reserved"] <= 1024 * cap
    assert len(set(out["reserved_after"])) <= 2  # it does not grow


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
def test_one_block_in_rows(dtype, bound):
    from bench_memory import exactness
    with torch.inference_mode():
        assert exactness(ModelConfig.wan1_3b(), "cuda", dtype)["same_mask"]["largest"] <= bound
