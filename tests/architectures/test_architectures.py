"""Every architecture of transformers is routed as it should be, by names, by which the package does not decide."""

from __future__ import annotations

import re

import pytest
from architecture_table import PAGE, page
from huggingface_hub.errors import StrictDataclassError
from swept_models import UNAVAILABLE, architectures, families, make, make_first

from hf_schatten import RoutingError, route_parameters

# What must train with the Schatten-p update: projections of attention and of feed-forward layers.
MATRICES = re.compile(
    r"""\.( [qkvo] | [qkvo]_proj | out_proj | query | key | value | (query|key|value)_proj | qkv | qkv_proj | c_attn
    | query_key_value | in_proj_weight | [qkv]_lin | linear_[qkv] | Wqkv | Wo | Wi | kv_b_proj | q_[ab]_proj
    | c_proj | c_fc | fc1 | fc2 | fc_in | fc_out | (up|down|gate|gate_up)_proj | w[123] | wi | wi_[01] | wo
    | linear[12] | linear_fc[12] | lin[12] | intermediate_dense | output_dense | dense_h_to_4h | dense_4h_to_h
    | (attention|attn|intermediate)\.dense | in_proj | x_proj | dt_proj | pwconv[12] | pointwise_conv[12]
    )(\.weight)?$""",
    re.VERBOSE,
)
# What must not.
OTHERS = re.compile(
    r"""(^|\.)( embed_tokens | embed_positions | word_embeddings | \w*position_embeddings | token_type_embeddings | wte
    | wpe | shared | lm_head | classifier | score | qa_outputs | router | wg | A_log | D | \w*relative_attention_bias
    | relative_position_bias\w* | rel_pos\w* | patch_embed\w* | class_embed | bbox_embed
    | (?!norm_attn)\w*(?<![a-z])norm[12]? | \w*layer_?norm | LayerNorm | cls_token | mask_token | stem
    | \w*gate_bias | class_predictor | enc_score_head
    )(\.|$)""",
    re.VERBOSE,
)
STACKED = re.compile(r"\.\w*experts\.\w+(?<!bias)$|\.(input|output)_linear\.weight$")

# Where names mislead, by class and name of a parameter, and why.
EXCEPTIONS = {
    r"\w+:(.*\.)?query(\.weight)?$": "learned queries are embeddings",
    r"SqueezeBert\w+:.*\.post_attention\.": "a projection and its norm in one module",
    r"PPDocLayoutV4\w+:.*\.global_pointer\.": "the pointer head scores pairs of boxes",
    r"VibeVoice\w+:.*\.diffusion_head\.": "the diffusion head writes noise",
    r"VibeVoice\w+:(.*\.)?stem\.stage\.": "whole blocks in what it calls a stem",
    r"(Eomt|Videomt)\w+:mask_head\.": "the mask head",
    r"\w+:(\w*head|\w*classifier|classification_head|flow_head)\.": "part of a head that is more than one layer",
    r"PPOCRV6\w+:head\.": "the head reads words from features",
    r"Zaya\w+:.*\.gate\.(down_proj|router_mlp)\.": "the router is a network",
    r"AXK2\w+:.*layernorm\.mlp\.": "a norm with a gate of its own",
    r"RobertaPreLayerNorm\w+:roberta_prelayernorm\.": "a name of the model itself",
}
# Parameters that are not understood: they train with AdamW, and training says so.
NOT_UNDERSTOOD = {
    "Glm5NextTextIndexer",
    "Inkling2DynamicShortConvolution",
    "Inkling2RelativeLogits",
    "InklingRelativeLogits",
}
WITHOUT_MATRICES = {"EncodecModel"}  # a norm computes every weight


def check(class_name, model):
    if class_name in WITHOUT_MATRICES:
        with pytest.raises(RoutingError, match="nothing to orthogonalise"):
            route_parameters(model)
        return
    routing = route_parameters(model)
    wrong = []
    for route in routing.routes:
        name, shape = route.name, route.parameter.shape
        if route.destination == "frozen" or any(re.match(pattern, f"{class_name}:{name}") for pattern in EXCEPTIONS):
            continue
        spectral, vector = route.destination == "schatten_p", max(shape, default=1) == route.parameter.numel()
        known = MATRICES.search(f".{name}") and not OTHERS.search(name) and len(shape) > 1
        of_experts = STACKED.search(name) and len(shape) == 3 and min(shape) > 1
        if (spectral and (OTHERS.search(name) or vector)) or (not spectral and not vector and (known or of_experts)):
            wrong.append(f"{name} {tuple(shape)}: {route.destination}, {route.reason}")
        if of_experts and spectral and len(route.layout.part_names(shape)) < shape[0]:
            wrong.append(f"{name} {tuple(shape)}: not a matrix for each expert")
        if spectral:
            route.layout.check(name, shape)
    assert not wrong, "\n".join(wrong)
    unknown = [text for text in routing.warnings if not any(owner in text for owner in NOT_UNDERSTOOD)]
    assert not unknown


@pytest.mark.parametrize("model_type", families()[::3])  # all of them take a minute; the slow test below has them
def test_every_architecture_is_routed_by_what_its_modules_are(model_type):
    check(*make_first(model_type))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [each for each in architectures() if each not in UNAVAILABLE])
def test_every_class_is_routed_by_what_its_modules_are(model_type):
    made = 0
    for class_name in architectures()[model_type]:
        try:
            model = make(model_type, class_name)
        except Exception:  # a class of this type that wants another configuration
            continue
        made += 1
        check(class_name, model)
    assert made


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(UNAVAILABLE))
def test_what_is_left_out_cannot_be_made(model_type):
    with pytest.raises((ValueError, StrictDataclassError), match=r"can be made|Class validation error"):
        make_first(model_type)


@pytest.mark.slow
def test_the_page_says_how_every_architecture_is_routed():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/architectures/architecture_table.py"
