"""Steps of a quantizer on shares of the same samples; apart from the tests, so that processes start fast."""

import torch
import torch.distributed as dist
from torch import Tensor

from Step2_GIDM.quantizer import VectorQuantizer

STEPS, BATCH, QUERIES = 80, 8, 2  # more vectors than are kept


def quantize(micro_batches: int, *, rank: int = 0, processes: int = 1) -> dict[str, Tensor]:
    """What a quantizer that restarts after every twentieth step knows in the end.

    The vectors wander off, so that their number of used codes, and what they restart at, keeps changing.
    """
    torch.manual_seed(0)
    quantizer, restarted = VectorQuantizer(6, 3), 0
    for step in range(1, STEPS + 1):
        stream = 0.1 * torch.randn(BATCH, QUERIES, 3) + step / STEPS
        for share in stream[rank::processes].chunk(micro_batches):
            quantizer(share)
        if step % 20 == 10:
            restarted += quantizer.restart_unused()
    return {**quantizer.state_dict(), "restarted": torch.tensor(restarted)}


def quantize_in_process(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save(quantize(2, rank=rank, processes=2), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
