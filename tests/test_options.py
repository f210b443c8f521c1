"""SchattenOptions: parsing, ranges, and errors that name the value and the fix."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from hf_schatten import OptionError, SchattenOptions
from hf_schatten.option_text import json_ready


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
    options = SchattenOptions.from_optim_args("p=adaptive,p_min=2,p_max=-5,p_init=inf")
    assert (options.p_min, options.p_max, options.initial_p) == (2.0, -5.0, math.inf)


def test_a_path_may_look_like_options():
    for path in ("runs/p=4/checkpoint-500", "runs/a;b=4"):
        assert SchattenOptions.from_optim_args(f"p=adaptive,p_init={path}").p_init == path


def test_overrides_are_pairs_of_pattern_and_p():
    for text in ("*.c_proj:inf;*.h.0.*:-10", "*.c_proj:inf,*.h.0.*:-10"):
        assert SchattenOptions.from_mapping({"p_overrides": text}).overrides == {
            "*.c_proj": math.inf,
            "*.h.0.*": -10.0,
        }


def test_schattor_and_preconditioning_are_names_and_orders():
    options = SchattenOptions.from_optim_args(
        "p=4,step_rule=regularized,coupling_order=inf,coupling_weights=sqrt_n_over_m,precondition=muadam"
    )
    assert (options.step_rule, options.coupling_order) == ("regularized", math.inf)
    assert (options.coupling_weights, options.precondition) == ("sqrt_n_over_m", "muadam")
    assert SchattenOptions.from_optim_args("coupling_order=none,scale=none").coupling_order is None


def test_a_range_that_the_estimate_does_not_use_does_not_count_against_the_step_rule():
    assert SchattenOptions.from_optim_args("p=4,step_rule=ball,p_max=-10,p_schedule=4:-10").initial_p == 4


def test_a_target_goes_with_a_number_for_p():
    assert SchattenOptions.from_optim_args("p=inf,target=soft_threshold:0.1").target == "soft_threshold:0.1"
    assert SchattenOptions.from_optim_args("target=power") == SchattenOptions()


@pytest.mark.parametrize("text", [None, "", " "])
def test_no_optim_args_are_the_defaults(text):
    assert SchattenOptions.from_optim_args(text) == SchattenOptions()


@pytest.mark.parametrize(("text", "p"), [("p=inf", math.inf), ("p=2.5", 2.5), ("p=1", 1.0), ("p=-10", -10.0)])
def test_a_fixed_p_is_every_matrixs_first_p(text, p):
    options = SchattenOptions.from_optim_args(text)
    assert options.initial_p == p
    assert not options.adaptive


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("p=schedule", (4.0, math.inf, None)),
        ("p=schedule,p_schedule=4:-5", (4.0, -5.0, None)),
        ("p=schedule,p_schedule=inf:1:300", (math.inf, 1.0, 300)),
    ],
)
def test_a_schedule_is_its_ends_and_perhaps_its_steps(text, schedule):
    options = SchattenOptions.from_optim_args(text)
    assert options.schedule == schedule
    assert options.initial_p == schedule[0]
    assert not options.adaptive


@pytest.mark.parametrize("level", ["full", "summary", "none"])
def test_a_run_reports_as_much_as_asked_for(level):
    assert SchattenOptions.from_optim_args(f"report={level}").report == level
    assert SchattenOptions().report == "full"


def test_options_are_given_whole_or_one_by_one():
    whole = SchattenOptions(p=4.0)
    assert SchattenOptions.given(whole, {}) is whole
    assert SchattenOptions.given(whole, {}, p=2.0) is whole
    assert SchattenOptions.given(None, {"p": 4, "p_overrides": ["*.c_proj:2"]}) == SchattenOptions(
        p=4, p_overrides=("*.c_proj:2",)
    )
    assert SchattenOptions.given(None, {"nesterov": "false"}, p=math.inf) == SchattenOptions(
        p=math.inf, nesterov=False
    )
    assert SchattenOptions.given(None, {"p": 2}, p=math.inf).p == 2
    with pytest.raises(OptionError, match="p, nesterov and options are both given: put all of them into options"):
        SchattenOptions.given(whole, {"p": 4, "nesterov": True})
    with pytest.raises(OptionError, match=r"options=0\.001 is not a SchattenOptions; .* Write lr=0\.001"):
        SchattenOptions.given(0.001, {})
    with pytest.raises(OptionError, match="Did you mean 'p_interval'"):
        SchattenOptions.given(None, {"p_intervall": 4})


def test_what_json_does_not_know_is_written_as_it_is_parsed():
    found = json_ready({"p": math.inf, "lr": torch.tensor(0.5), "betas": (np.float32(0.25), 1), "target": math.sqrt})
    assert found == {"p": "inf", "lr": 0.5, "betas": [0.25, 1], "target": "function:sqrt"}
    assert type(found["lr"]) is type(found["betas"][0]) is float


def test_there_are_no_more_options_than_a_reader_can_learn():
    assert len(dataclasses.fields(SchattenOptions)) <= 30  # lr_ratios, the last: no flag of a Trainer says it


@pytest.mark.parametrize(
    ("text", "instead"),
    [
        ("sync=gram", "The option 'sync' is gone: processes average their statistics; .* raise probe_rows"),
        ("split_fused=false", r"The option 'split_fused' is gone; write fused_parts=\*: to leave every fused"),
        ("workspace_mib=64", "The option 'workspace_mib' is a constant now; leave it out"),
        ("buffer_mib=64", "The option 'buffer_mib' is a constant now; leave it out"),
        ("share_processes=8", "The option 'share_processes' is a constant now; leave it out"),
        ("criterion=holder", "The option 'criterion' is gone: p=adaptive has one criterion, which was holder"),
        ("p_interval_growth=2", "The option 'p_interval_growth' is gone; raise p_interval"),
        ("p_groups=*.mlp.*", "The option 'p_groups' is gone: .* p_overrides=PATTERN:P"),
        ("p_start=2", "The option 'p_start' is part of p_schedule; write p_schedule=START:END or"),
        ("p=schedule,p_end=-5", "The option 'p_end' is part of p_schedule"),
        ("p_steps=300", "The option 'p_steps' is part of p_schedule; .* such as p_schedule=4:inf:1000"),
        ("precondition_exponent=fixed", r"gone; write precondition=adam \(scaled\) or precondition=muadam \(-1/4\)"),
        (
            "precondition=adafactor",
            "precondition='adafactor' is not allowed: it is gone; use adam, which keeps 4 bytes",
        ),
        ("p_estimator=submatrix", "p_estimator='submatrix' is not allowed: it is gone; use lanczos"),
        ("p_estimator=lowrank", "p_estimator='lowrank' is not allowed: it is gone; use lanczos"),
        ("p_estimator=exact32", "p_estimator='exact32' is not allowed: it is gone; use exact"),
    ],
)
def test_an_option_that_is_gone_says_what_to_write_instead(text, instead):
    with pytest.raises(OptionError, match=instead):
        SchattenOptions.from_optim_args(text)


def test_adaptive_p_starts_at_p_max_unless_told():
    assert SchattenOptions(p="adaptive", p_max=20).initial_p == 20
    assert SchattenOptions(p="adaptive", p_max=20, p_init=3).initial_p == 3


def test_p_and_the_largest_estimate_are_minus_four_unless_told():
    assert SchattenOptions().p == SchattenOptions().initial_p == -4
    assert SchattenOptions(p="adaptive").largest_p == SchattenOptions(p="adaptive").initial_p == -4


def test_the_largest_p_is_one_for_which_the_step_rule_has_a_norm():
    assert SchattenOptions(p="adaptive", step_rule="ball").largest_p == 100
    assert SchattenOptions(p="adaptive", step_rule="ball", p_max=math.inf).largest_p == math.inf


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "p_intervall=50",
            "Unknown option 'p_intervall'. Did you mean 'p_interval'\\? The options are: compute_dtype, ",
        ),
        (
            "lr=1e-3",
            "'lr' is not an option of schatten_p: set --learning_rate of TrainingArguments, or the argument",
        ),
        ("learning_rate=1e-3", "set --learning_rate of TrainingArguments"),
        ("weight_decay=0.1", "set --weight_decay of TrainingArguments"),
        ("p=inf,betas=0.9", "set --adam_beta1 and --adam_beta2 of TrainingArguments, or the argument betas of"),
        ("adam_beta2=0.95", "set --adam_beta1 and --adam_beta2 of TrainingArguments"),
        ("eps=1e-6", "set --adam_epsilon of TrainingArguments, or the argument eps of"),
        (
            "p=adaptive;p_interval=5",
            "'p=adaptive;p_interval=5': separate options by commas, as before 'p_interval'; semicolons join the",
        ),
        ("exclude=*.gate;*.mlp.*; p = 4", "separate options by commas, as before 'p'"),
        ("nesterov=false p_interval=5", "'nesterov=false p_interval=5': separate options by commas"),
        ("zzz=1", "Unknown option 'zzz'. The options are: "),
        ("p_interval", "'p_interval', which is not a name=value pair"),
        ("p_interval=", "'p_interval=', which is not a name=value pair"),
        ("p=2,p=3", "names 'p' twice"),
        ("p_interval=often", "p_interval='often' is not allowed: it takes a whole number"),
        ("p_interval=2.5", "p_interval='2.5' is not allowed: it takes a whole number"),
        ("nesterov=maybe", "nesterov='maybe' is not allowed: it takes true or false"),
        ("p=fast", "p='fast' is not allowed: it takes 'adaptive', 'schedule', a number or inf"),
        ("p=0.5", "p=0.5 is not allowed: p is at least 1"),
        ("p=-2", "p=-2.0 is not allowed: p is at least 1"),
        ("p=nan", "p=nan is not allowed"),
        ("p_min=0.5", "p_min=0.5 is not allowed: p is at least 1"),
        ("p_min=inf,p_max=-3", "p_max=-3.0 is not allowed: p is at least 1"),
        ("p_min=-5,p_max=-4", "p_min=-5.0 is not allowed: 1 <= p_min <= p_max"),
        ("p_schedule=4:0.1", "p_schedule: END=0.1 is not allowed: p is at least 1"),
        ("p_schedule=-1:4", "p_schedule: START=-1.0 is not allowed: p is at least 1"),
        ("p_schedule=4", "p_schedule='4' is not allowed: write START:END, or START:END:STEPS with 1 step or more"),
        ("p_schedule=4:inf:0", "p_schedule='4:inf:0' is not allowed: write START:END, or START:END:STEPS with 1 step"),
        ("p_schedule=4:inf:2.5", "p_schedule='4:inf:2.5' is not allowed: write START:END"),
        ("p_schedule=4:inf:9:9", "p_schedule='4:inf:9:9' is not allowed: write START:END"),
        ("p_schedule=slow:fast", "p_schedule='slow:fast' is not allowed: write START:END"),
        ("report=loud", "report='loud' is not allowed: one of full, summary, none"),
        ("p_estimator=guess", "p_estimator='guess' is not allowed: one of auto, exact, "),
        (
            "p_overrides=*.q_proj",
            "p_overrides has '\\*.q_proj', which is not pattern:p; write for example",
        ),
        ("p_overrides=*.q_proj:two", "p_overrides='two' is not allowed: it takes a number"),
        ("p_overrides=*.q_proj:0.5", "p_overrides: \\*.q_proj=0.5 is not allowed: p is at least 1"),
        (
            "lr_ratios=*.q_proj",
            "lr_ratios has '\\*.q_proj', which is not pattern:factor; write for example",
        ),
        ("lr_ratios=*.q_proj:half", "lr_ratios='half' is not allowed: it takes a number"),
        ("lr_ratios=*.q_proj:0", "lr_ratios has '\\*.q_proj:0', whose factor is not a positive finite number"),
        ("lr_ratios=*.q_proj:inf", "lr_ratios has '\\*.q_proj:inf', whose factor is not a positive finite number"),
        ("p_overrides=*.c_proj:inf,*.q_proj:2", "join several patterns by ';'"),
        ("p_min=5,p_max=4", "p_min=5.0 is not allowed"),
        ("p_max=4,p_init=5", "p_init=5.0 is not allowed"),
        ("p_interval=0", "p_interval=0 is not allowed"),
        ("p_ema_decay=1", "p_ema_decay=1.0 is not allowed"),
        ("scale=huge", "scale='huge' is not allowed: one of schatten, match_rms_adamw, muon, interpolate, none"),
        ("ns_steps=2", "ns_steps=2 is not allowed: one of 3, 4, 5, 6, 7, 8"),
        ("compute_dtype=half", "compute_dtype='half' is not allowed: one of auto, float32, bfloat16"),
        (
            "p=inf,target=top_k:2,compute_dtype=bfloat16",
            "compute_dtype='bfloat16' is not allowed: target=top_k:2 multiplies in the momentum's own dtype",
        ),
        ("momentum=1", "momentum=1.0 is not allowed"),
        ("schatten_lr_ratio=0", "schatten_lr_ratio=0.0 is not allowed"),
        ("precondition=shampoo", "precondition='shampoo' is not allowed: one of none, adam, muadam"),
        ("step_rule=cube", "step_rule='cube' is not allowed: one of pinned, ball, regularized"),
        ("step_rule=ball,scale=muon", "scale='muon' is not allowed: step_rule=ball sets the update's length; leave"),
        (
            "coupling_order=2",
            "coupling_order=2.0 is not allowed: step_rule=pinned fixes the norm .* set step_rule=ball",
        ),
        ("step_rule=ball,coupling_order=0.5", "coupling_order=0.5 is not allowed: 1 or more, or none"),
        ("step_rule=ball,coupling_order=nan", "coupling_order=nan is not allowed: 1 or more, or none"),
        ("step_rule=ball,coupling_weights=sqrt_n_over_m", "coupling_weights='sqrt_n_over_m' .* set coupling_order"),
        ("step_rule=ball", "p=-4.0 is not allowed .* Use p of at least 1, p=adaptive, or step_rule=pinned"),
        (
            "step_rule=ball,p=-10",
            "p=-10.0 is not allowed with step_rule=ball: the order p \\+ 1 of its norm is at least 2",
        ),
        ("step_rule=regularized,p=adaptive,p_max=-10", "p_max=-10.0 is not allowed with step_rule=regularized"),
        ("step_rule=ball,p=schedule,p_schedule=4:-5", "p_schedule: END=-5.0 is not allowed with step_rule=ball"),
        (
            "step_rule=ball,p=4,p_overrides=*.c_proj:-8",
            "p_overrides: \\*.c_proj=-8.0 is not allowed with step_rule=ball",
        ),
        ("p=inf,target=low_rank", "target='low_rank' is not allowed: one of power, top_k:K, soft_threshold:TAU, soft"),
        ("p=inf,target=soft_treshold:0.1", "Did you mean 'soft_threshold'\\?"),
        (
            "p=inf,target=top_k",
            "target='top_k' is not allowed: write top_k:K, K a whole number from 1, such as top_k:8",
        ),
        ("p=inf,target=top_k:0", "target='top_k:0' is not allowed: write top_k:K, K a whole number from 1"),
        ("p=inf,target=top_k:2.5", "target='top_k:2.5' is not allowed: write top_k:K"),
        ("p=inf,target=soft_threshold:1", "target='soft_threshold:1' is not allowed: .* TAU between 0 and 1, such as"),
        ("p=inf,target=soft_step:nan", "target='soft_step:nan' is not allowed: write soft_step:TAU"),
        ("target=power:2", "target='power:2' is not allowed: write power, whose exponent is 1/p"),
        (
            "p=adaptive,target=top_k:4",
            "target='top_k:4' is not allowed: .* p=adaptive .* would be ignored; set p to a number",
        ),
        ("p=schedule,target=top_k:4", "p=schedule .* would be ignored; set p to a number, such as p=inf"),
        ("p=2,p_overrides=*.fc:4,target=top_k:4", "p_overrides would be ignored; .* leave p_overrides out"),
        (
            "p=2,step_rule=ball,target=top_k:4",
            "target='top_k:4' is not allowed: the norm of step_rule=ball .* set step_rule=pinned",
        ),
    ],
)
def test_a_bad_option_names_the_value_and_the_fix(text, message):
    with pytest.raises(OptionError, match=message):
        SchattenOptions.from_optim_args(text)
