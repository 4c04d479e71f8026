"""Random images, videos, sounds and time series of the sizes that a model's configuration names: a table by input name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from bmgraph.cli.config_fields import ConfigFields
from bmgraph.errors import InputError

IMAGE_SIDE, CHANNELS, FRAMES, SAMPLES = 224, 3, 16, 16_000
"""Sizes where neither configuration nor processor names one."""

SOUND_FRAMES = 25
"""Frames behind the convolutions of a model of raw sound."""


@dataclass(frozen=True)
class Sizes:
    """Where sizes are looked up; `model` is the name for messages."""

    fields: ConfigFields
    processor: ConfigFields
    rows: int
    model: str

    def of(self, rows: int) -> Sizes:
        """The same for another number of rows."""
        return replace(self, rows=rows)

    def noise(self, *shape: int) -> torch.Tensor:
        """f32[rows, *shape], the same for each call."""
        return torch.randn(self.rows, *shape, generator=torch.Generator().manual_seed(0))


def _side(found: Any) -> tuple[int, int] | None:
    """Height and width from a number, a pair, or a processor's dict."""
    if isinstance(found, dict):
        found = found.get("shortest_edge") or (found.get("height"), found.get("width"))
    if isinstance(found, int):
        return found, found
    if isinstance(found, (list, tuple)) and len(found) == 2 and all(isinstance(item, int) for item in found):
        return int(found[0]), int(found[1])
    return None


def _images(sizes: Sizes) -> torch.Tensor:
    """[B, channels, height, width]; of a model of videos [B, frames, channels, height, width]."""
    candidates = (
        sizes.fields.get("image_size"),
        sizes.processor.get("crop_size"),
        sizes.processor.get("size"),
    )
    height, width = next(filter(None, map(_side, candidates)), (IMAGE_SIDE, IMAGE_SIDE))
    shape = [
        sizes.fields.number("num_channels", "in_channels", "in_chans", otherwise=CHANNELS),
        height,
        width,
    ]
    frames = sizes.fields.number("num_frames")
    return sizes.noise(*([frames] if frames else []), *shape)


def _videos(sizes: Sizes) -> torch.Tensor:
    """[B, frames, channels, height, width]."""
    side = _side(sizes.fields.get("crop_size", "image_size")) or _side(
        sizes.processor.get("crop_size", "size")
    )
    frames = sizes.fields.number("frames_per_clip", "num_frames", otherwise=FRAMES)
    channels = sizes.fields.number("num_channels", "in_chans", "in_channels", otherwise=CHANNELS)
    return sizes.noise(frames, channels, *(side or (IMAGE_SIDE, IMAGE_SIDE)))


def _sound(sizes: Sizes) -> torch.Tensor:
    """Raw samples [B, T], with channels [B, C, T]; or, of a model that reads a spectrogram there, [B, T, bins]."""
    bins = sizes.fields.number("num_mel_bins")
    if bins:
        return sizes.noise(sizes.fields.number("max_length", otherwise=FRAMES), bins)
    strides = sizes.fields.get("conv_stride")
    samples = SOUND_FRAMES * prod(strides) + prod(strides) if isinstance(strides, (list, tuple)) else SAMPLES
    channels = sizes.fields.number("audio_channels")
    return sizes.noise(*([channels] if channels else []), samples)


def _sound_features(sizes: Sizes) -> torch.Tensor:
    """[B, T, features], or, of an encoder with a fixed number of positions, [B, bins, 2 T]."""
    per_frame = sizes.fields.number("input_feat_per_channel", "feature_projection_input_dim")
    if per_frame:
        return sizes.noise(SOUND_FRAMES * 2, per_frame)
    bins, positions = sizes.fields.number("num_mel_bins"), sizes.fields.number("max_source_positions")
    if bins and positions:
        return sizes.noise(bins, 2 * positions)
    raise InputError(
        f"{sizes.model} takes 'input_features', and its configuration does not say of which size (num_mel_bins with "
        "max_source_positions, or input_feat_per_channel): write a function that returns the model and an example batch, "
        "and give it as module:function"
    )


def _series(sizes: Sizes) -> torch.Tensor:
    """[B, context, channels]."""
    channels = sizes.fields.number("num_input_channels", "input_size", otherwise=1)
    return sizes.noise(sizes.fields.number("context_length", "seq_length", otherwise=32), channels)


MAKERS: dict[str, Callable[[Sizes], torch.Tensor]] = {
    "pixel_values": _images,
    "pixel_values_videos": _videos,
    "input_values": _sound,
    "input_features": _sound_features,
    "past_values": _series,
}
"""Name of an input -> what makes it."""
