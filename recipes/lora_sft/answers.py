"""What a model answers to prompts, and whether its final answers are right."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedTokenizerBase, Trainer

from recipes.lora_sft.prompts import prompt_of
from recipes.recipe_parts.command_line import InputError
from recipes.recipe_parts.metrics import load_metric


class AnswerCheck:
    """Lets the model of a Trainer answer the prompts of examples, greedily, and counts the right answers.

    Args:
        tokenizer: Has an `eos_token`.
        pattern: What is compared, as `recipes/metrics/answer_match` takes it.
        max_new_tokens: Most tokens of an answer.

    Raises:
        InputError: The pattern is not a regular expression.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pattern: str, max_new_tokens: int) -> None:
        try:
            self._expression = re.compile(pattern)
        except re.error as error:
            raise InputError(f"--answer_pattern {pattern!r} is not a regular expression: {error}.") from error
        self._tokenizer, self._pattern = tokenizer, pattern
        self._metric = load_metric("answer_match")
        self._generation = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )

    def require_answers(self, examples: Dataset) -> None:
        """Check that the completions have answers to compare with.

        Raises:
            InputError: One has none.
        """
        for text in examples["completion"]:
            if not self._expression.search(text):
                raise InputError(
                    f"--answer_pattern {self._pattern!r} finds no answer in the completion {text!r}. Give a pattern "
                    "that fits the data, or no --max_new_tokens."
                )

    def share_right(self, trainer: Trainer, examples: Dataset) -> float:
        """Return the share of examples that the model answers right; every process takes its share of them.

        Args:
            trainer: Its model is left in evaluation mode.
            examples: From `prompts.make_examples`.
        """
        rank, processes = trainer.args.process_index, trainer.args.world_size
        own = range(rank, len(examples), processes)
        # Prompts of like length together: less padding.
        rows = sorted(own, key=lambda row: len(prompt_of(examples[row])))
        size = trainer.args.eval_batch_size
        answers: list[tuple[int, str]] = []
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            answers += zip(batch, self.answer(trainer, [prompt_of(examples[row]) for row in batch]), strict=True)
        everyone = dict(gather_object(answers))
        found = self._metric.compute(
            predictions=[everyone[row] for row in range(len(examples))],
            references=list(examples["completion"]),
            pattern=self._pattern,
        )
        return found["answer_match"]

    @torch.no_grad()
    def answer(self, trainer: Trainer, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Return the model's continuations of prompts, given as tokens."""
        model: Any = trainer.model
        model.eval()
        longest = max(map(len, prompts))
        # Padded on the left: every prompt ends where its answer begins.
        padding = [longest - len(prompt) for prompt in prompts]
        ids = [
            [self._tokenizer.eos_token_id] * missing + [*prompt]
            for missing, prompt in zip(padding, prompts, strict=True)
        ]
        mask = [[0] * missing + [1] * (longest - missing) for missing in padding]
        with trainer.accelerator.autocast():
            tokens = model.generate(
                input_ids=torch.tensor(ids, device=trainer.args.device),
                attention_mask=torch.tensor(mask, device=trainer.args.device),
                generation_config=self._generation,
                use_cache=True,
            )
        return self._tokenizer.batch_decode(tokens[:, longest:], skip_special_tokens=True)
