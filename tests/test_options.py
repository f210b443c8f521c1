"""SchattenOptions: parsing, ranges, and errors that name the value and the fix."""

from __future__ import annotations

import math

import pytest

from hf_schatten import OptionError, SchattenOptions


def test_optim_args_parse_to_the_options_types():
    options = SchattenOptions.from_optim_args(
        "p=adaptive, p_interval=50,p_max=inf,nesterov=false,scale=muon,exclude=*.head;*.gate,schatten_lr_ratio=0.5"
    )
    assert options == SchattenOptions(
        p="adaptive",
        p_interval=50,
        p_max=math.inf,
        nesterov=False,
        scale="muon",
        exclude=("*.head", "*.gate"),
        schatten_lr_ratio=0.5,
    )


def test_the_range_of_the_estimate_may_reach_beyond_muon():
    options = SchattenOptions.from_optim_args("p_min=2,p_max=-5,p_init=inf")
    assert (options.p_min, options.p_max, options.initial_p) == (2.0, -5.0, math.inf)


def test_overrides_are_pairs_of_pattern_and_p():
    for text in ("*.c_proj:inf;*.h.0.*:-10", "*.c_proj:inf,*.h.0.*:-10"):
        assert SchattenOptions.from_mapping({"p_overrides": text}).overrides == {
            "*.c_proj": math.inf,
            "*.h.0.*": -10.0,
        }


@pytest.mark.parametrize("text", [None, "", " "])
def test_no_optim_args_are_the_defaults(text):
    assert SchattenOptions.from_optim_args(text) == SchattenOptions()


@pytest.mark.parametrize(("text", "p"), [("p=inf", math.inf), ("p=2.5", 2.5), ("p=1", 1.0), ("p=-10", -10.0)])
def test_a_fixed_p_is_every_matrixs_first_p(text, p):
    options = SchattenOptions.from_optim_args(text)
    assert options.initial_p == p
    assert not options.adaptive


def test_adaptive_p_starts_at_p_max_unless_told():
    assert SchattenOptions(p_max=20).initial_p == 20
    assert SchattenOptions(p_max=20, p_init=3).initial_p == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("p_intervall=50", "Unknown option 'p_intervall'. Did you mean 'p_interval'\\? The options are: criterion, "),
        ("zzz=1", "Unknown option 'zzz'. The options are: "),
        ("p_interval", "'p_interval', which is no name=value pair"),
        ("p_interval=", "'p_interval=', which is no name=value pair"),
        ("p=2,p=3", "names 'p' twice"),
        ("p_interval=often", "p_interval='often' is not allowed: it takes a whole number"),
        ("p_interval=2.5", "p_interval='2.5' is not allowed: it takes a whole number"),
        ("nesterov=maybe", "nesterov='maybe' is not allowed: it takes true or false"),
        ("p=fast", "p='fast' is not allowed: it takes 'adaptive', 'schedule', a number or inf"),
        ("p=0.5", "p=0.5 is not allowed: p is at least 1"),
        ("p=-2", "p=-2.0 is not allowed: p is at least 1"),
        ("p=nan", "p=nan is not allowed"),
        ("p_min=0.5", "p_min: p=0.5 is not allowed"),
        ("p_min=inf,p_max=-3", "p_max: p=-3.0 is not allowed"),
        ("p_min=-5,p_max=-4", "p_min=-5.0 is not allowed: 1 <= p_min <= p_max"),
        ("p_end=0.1", "p_end: p=0.1 is not allowed"),
        ("p_steps=0", "p_steps=0 is not allowed"),
        ("p_interval_growth=0.9", "p_interval_growth=0.9 is not allowed: a finite number, 1 or more"),
        ("criterion=best", "criterion='best' is not allowed: one of holder, alignment, decrease"),
        ("p_estimator=guess", "p_estimator='guess' is not allowed: one of exact, "),
        ("p_overrides=*.q_proj", "p_overrides has '\\*.q_proj', which is no pattern:p; write for example"),
        ("p_overrides=*.q_proj:two", "p_overrides='two' is not allowed: it takes a number"),
        ("p_overrides=*.q_proj:0.5", "p_overrides: p=0.5 is not allowed"),
        ("p_overrides=*.c_proj:inf,*.q_proj:2", "join several patterns by ';'"),
        ("p_min=5,p_max=4", "p_min=5.0 is not allowed"),
        ("p_max=4,p_init=5", "p_init=5.0 is not allowed"),
        ("p_interval=0", "p_interval=0 is not allowed"),
        ("p_ema_decay=1", "p_ema_decay=1.0 is not allowed"),
        ("scale=huge", "scale='huge' is not allowed: one of match_rms_adamw, muon, interpolate"),
        ("ns_steps=2", "ns_steps=2 is not allowed: one of 3, 4, 5, 6, 7, 8"),
        ("momentum=1", "momentum=1.0 is not allowed"),
        ("schatten_lr_ratio=0", "schatten_lr_ratio=0.0 is not allowed"),
    ],
)
def test_a_bad_option_names_the_value_and_the_fix(text, message):
    with pytest.raises(OptionError, match=message):
        SchattenOptions.from_optim_args(text)
