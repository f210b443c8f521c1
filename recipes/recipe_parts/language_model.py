"""What recipes for causal language models do alike: perplexity, and what their cards name of a model."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PretrainedConfig

from recipes.recipe_parts.command_line import InputError
from recipes.recipe_parts.run_record import RecipeTrainer, whole_model


class LanguageModelTrainer(RecipeTrainer):
    """A recipe's Trainer that measures perplexity too."""

    task = "text-generation"
    sizes: ClassVar[Mapping[str, str]] = {
        "layers": "num_hidden_layers",
        "width": "hidden_size",
        "context": "max_position_embeddings",
        "vocabulary": "vocab_size",
    }
    quantities: ClassVar[Mapping[str, str]] = {"loss": "loss", "perplexity": "perplexity per token"}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model: Any = whole_model(self)
        # Transformers finds the loss by the class's name, and warns where that, as GPT-2's, does not name it.
        model.loss_type = model.loss_type or "ForCausalLM"

    def derived(self, name: str, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the perplexity."""
        try:
            return {f"{name}_perplexity": math.exp(metrics[f"{name}_loss"])}
        except OverflowError:
            return {f"{name}_perplexity": math.inf}


def require_context(config: PretrainedConfig, block_size: int) -> None:
    """Check that a model takes examples of `block_size` tokens.

    Raises:
        InputError: It does not.
    """
    context = getattr(config, "max_position_embeddings", block_size)
    if block_size > context:
        raise InputError(f"--block_size {block_size} exceeds the model's context of {context} tokens.")
