"""Every transformers type, tiny: right to 1e-7 in float64, or refused by name. Never wrong.

Types that stand for the others are tested by default, all of them with ``-m coverage``.
"""

import pytest

import matrix

# by task: every adaptation, every kind of input, the types that most people fine-tune
REPRESENTATIVES = {
    "causal-lm": """qwen2@window phi3 gemma cohere2 granite olmo2 smollm3 starcoder2 falcon@alibi
        mixtral qwen3_moe deepseek_v3 hrm_text gpt_oss bloom gptj mpt gpt_neo ctrl doge xmod
        llama4_text gemma3n_text@kvshare gemma4_text@kvshare qwen3_next jamba nemotron_h lfm2
        granitemoehybrid phimoe mamba""",
    "masked-lm": "roberta distilbert esm albert deberta-v2 squeezebert flaubert",
    "seq-cls": "xlm-roberta deberta-v2 gpt2",
    "seq2seq": "t5 bart mbart pegasus marian t5gemma2 switch_transformers prophetnet qwen2_audio",
    "image-cls": "vit dinov2 siglip beit@relpos imagegpt swin resnet",
    "image-text": "llava qwen2_5_vl",
}


def _entries():
    for task, name in matrix.entries("A", "B", "C"):
        stands = name in REPRESENTATIVES[task].split()
        marks = [] if stands else pytest.mark.coverage
        yield pytest.param(task, name, id=f"{task}-{name}", marks=marks)


@pytest.mark.parametrize(("task", "name"), list(_entries()))
def test_a_type_is_right_or_refused(task, name):
    verdict = matrix.judge(task, name)
    refused = matrix.class_of(task, name) == "C" or f"{task}:{name}" in matrix.TABLE["refused"]
    assert verdict.word == ("refused" if refused else "right"), str(verdict)


def test_the_representatives_stand_for_every_adaptation():
    chosen = {(task, name) for task, names in REPRESENTATIVES.items() for name in names.split()}
    assert chosen <= set(matrix.entries("A", "B", "C"))
    codes = {code for entry in chosen for code in matrix.adaptations(*entry)}
    assert codes == {code for entry in matrix.entries("B") for code in matrix.adaptations(*entry)}


def _without_sinks(*args, sinks=None, **kwargs):
    return AttentionCall(*args, **kwargs)


def _uncounted(_positions, func, args, kwargs):
    return func(*args, **kwargs)


# by adaptation, an entry that needs it, and the function that makes it with one that does not
SWITCHES = {
    "iface": ("causal-lm:gpt_oss", "intercept._patch_interface", lambda: False),
    "sinks": ("causal-lm:gpt_oss", "intercept.AttentionCall", _without_sinks),
    "eagertap": ("causal-lm:gptj", "follow.Follower.see", lambda *_: NotImplemented),
    "nomask": ("image-cls:imagegpt", "follow.Follower.see", lambda *_: NotImplemented),
    "modlist": ("causal-lm:ctrl", "discovery._listed", lambda _: {}),
    "hybrid": ("causal-lm:qwen3_next", "discovery._along_tokens", lambda *_: {}),
    "kvshare": ("causal-lm:gemma4_text@kvshare", "discovery._shares_keys", lambda _: False),
    "packed2d": ("image-text:qwen2_5_vl", "discovery._asks_for_lengths", lambda _: False),
    "cross": ("seq2seq:bart", "arguments._is_states", lambda *_: False),
    "bias": ("seq2seq:t5", "arguments.Arguments.need_pairs", lambda _: None),
    "pairtable": ("masked-lm:deberta-v2", "arguments.Arguments.need_pairs", lambda _: None),
    "arange": ("causal-lm:llama4_text", "intercept._counted", _uncounted),
    "alibi": ("causal-lm:mpt", "intercept._counted", _uncounted),
    "localmask": ("causal-lm:gpt_neo", "intercept._counted", _uncounted),
}


@pytest.mark.parametrize(
    ("entry", "function", "instead"), list(SWITCHES.values()), ids=list(SWITCHES)
)
def test_without_its_adaptation_a_type_is_refused(entry, function, instead, monkeypatch):
    monkeypatch.setattr(f"lightning_sage.{function}", instead)
    verdict = matrix.judge(*entry.split(":"))
    assert verdict.word == "refused", str(verdict)
