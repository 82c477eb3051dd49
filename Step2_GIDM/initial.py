"""Initial weights from which the codes are used early (`gidm.initial: early_codes`).

With the usual random weights the queries hardly depend on the frames and the decoder must first learn to
copy, so for a long time every pair gets the same codes and the decoder learns to do without them. These
weights keep the architecture and begin nearer to where training ends. Published weights, once loaded, replace
them.
"""

import torch
from torch import nn

from Step2_GIDM.blocks import SelfAttention
from Step2_GIDM.latent_action import LatentActionModel

CODE_SCALE = 0.3  # of the projection to the codes: with small vectors commitment does not outweigh the MSE
COPY_GAIN = 3.0  # of the decoder's input over its positions, which a copy would have to take out again


@torch.no_grad()
def use_codes_early(model: LatentActionModel) -> None:
    """Give a new model these weights; every other one keeps PyTorch's."""
    tokenizer, decoder = model.tokenizer, model.decoder
    start_as_difference(tokenizer.encoder.blocks[0].temporal)
    # Code vectors begin small and without offsets that all pairs share.
    from_codes = [tokenizer.from_code]
    if tokenizer.sizes.frozen_codes is not None:
        from_codes.append(tokenizer.from_frozen_code)
    for to_code, from_code in zip(tokenizer.encoder.to_code, from_codes):
        to_code.weight.mul_(CODE_SCALE)
        to_code.bias.zero_()
        from_code.bias.zero_()
    # The decoder begins by returning the earlier frame's tokens, up to what its blocks add.
    linear, norm = decoder.embed[1], decoder.embed[2]
    nn.init.orthogonal_(decoder.embed_patches.weight)
    nn.init.orthogonal_(linear.weight)
    norm.weight.fill_(COPY_GAIN)
    decoder.out.weight.copy_((linear.weight @ decoder.embed_patches.weight).T / COPY_GAIN)
    for layer in (decoder.embed_patches, linear, decoder.out):
        layer.bias.zero_()


@torch.no_grad()
def start_as_difference(temporal: SelfAttention) -> None:
    """Attention over time begins by subtracting the mean of the frames so far: what is left is motion."""
    value = temporal.qkv.weight.chunk(3)[2]
    nn.init.orthogonal_(value)
    temporal.out.weight.copy_(-value.T)
    temporal.out.bias.zero_()
