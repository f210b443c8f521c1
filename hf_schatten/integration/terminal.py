"""What a terminal shows of a training: transformers' progress bar and printed logs, without every layer's values."""

from __future__ import annotations

from typing import Any

from transformers import PrinterCallback, ProgressCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Arguments

from hf_schatten.adaptive.adaptation import Adaptation
from hf_schatten.integration.callback import unwrap_optimizer
from hf_schatten.report.log import MEDIAN, SUMMARY_PREFIX, summary, without_layers


class SchattenProgressCallback(ProgressCallback):
    """Transformers' progress bar with the median p, and without per-layer values, which would fill the terminal."""

    _shown_estimates = 0

    def on_train_begin(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Open the bar."""
        super().on_train_begin(args, state, control, **kwargs)
        self._shown_estimates = 0

    def on_step_end(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Advance the bar, and show the median p of every estimate, logged or not; after a resume, of the last one."""
        super().on_step_end(args, state, control, **kwargs)
        schatten = unwrap_optimizer(kwargs.get("optimizer"))
        if self.training_bar is None or schatten is None or not isinstance(schatten.policy, Adaptation):
            return
        if schatten.options.report != "none" and schatten.policy.estimates != self._shown_estimates:
            self._shown_estimates = schatten.policy.estimates
            self._show(summary(schatten.learned_p())[MEDIAN])

    def on_log(self, args: Arguments, state: State, control: Control, logs: Any = None, **kwargs: Any) -> None:
        """Write the logs above the bar, with the summary of p instead of every layer's; a schedule's p at the bar."""
        logs = logs or {}
        super().on_log(args, state, control, logs=without_layers(logs), **kwargs)
        median = logs.get(SUMMARY_PREFIX + MEDIAN)
        if self.training_bar is not None and median is not None:
            self._show(median)

    def _show(self, median: float) -> None:
        bar: Any = self.training_bar  # tqdm's, which transformers declares as None
        bar.set_postfix_str(f"median p {median:.3g}")


class SchattenPrinterCallback(PrinterCallback):
    """Transformers' printed logs, which a disabled progress bar leaves, without the per-layer values."""

    def on_log(self, args: Arguments, state: State, control: Control, logs: Any = None, **kwargs: Any) -> None:
        """Print the logs with the summary of p instead of every layer's."""
        super().on_log(args, state, control, logs=without_layers(logs or {}), **kwargs)
