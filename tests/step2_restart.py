"""One of two processes that quantize different data; apart from the tests, so that it starts fast."""

import torch
import torch.distributed as dist

from Step2_GIDM.quantizer import VectorQuantizer


def restart_in_process(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    quantizer = VectorQuantizer(6, 3)
    torch.manual_seed(rank)  # every process sees other data
    quantizer(0.01 * torch.randn(4, 2, 3) + quantizer.codebook[rank].detach())
    usage = quantizer.usage.clone()
    quantizer.restart_unused()
    torch.save({"usage": usage, "codebook": quantizer.codebook.detach()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
