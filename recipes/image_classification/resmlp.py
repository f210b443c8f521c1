"""ResMLP, a classifier of images made of linear layers alone (H. Touvron et al., "ResMLP", 2021).

A block is two residual sublayers: one linear layer over the patches, the same for every channel, and a perceptron over
the channels, the same for every patch. transformers has no such model. This file has no other imports than torch and
transformers, and goes along with saved models: `AutoModelForImageClassification.from_pretrained(folder,
trust_remote_code=True)` loads them anywhere.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutputWithNoAttention


class ResMLPConfig(PretrainedConfig):
    """Sizes of a ResMLP.

    Args:
        image_size: Height and width of the images, in pixels.
        patch_size: Height and width of a patch, in pixels; divides `image_size`.
        num_channels: 1 for grey images, 3 for colour.
        hidden_size: Width: channels of a patch' embedding.
        num_hidden_layers: Blocks.
        mlp_ratio: Width of the perceptrons' hidden layer over `hidden_size`.
        layer_scale_init: What the learned factors of the sublayers' outputs begin with. The paper has 0.1 for 12
            blocks, 1e-5 for 24 and 1e-6 for 36 (section 2).
        initializer_range: Standard deviation of the initial weights.
    """

    model_type = "resmlp"

    def __init__(
        self,
        *,
        image_size: int = 224,
        patch_size: int = 16,
        num_channels: int = 3,
        hidden_size: int = 384,
        num_hidden_layers: int = 12,
        mlp_ratio: int = 4,
        layer_scale_init: float = 0.1,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        if image_size % patch_size:
            raise ValueError(f"patch_size {patch_size} does not divide image_size {image_size}.")
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.mlp_ratio = mlp_ratio
        self.layer_scale_init = layer_scale_init
        self.initializer_range = initializer_range
        super().__init__(**kwargs)

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2


class Affine(nn.Module):
    """A factor and an offset for each channel, in place of a norm (equation 1).

    Args:
        size: Channels.
        factor: What the factors begin with; the offsets begin with 0.
    """

    def __init__(self, size: int, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor
        self.weight = nn.Parameter(torch.full((size,), factor))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, hidden: Tensor) -> Tensor:
        """Scale and shift (…, channels)."""
        return hidden * self.weight + self.bias


class ResMLPLayer(GradientCheckpointingLayer):
    """One block: patches talk to each other, then channels do (equations 2 and 3)."""

    def __init__(self, config: ResMLPConfig) -> None:
        super().__init__()
        width, scale = config.hidden_size, config.layer_scale_init
        self.affine_before_patches = Affine(width)
        self.cross_patch = nn.Linear(config.num_patches, config.num_patches)
        self.affine_after_patches = Affine(width, scale)
        self.affine_before_mlp = Affine(width)
        self.fc1 = nn.Linear(width, config.mlp_ratio * width)
        self.fc2 = nn.Linear(config.mlp_ratio * width, width)
        self.affine_after_mlp = Affine(width, scale)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (B, patches, channels) from the same."""
        mixed = self.cross_patch(self.affine_before_patches(hidden).mT).mT  # its rows are the B · C channels
        hidden = hidden + self.affine_after_patches(mixed)
        inner = self.fc2(nn.functional.gelu(self.fc1(self.affine_before_mlp(hidden))))
        return hidden + self.affine_after_mlp(inner)


class ResMLPPreTrainedModel(PreTrainedModel):
    """What transformers must know of the model."""

    config_class = ResMLPConfig
    base_model_prefix = "resmlp"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ResMLPLayer"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, Affine):
            init.constant_(module.weight, module.factor)
            init.zeros_(module.bias)


class ResMLPModel(ResMLPPreTrainedModel):
    """The backbone: patches of an image in, one vector for each patch out."""

    def __init__(self, config: ResMLPConfig) -> None:
        super().__init__(config)
        self.patches = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.layers = nn.ModuleList(ResMLPLayer(config) for _ in range(config.num_hidden_layers))
        self.affine = Affine(config.hidden_size)
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """Return the last hidden state, (B, patches, channels), of images (B, colours, height, width).

        Raises:
            ValueError: The images have another size than the model.
        """
        size = self.config.image_size
        if pixel_values.shape[-2:] != (size, size):
            raise ValueError(f"images of {tuple(pixel_values.shape[-2:])} pixels; the model takes {size} by {size}.")
        hidden = self.patches(pixel_values).flatten(2).mT  # (B, patches, channels)
        for layer in self.layers:
            hidden = layer(hidden)
        return BaseModelOutput(last_hidden_state=self.affine(hidden))


class ResMLPForImageClassification(ResMLPPreTrainedModel):
    """The backbone, the mean over its patches, and a linear classifier."""

    def __init__(self, config: ResMLPConfig) -> None:
        super().__init__(config)
        assert config.num_labels is not None
        self.resmlp = ResMLPModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutputWithNoAttention:
        """Return logits (B, classes), and the mean cross entropy where there are labels (B,)."""
        logits = self.classifier(self.resmlp(pixel_values).last_hidden_state.mean(dim=1))
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


AutoConfig.register("resmlp", ResMLPConfig, exist_ok=True)
AutoModel.register(ResMLPConfig, ResMLPModel, exist_ok=True)
AutoModelForImageClassification.register(ResMLPConfig, ResMLPForImageClassification, exist_ok=True)
ResMLPConfig.register_for_auto_class()
ResMLPModel.register_for_auto_class("AutoModel")
ResMLPForImageClassification.register_for_auto_class("AutoModelForImageClassification")
