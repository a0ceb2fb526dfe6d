"""Autoencoders small enough to make on the spot, in the files of diffusers."""

from pathlib import Path

import torch
from diffusers import AutoencoderDC, AutoencoderKL


def make_tiny_vae(path: Path, seed: int = 0, factor: int = 8, latent_channels: int = 4, **arguments) -> Path:
    """An AutoencoderKL of some 60k random weights, saved at `path` as diffusers saves it."""
    levels = factor.bit_length()
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(8,) * (levels - 1) + (16,),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=latent_channels,
        **{"scaling_factor": 0.5, "force_upcast": False, **arguments},
    )
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(3)  # so that decoded images are not all grey
    vae.save_pretrained(path)
    return path


def make_tiny_dc(path: Path) -> Path:
    """An AutoencoderDC of factor 4 with 8 channels."""
    torch.manual_seed(0)
    AutoencoderDC(
        latent_channels=8,
        attention_head_dim=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        scaling_factor=0.4,
    ).save_pretrained(path)
    return path
