"""What a run leaves for people: log entries, pictures, and the optimizer's section of the model card."""

from hf_schatten.report.card import card_section, read_card_section, write_card_section
from hf_schatten.report.figures import draw_log, plot_choices, plot_p_by_layer, plot_updates
from hf_schatten.report.log import log_entry, summary_entry

__all__ = [
    "card_section",
    "draw_log",
    "log_entry",
    "plot_choices",
    "plot_p_by_layer",
    "plot_updates",
    "read_card_section",
    "summary_entry",
    "write_card_section",
]
