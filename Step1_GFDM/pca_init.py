"""A VAE that starts as a linear code of the picture instead of from noise.

A video autoencoder trained from scratch spends most of a short run on finding out what colour is where. So
its weights start with a linear path through the network, with the residual blocks adding nothing yet:

- Encoder: at each halving of the resolution the principal components of 2x2 neighbourhoods are kept, the
  latent being the leading ones with unit deviation. A pair (+a, -a) carries each component through the last
  norm and SiLU, because silu(a) - silu(-a) = a.
- Decoder: the mean colour of each latent pixel, by least squares, enlarged bilinearly.

Everything else keeps its random weights and learns from there.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLTemporalDecoder
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D, TemporalResnetBlock
from jaxtyping import Float
from torch import Tensor, nn

LOG_VARIANCE = -6.0  # of the posterior at the start
TENT = torch.tensor([0.25, 0.5, 0.25])  # enlarges bilinearly
Images = Float[Tensor, "N 3 H W"]


@torch.no_grad()
def start_from_principal_components(vae: AutoencoderKLTemporalDecoder, images: Images) -> None:
    """Set the linear path in a new VAE, from some hundred training images in [-1, 1]."""
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D | TemporalResnetBlock):
            _clear(module.conv2)
        elif isinstance(module, Attention):
            _clear(module.to_out[0])
    _set_encoder(vae, images)
    _set_decoder(vae, images)


def _clear(layer: nn.Module, outputs: int | None = None) -> None:
    """The first outputs of a layer (None: all) become zero, to be filled in."""
    layer.weight[:outputs] = 0
    layer.bias[:outputs] = 0


def _pass_on(layer: nn.Conv2d | nn.Conv3d | None, channels: int) -> None:
    """The first channels go through a convolution (centre tap) or a missing shortcut unchanged."""
    if layer is not None:
        _clear(layer, channels)
        centre = (range(channels), range(channels), *(size // 2 for size in layer.kernel_size))
        layer.weight[centre] = 1


def _set_encoder(vae: AutoencoderKLTemporalDecoder, images: Images) -> None:
    encoder, latent, path = vae.encoder, vae.config.latent_channels, images
    _pass_on(encoder.conv_in, 3)
    *halving, last = encoder.down_blocks
    for block in halving:
        _pass_on(block.resnets[0].conv_shortcut, path.shape[1])
        layer, final = block.downsamplers[0].conv, block is halving[-1]
        keep = latent if final else min(4 * path.shape[1], layer.out_channels)
        weight, bias = _principal_components(path, keep, unit=final)
        if final:  # pairs (+a, -a), neighbours so that they share a group of the norm
            weight, bias = (torch.stack([each, -each], 1).flatten(0, 1) for each in (weight, bias))
        outputs, inputs = weight.shape[:2]
        _clear(layer, outputs)
        layer.weight[:outputs, :inputs, :2, :2] = weight
        layer.bias[:outputs] = bias
        path = F.conv2d(path, weight, bias, stride=2)
    _pass_on(last.resnets[0].conv_shortcut, 2 * latent)
    _clear(encoder.conv_out, 2 * latent)
    for i in range(latent):
        encoder.conv_out.weight[i, 2 * i : 2 * i + 2, 1, 1] = torch.tensor([1.0, -1.0])
    encoder.conv_out.bias[latent:] = LOG_VARIANCE
    _pass_on(vae.quant_conv, 2 * latent)


def _principal_components(path: Tensor, keep: int, *, unit: bool) -> tuple[Tensor, Tensor]:
    """Weight [keep, C, 2, 2] and bias of the convolution onto the leading components of 2x2 squares."""
    patches = F.unfold(path, 2, stride=2).transpose(1, 2).flatten(0, 1)
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    weight = vectors.T.flip(0)[:keep]
    weight = weight * weight.sum(1, keepdim=True).sign()  # the same signs on any machine
    if unit:
        weight = weight / values.flip(0)[:keep, None].clamp_min(1e-8).sqrt()
    return weight.unflatten(1, (path.shape[1], 2, 2)), -weight @ mean


def _set_decoder(vae: AutoencoderKLTemporalDecoder, images: Images) -> None:
    decoder, latent = vae.decoder, vae.config.latent_channels
    codes = vae.encode(images).latent_dist.mode()
    colours = F.adaptive_avg_pool2d(images, codes.shape[-2:])
    inputs = F.pad(codes, (0, 0, 0, 0, 0, 1), value=1).movedim(1, -1).flatten(0, 2)
    solution = torch.linalg.lstsq(inputs, colours.movedim(1, -1).flatten(0, 2)).solution.T
    _clear(decoder.conv_in, 3)
    decoder.conv_in.weight[:3, :, 1, 1] = solution[:, :latent]
    decoder.conv_in.bias[:3] = solution[:, latent]
    channels, last = 3, len(decoder.up_blocks) - 1
    for i, block in enumerate(decoder.up_blocks):
        _pass_on(block.resnets[0].spatial_res_block.conv_shortcut, channels)
        if i < last:
            layer, channels = block.upsamplers[0].conv, 6 if i == last - 1 else 3
            _clear(layer, channels)
            for c in range(channels):  # the last time pairs (+a, -a), as in the encoder
                layer.weight[c, c % 3] = TENT[:, None] * TENT * (1 if c < 3 else -1)
    # Scale and shift after the last norm that give the colours their mean and deviation back.
    norm, axes, seen = decoder.conv_norm_out, (0, 2, 3), []
    hook = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    vae.decode(codes, num_frames=1)
    hook.remove()
    before = seen[0][:, :6]
    after = F.group_norm(seen[0], norm.num_groups, eps=norm.eps)[:, :6]
    centred = after - after.mean(axes, keepdim=True)
    norm.weight[:6] = (centred * before).mean(axes) / centred.square().mean(axes).clamp_min(1e-8)
    norm.bias[:6] = before.mean(axes) - norm.weight[:6] * after.mean(axes)
    _clear(decoder.conv_out, 3)
    for c in range(3):
        decoder.conv_out.weight[c, c, 1, 1] = 1
        decoder.conv_out.weight[c, c + 3, 1, 1] = -1
    _pass_on(decoder.time_conv_out, 3)
