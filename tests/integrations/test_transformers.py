"""kvattn inside Hugging Face transformers: models of random weights give what they give with their own attention, "eager"."""

import inspect
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from conftest import chosen
from transformers import DynamicCache, StaticCache, masking_utils
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

import kvattn
from kvattn import layouts, rotation
from kvattn.conformance import native
from kvattn.integrations import transformers as integration
from kvattn.maps import attention_maps

integration.register()
torch.set_num_threads(1)  # of models as small as these a second thread only waits
NAMES = ["kvattn", *(f"kvattn-{name}" for name in chosen() if name in integration.OTHER_BACKENDS)]
TOKENS = torch.tensor([[5, 9, 2, 7, 3, 1, 6], [4, 8, 6, 2, 9, 3, 5]])
FULL, RIGHT, LEFT = torch.ones(2, 7, dtype=torch.long), torch.ones(2, 7, dtype=torch.long), torch.ones(2, 7, dtype=torch.long)
RIGHT[1, 4:] = 0
LEFT[1, :3] = 0

WIDTHS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 12}
WIDTHS |= {"max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
GROUPED = WIDTHS | {"num_key_value_heads": 2, "head_dim": 4}
CAPPED = GROUPED | {"sliding_window": 3, "attn_logit_softcapping": 0.7}
PAIR = {"vocab_size": 12, "d_model": 16, "decoder_start_token_id": 1}
PAIR |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
T5 = PAIR | {"d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
BART = PAIR | {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 4))}
BART |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32}
WHISPER = BART | {"max_source_positions": 12, "max_target_positions": 16, "num_mel_bins": 8}
GPT2 = {"vocab_size": 12, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 1, "eos_token_id": None}
MODELS = {  # one of each way in which an architecture uses attention
    "bert": (transformers.BertModel, transformers.BertConfig, WIDTHS),
    "vit": (transformers.ViTModel, transformers.ViTConfig, WIDTHS | {"image_size": 8, "patch_size": 4}),
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config, GPT2),
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, GROUPED),
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config, GROUPED | {"head_dim": 6}),  # norms, wider heads
    "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig, GROUPED | {"sliding_window": 3}),
    "gemma2": (transformers.Gemma2ForCausalLM, transformers.Gemma2Config, CAPPED | {"query_pre_attn_scalar": 9}),
    "gemma3": (transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig, CAPPED | {"sliding_window_pattern": 2}),
    "llama4": (
        transformers.Llama4ForCausalLM,
        transformers.Llama4TextConfig,
        GROUPED | {"attention_chunk_size": 3, "intermediate_size_mlp": 24, "num_local_experts": 2, "no_rope_layers": [1, 0]},
    ),
    "gpt_oss": (
        transformers.GptOssForCausalLM,
        transformers.GptOssConfig,
        GROUPED | {"sliding_window": 3, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "mllama": (transformers.MllamaForCausalLM, MllamaTextConfig, GROUPED | {"cross_attention_layers": [1]}),
    "t5": (transformers.T5ForConditionalGeneration, transformers.T5Config, T5),
    "bart": (transformers.BartForConditionalGeneration, transformers.BartConfig, BART),
    "whisper": (transformers.WhisperForConditionalGeneration, transformers.WhisperConfig, WHISPER),
    "bigbird_pegasus": (  # its encoder adds the mask to scores of its own, its decoder asks for attention
        transformers.BigBirdPegasusForConditionalGeneration,
        transformers.BigBirdPegasusConfig,
        BART | {"attention_type": "original_full"},
    ),
}


def test_the_code_of_the_page_runs_and_the_model_has_our_attention():
    page = Path(__file__).parents[2] / "docs" / "howto" / "transformers.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    exec(code, found := {})
    assert found["model"].config._attn_implementation == "kvattn"
    assert found["model"](input_ids=TOKENS).last_hidden_state.shape == (2, 7, 768)


def build(name, **options):
    """A model whose scores are large enough for a wrong one to be seen."""
    model, config, given = MODELS[name]
    torch.manual_seed(0)
    model = model(config(**given | options)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1 or parameter.shape == (4,) or parameter.numel() == 1:  # matrices, sinks, gates
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def given_to(model, mask=None):
    """Inputs of the model: 7 tokens, or an image, or a sound; decoders of a pair see 5 tokens, Mllama 11 states."""
    names = inspect.signature(model.forward).parameters
    if "pixel_values" in names and "input_ids" not in names:
        return {"pixel_values": torch.sin(torch.arange(384.0)).reshape(2, 3, 8, 8)}
    if "input_features" in names:
        return {"input_features": torch.sin(torch.arange(384.0)).reshape(2, 8, 24), "decoder_input_ids": TOKENS[:, :5]}
    inputs = {"input_ids": TOKENS} | ({} if mask is None else {"attention_mask": mask})
    if "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = TOKENS[:, :5].flip(1)
    if "cross_attention_states" in names:
        inputs["cross_attention_states"] = torch.sin(torch.arange(352.0)).reshape(2, 11, 16)
    return inputs


def called(model, name, **inputs):
    model.set_attn_implementation(name)
    assert model.config._attn_implementation == name
    return model(**inputs)


def rows(output, mask):
    """The output at the tokens that are no padding; a decoder of a pair has none."""
    x = output.logits if "logits" in output else output.last_hidden_state
    return x[mask.bool()] if mask is not None and x.shape[1] == mask.shape[1] else x


def same_gradients(ours, expected):
    assert set(ours) == set(expected)
    for parameter, grad in expected.items():
        unit = max(1.0, grad.abs().max().item())
        torch.testing.assert_close(ours[parameter], grad, atol=1e-4 * unit, rtol=0, msg=parameter)


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture(params=MODELS)
def model(request):
    return build(request.param)


def test_outputs_equal_eager(model, name):
    takes_mask = "attention_mask" in given_to(model, FULL)
    with torch.no_grad():
        for mask in (None, FULL, RIGHT, LEFT) if takes_mask else (None,):
            eager, ours = (rows(called(model, which, **given_to(model, mask)), mask) for which in ("eager", name))
            torch.testing.assert_close(ours, eager, atol=2e-5, rtol=2e-5)


def test_gradients_equal_eager_of_every_parameter(model, name):
    mask = RIGHT if "attention_mask" in given_to(model, RIGHT) else None
    found = []
    for which in ("eager", name):
        model.zero_grad()
        rows(called(model, which, **given_to(model, mask)), mask).square().sum().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    same_gradients(found[1], found[0])


def test_attentions_come_on_request(model, name):
    """GPT-2 does not tell its layers that they are asked for."""
    with torch.no_grad():
        inputs = given_to(model)
        eager, ours = (called(model, which, **inputs, output_attentions=True) for which in ("eager", name))
    shown = [key for key in eager if key.endswith("attentions")]
    assert shown
    for key in shown:
        for layer, expected in zip(ours[key], eager[key], strict=True):
            torch.testing.assert_close(layer, expected, atol=1e-5, rtol=1e-5)


def test_attentions_carry_gradients(name):
    model = build("bert")
    found = []
    for which in ("eager", name):
        model.zero_grad()
        called(model, which, input_ids=TOKENS, output_attentions=True).attentions[0].square().sum().backward()
        found.append(model.encoder.layer[0].attention.self.key.weight.grad.clone())
    assert found[0].abs().max() > 1e-3
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("states", [5, 11])
def test_cross_attention_without_a_mask_is_not_causal(states, name):
    model = build("mllama")
    inputs = {"input_ids": TOKENS[:, :5], "cross_attention_states": torch.randn(2, states, 16)}
    with torch.no_grad():
        eager, ours = (called(model, which, **inputs).logits for which in ("eager", name))
        inputs["cross_attention_states"][:, -1] += 1
        later = called(model, name, **inputs).logits
    torch.testing.assert_close(ours, eager, atol=2e-5, rtol=2e-5)
    assert (later != ours).any(-1).all()  # each query sees the last state


@pytest.mark.parametrize("which", ["gpt2", "llama", "mistral", "gemma2", "llama4", "gpt_oss"])
def test_generation_with_every_cache(which, name):
    model = build(which)
    prompt = {"inputs": torch.tensor([[5, 9, 2, 7, 3], [0, 0, 4, 8, 6]]), "pad_token_id": 0, "do_sample": False}
    prompt |= {"attention_mask": (prompt["inputs"] != 0).long(), "max_new_tokens": 5}
    for options in ({}, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}):
        written = []
        for implementation in ("eager", name):
            model.set_attn_implementation(implementation)
            written.append(model.generate(**prompt, **options, disable_compile=True))
        assert (written[0] == written[1]).all(), options


@pytest.mark.parametrize("which", ["t5", "bart", "bigbird_pegasus"])
def test_generation_from_an_encoder(which, name):
    model = build(which)
    for options in ({}, {"num_beams": 3}):
        written = []
        for implementation in ("eager", name):
            model.set_attn_implementation(implementation)
            written.append(
                model.generate(TOKENS, attention_mask=RIGHT, max_new_tokens=5, do_sample=False, disable_compile=True, **options)
            )
        assert (written[0] == written[1]).all(), options


@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
@pytest.mark.parametrize("which", ["llama", "mistral", "gemma2", "llama4", "gpt_oss"])
def test_pieces_with_a_cache_equal_the_whole(which, cache, name):
    """Two tokens, three, one and one: by the offset of the cache."""
    model = build(which)
    with torch.no_grad():
        whole = called(model, "eager", input_ids=TOKENS).logits
        model.set_attn_implementation(name)
        held = cache(config=model.config, **({"max_cache_len": 12} if cache is StaticCache else {}))
        given = "past_key_values" if "past_key_values" in inspect.signature(model.forward).parameters else "cache"
        for start, stop in ((0, 2), (2, 5), (5, 6), (6, 7)):
            piece = model(TOKENS[:, start:stop], **{given: held}).logits
            torch.testing.assert_close(piece, whole[:, start:stop], atol=2e-5, rtol=2e-5)


PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4]])


@pytest.mark.parametrize("which", ["llama", "mistral", "gemma2", "llama4", "gpt_oss"])
def test_packed_sequences_do_not_see_each_other(which, name):
    model = build(which)
    given = {"input_ids": TOKENS, "position_ids": PACKED, "use_cache": False}
    logits, found = [], []
    for implementation in ("eager", "sdpa" if model._supports_sdpa else "eager", name):
        model.zero_grad()
        logits.append(called(model, implementation, **given).logits)
        logits[-1].square().sum().backward()
        found.append({each: x.grad.clone() for each, x in model.named_parameters() if x.grad is not None})
    for other in (0, 1):
        torch.testing.assert_close(logits[2], logits[other], atol=2e-5, rtol=2e-5)
        same_gradients(found[2], found[other])
    if which in ("llama", "mistral"):
        apart = called(model, name, input_ids=TOKENS[:1, 4:]).logits
        torch.testing.assert_close(logits[2][:1, 4:], apart, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("which", "windows"), [("llama", [None, None]), ("mistral", [(2, None)] * 2), ("gemma2", [(2, None), None])]
)
def test_the_mask_of_packed_sequences_is_not_written(which, windows, monkeypatch):
    model, calls, attention = build(which).train(), [], kvattn.attention
    monkeypatch.setattr(kvattn, "attention", lambda *x, **options: calls.append(options) or attention(*x, **options))
    called(model, "kvattn", input_ids=TOKENS, position_ids=PACKED, use_cache=False)
    assert [options["window"] for options in calls] == windows
    for options in calls:
        assert options["mask"] is None
        assert options["causal"]
        assert options["segments"].tolist() == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]]


def test_the_mask_of_packed_sequences_is_written_when_a_model_computes_with_it():
    model = build("mistral", use_cache=False)
    model.set_attn_implementation("kvattn")
    embedded = model.get_input_embeddings()(TOKENS)
    for make in (masking_utils.create_causal_mask, masking_utils.create_sliding_window_causal_mask):
        masks = []
        for implementation in ("kvattn", "sdpa"):
            model.set_attn_implementation(implementation)
            masks.append(make(model.config, embedded, None, None, position_ids=PACKED))
        assert type(masks[0]) is integration.Causal
        assert (masks[0][:, :] == masks[1]).all()


@pytest.mark.parametrize("places", [True, False])
def test_what_a_collator_without_padding_gives_is_what_its_sequences_give_alone(places, name):
    """With the ends of sequences alone too, which eager does not know."""
    sequences = [TOKENS[0, :4].tolist(), TOKENS[0, 4:].tolist(), TOKENS[1, :2].tolist()]
    collate = transformers.DataCollatorWithFlattening(
        return_position_ids=places, return_flash_attn_kwargs=True, return_tensors="pt"
    )
    batch = collate([{"input_ids": each, "labels": each} for each in sequences])
    assert ("position_ids" in batch) == places
    model = build("gpt2" if places else "llama", use_cache=False)
    if not places:  # rotary embeddings tell distances alone
        batch.pop("labels")
    with torch.no_grad():
        ours = called(model, name, **batch).logits
        apart = torch.cat([called(model, "eager", input_ids=torch.tensor([each])).logits for each in sequences], dim=1)
    torch.testing.assert_close(ours, apart, atol=2e-5, rtol=2e-5)


def test_ends_of_sequences_in_several_rows_are_refused():
    ends = torch.tensor([0, 3, 7], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q tells of one row of sequences, not of 2"):
        called(build("llama"), "kvattn", input_ids=TOKENS, cu_seq_lens_q=ends, cu_seq_lens_k=ends)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("which", ["llama", "gpt_oss"])
def test_a_mask_of_four_axes_is_the_callers_own(which, kind, name):
    model = build(which)
    seen = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 1], [1, 1, 0, 1]], dtype=torch.bool)[None, None]
    added = torch.zeros(1, 1, 4, 4).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        eager = called(model, "eager", input_ids=TOKENS[:1, :4], attention_mask=added).logits
        ours = called(model, name, input_ids=TOKENS[:1, :4], attention_mask=seen if kind == torch.bool else added).logits
    torch.testing.assert_close(ours, eager, atol=2e-5, rtol=2e-5)


def test_an_added_mask_and_a_position_bias_add_up(name):
    model = transformers.T5EncoderModel(transformers.T5Config(**T5)).eval()
    torch.nn.init.normal_(model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight)
    added = torch.randn(2, 1, 7, 7)
    with torch.no_grad():
        eager, ours = (rows(called(model, which, input_ids=TOKENS, attention_mask=added), None) for which in ("eager", name))
    torch.testing.assert_close(ours, eager, atol=2e-5, rtol=2e-5)


def test_a_mask_of_integers_is_an_error():
    with pytest.raises(TypeError, match="attention_mask of 4 axes has dtype torch"):
        called(build("llama"), "kvattn", input_ids=TOKENS[:, :4], attention_mask=torch.ones(2, 1, 4, 4, dtype=torch.int64))


def test_a_decoder_can_be_asked_to_look_both_ways(name):
    model = build("llama")
    with torch.no_grad():
        causal, both = (called(model, name, input_ids=TOKENS, is_causal=way).logits for way in (True, False))
        eager = called(model, "eager", input_ids=TOKENS, is_causal=False).logits
    torch.testing.assert_close(both, eager, atol=2e-5, rtol=2e-5)
    assert (causal - both).abs().max() > 1e-2


def test_half_precision_is_eagers(name):
    for which in ("llama", "t5", "gpt_oss"):
        exact, model = build(which), build(which).to(torch.bfloat16)
        with torch.no_grad():
            expected = rows(called(exact, "eager", **given_to(exact, RIGHT)), RIGHT)
            eager, ours = (rows(called(model, x, **given_to(model, RIGHT)), RIGHT) for x in ("eager", name))
        assert ours.dtype == torch.bfloat16
        assert (ours - expected).abs().max() <= 1.5 * (eager - expected).abs().max()


def test_autocast_and_mixed_dtypes():
    for which in ("llama", "t5"):
        model = build(which)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            eager, ours = (rows(called(model, x, **given_to(model, RIGHT)), RIGHT) for x in ("eager", "kvattn"))
        torch.testing.assert_close(ours.float(), eager.float(), atol=0.1, rtol=0.1)
    x = torch.randn(1, 2, 3, 4)
    output = integration.forward(torch.nn.Identity(), x, x, x.bfloat16(), None)[0]
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), kvattn.attention(x, x, x).transpose(1, 2), atol=0.05, rtol=0.05)


def checkpointed(model, reentrant):
    enable = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # its older name
    getattr(model, f"{enable}_checkpointing_enable")({"use_reentrant": reentrant})


def gradients(model, **inputs):
    model.zero_grad()
    torch.manual_seed(3)
    model(**inputs).logits.square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("which", ["llama", "gpt_oss", "bart"])
def test_checkpointed_gradients_equal_the_others_with_dropout(which, reentrant):
    model = build(which, attention_dropout=0.5).train()
    model.set_attn_implementation("kvattn")
    inputs = given_to(model, RIGHT) if which == "bart" else given_to(model)
    plain = gradients(model, **inputs)
    checkpointed(model, reentrant)
    same_gradients(gradients(model, **inputs), plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_equal_eager(reentrant, name):
    model = build("llama").train()
    model.set_attn_implementation("eager")
    eager = gradients(model, input_ids=TOKENS)
    model.set_attn_implementation(name)
    checkpointed(model, reentrant)
    same_gradients(gradients(model, input_ids=TOKENS), eager)


def test_dropout_is_for_training_only():
    x, module = torch.zeros(1, 1, 8, 4), torch.nn.Identity()
    value = torch.eye(8)[None, None]  # the output is the weights, 1/8 each
    torch.manual_seed(0)
    dropped = integration.forward(module, x, x, value, None, dropout=0.5)[0]
    torch.manual_seed(0)
    again = integration.forward(module, x, x, value, None, dropout=0.5)[0]
    assert (dropped == again).all()
    assert set(dropped.unique().tolist()) == {0.0, 0.25}  # those that are left count twice
    for backend in ("torch", *(name.removeprefix("kvattn-") for name in NAMES[1:])):
        still = integration.forward(module.eval(), x, x, value, None, dropout=0.5, backend=backend)[0]
        assert (still == 0.125).all()


def test_one_query_without_a_mask_sees_every_key(name):
    backend = "torch" if name == "kvattn" else name.removeprefix("kvattn-")
    query, key = torch.randn(1, 2, 1, 4), torch.randn(1, 2, 6, 4)
    for is_causal in (None, True, False):
        for mask in (None, integration.allowed(batch_size=1, q_length=1, kv_length=6, q_offset=5)):
            module = torch.nn.Identity()
            module.is_causal = True
            ours = integration.forward(module, query, key, key, mask, is_causal=is_causal, backend=backend)[0]
            torch.testing.assert_close(ours, kvattn.attention(query, key, key).transpose(1, 2), atol=1e-6, rtol=1e-6)


def test_several_queries_without_a_mask_see_every_key_whatever_the_layer_is_called(name):
    backend = "torch" if name == "kvattn" else name.removeprefix("kvattn-")
    query, key = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 6, 4)
    module = torch.nn.Identity()
    module.is_causal = True
    for is_causal in (None, True):
        ours = integration.forward(module, query, key, key, None, is_causal=is_causal, backend=backend)[0]
        torch.testing.assert_close(ours, kvattn.attention(query, key, key).transpose(1, 2), atol=1e-6, rtol=1e-6)


def test_a_layer_may_be_asked_for_its_weights(name):
    backend = "torch" if name == "kvattn" else name.removeprefix("kvattn-")
    query, key = torch.randn(1, 4, 3, 4), torch.randn(1, 2, 6, 4)
    for asked in (None, False, True):
        weights = integration.forward(torch.nn.Identity(), query, key, key, None, output_attentions=asked, backend=backend)[1]
        if asked:
            expected = kvattn.attention(query, key, key, return_weights=True)[1]
            torch.testing.assert_close(weights, expected, atol=1e-6, rtol=1e-6)
        else:
            assert weights is None


def test_a_causal_mask_is_written_when_a_model_computes_with_it():
    """Gemma 4 cuts the mask to the queries that it keeps."""
    mask = integration.allowed(batch_size=2, q_length=3, kv_length=5, q_offset=0)
    expected = torch.ones(3, 5).tril().bool().expand(2, 1, 3, 5)
    assert type(mask) is integration.Causal
    assert mask.shape == (2, 1, 3, 5)
    assert mask.dtype == torch.bool
    assert mask.untyped_storage().nbytes() >= 15
    for part in (mask[:, :, -2:], mask[:, :, :, :4], mask.clone(), ~mask, mask & True, mask.to(torch.float32)):
        assert type(part) is torch.Tensor
    assert (mask[:, :, -2:] == expected[:, :, -2:]).all()
    assert (torch.where(mask, 1, 0) == expected).all()


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_plain_causal_mask_is_not_written(reentrant, monkeypatch):
    model, calls, attention = build("llama").train(), [], kvattn.attention
    monkeypatch.setattr(kvattn, "attention", lambda *x, **options: calls.append(options) or attention(*x, **options))
    if reentrant is not None:
        checkpointed(model, reentrant)
    called(model, "kvattn", input_ids=TOKENS, output_hidden_states=True)
    assert len(calls) == 2
    for options in calls:
        assert options["causal"]
        assert not options["return_weights"]
        assert options["mask"] is None


@pytest.mark.filterwarnings("ignore")  # transformers' own, of tracing
def test_a_compiled_and_a_traced_model_keep_causality():
    model = build("llama", use_cache=False)
    with torch.no_grad():
        eager = called(model, "eager", input_ids=TOKENS).logits
        model.set_attn_implementation("kvattn")

        class Logits(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, tokens):
                return self.model(tokens).logits

        for example in (7, 1):
            traced = torch.jit.trace(Logits(), (TOKENS[:, :example],), check_trace=False)
            for length in (7, 4, 1):
                torch.testing.assert_close(traced(TOKENS[:, :length]), eager[:, :length], atol=2e-5, rtol=2e-5)
        whole = torch.compile(model, backend="eager", fullgraph=True)
        with warnings.catch_warnings(action="error", category=UserWarning):  # torch.compile's own, of code of ours
            torch.testing.assert_close(whole(TOKENS).logits, eager, atol=2e-5, rtol=2e-5)
        torch.compiler.reset()
        for layer in model.model.layers:
            layer.compile(backend="eager")
        for length in (7, 4):
            torch.testing.assert_close(model(TOKENS[:, :length]).logits, eager[:, :length], atol=2e-5, rtol=2e-5)


def test_what_kvattn_has_not_is_refused():
    x, module = torch.zeros(1, 2, 3, 4, requires_grad=True), torch.nn.Identity()
    for name in integration.REFUSED:
        with pytest.raises(NotImplementedError, match=f"kvattn does not know {name}"):
            integration.forward(module, x, x, x, None, **{name: torch.zeros(2)})
    with pytest.raises(NotImplementedError, match="dropout while training"):
        integration.forward(module, x, x, x, None, dropout=0.1, backend="numpy")
    loss = integration.forward(module, x, x, x, None, backend="numpy")[0].square().sum()
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_each_name_goes_to_its_backend():
    known = transformers.AttentionInterface()
    for other in integration.OTHER_BACKENDS:
        assert known[f"kvattn-{other}"].keywords == {"backend": other}
    assert known["kvattn"].keywords == {"backend": "torch"}
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="nonesuch"):
        integration.forward(torch.nn.Identity(), x, x, x, None, backend="nonesuch")


def test_a_model_that_computes_its_attention_itself_says_so():
    config = transformers.BloomConfig(vocab_size=12, hidden_size=16, n_layer=1, n_head=2, attn_implementation="kvattn")
    with pytest.raises(NotImplementedError, match="BloomModel computes its attention itself"):
        transformers.BloomModel(config)(TOKENS)


# ---- rotary, beside the models' own


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {"factor": 4.0, "short_factor": [1.0 + 0.25 * i for i in range(8)], "long_factor": [1.5**i for i in range(8)]}
ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 3.0, "original_max_position_embeddings": 16},
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 64},
    "yarn, untruncated": {"factor": 8.0, "original_max_position_embeddings": 64, "truncate": False, "beta_fast": 16.0},
    "yarn of DeepSeek": {"factor": 40.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 0.5},
    "llama3": {"factor": 8.0, **LLAMA3},
    "longrope": {**LONGROPE, "original_max_position_embeddings": 16},
    "longrope, short": {**LONGROPE, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_is_llamas_with_every_scaling(rope):
    """A config's own rope_parameters are the scaling. transformers works in float32, angles included: positions stay small."""
    from transformers.models.llama import modeling_llama

    rope_type = rope.partition(",")[0].partition(" ")[0]
    given = {"rope_type": rope_type, "rope_theta": 5000.0, **ROPES[rope]}
    config = transformers.LlamaConfig(**GROUPED | {"head_dim": 16, "max_position_embeddings": 16, "rope_parameters": given})
    x, places = torch.randn(2, 4, 40, 16), torch.stack([torch.arange(40), 39 - torch.arange(40)])
    cos, sin = modeling_llama.LlamaRotaryEmbedding(config)(x, places)
    expected, _ = modeling_llama.apply_rotary_pos_emb(x, x, cos, sin)
    ours = kvattn.rotary(x, places[:, None], scaling=config.rope_parameters)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if rope_type != "default":
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope_type](config, "cpu", seq_len=40)
        found, by = rotation.frequencies(16, 5000.0, {"rope_type": rope_type, **ROPES[rope]}, 40)
        torch.testing.assert_close(torch.tensor(found), frequencies, atol=0, rtol=1e-5)
        assert by == pytest.approx(factor)


@pytest.mark.parametrize("turned", [8, 6])
def test_rotary_interleaved_is_gptjs(turned):
    from transformers.models.gptj import modeling_gptj

    x, places = torch.randn(2, 5, 3, 8), torch.arange(5)  # GPT-J turns before it moves the heads to the front
    sin, cos = modeling_gptj.create_sinusoidal_positions(32, turned)[places].split(turned // 2, dim=-1)
    expected = modeling_gptj.apply_rotary_pos_emb(x[..., :turned], sin[None], cos[None])
    expected = torch.cat([expected, x[..., turned:]], dim=-1).transpose(1, 2)
    ours = kvattn.rotary(x.transpose(1, 2), interleaved=True, rotary_dim=turned)
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=0)


# ---- weights of attention blocks, beside the blocks' own outputs


def _llama():
    """Grouped heads, rotary, no biases."""
    config = transformers.LlamaConfig(**GROUPED, attn_implementation="eager")
    block = transformers.models.llama.modeling_llama.LlamaAttention(config, 0)
    places = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    layer = {"num_kv_heads": 2, "rotary": {"scaling": config.rope_parameters}}
    return block, layer, {}, lambda x: block(x, position_embeddings=places(x, torch.arange(7)[None]))[0]


def _qwen3():
    """Grouped heads, queries and keys normed in each head, then rotary."""
    modeling = transformers.models.qwen3.modeling_qwen3
    config = transformers.Qwen3Config(**GROUPED, rms_norm_eps=1e-3, attn_implementation="eager")
    block, places = modeling.Qwen3Attention(config, 0), modeling.Qwen3RotaryEmbedding(config)
    layer = {"num_kv_heads": 2, "qk_norm": 1e-3, "rotary": {"scaling": config.rope_parameters}}
    return block, layer, {}, lambda x: block(x, position_embeddings=places(x, torch.arange(7)[None]), attention_mask=None)[0]


def _gpt2():
    """One matrix for queries, keys and values, as (in, out), with biases."""
    block = transformers.models.gpt2.modeling_gpt2.GPT2Attention(transformers.GPT2Config(**GPT2, attn_implementation="eager"))
    return block, {"bias": True}, {}, lambda x: block(x)[0]


def _bert():
    """With biases; the norm after it, which adds its input, is the block's and not attention's."""
    block = transformers.models.bert.modeling_bert.BertAttention(transformers.BertConfig(**WIDTHS, attn_implementation="eager"))
    return block, {"bias": True}, {}, lambda x: block.output.dense(block.self(x)[0])


def _t5():
    """Scores that are not scaled, and a bias by how far apart two tokens stand."""
    block = transformers.models.t5.modeling_t5.T5Attention(
        transformers.T5Config(**T5, attn_implementation="eager"), has_relative_attention_bias=True
    )
    return block, {}, {"scale": 1.0, "bias": block.compute_bias(7, 7).detach()}, lambda x: block(x)[0]


@pytest.mark.parametrize("layout", ["llama", "qwen3", "gpt2", "bert", "t5"])
def test_a_block_whose_weights_are_imported_gives_what_the_models_own_gives(layout, backend):
    torch.manual_seed(1)
    block, config, options, own = {"llama": _llama, "qwen3": _qwen3, "gpt2": _gpt2, "bert": _bert, "t5": _t5}[layout]()
    block.eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    if layout == "t5":
        options["bias"] = block.compute_bias(7, 7).detach()
    x = torch.randn(2, 7, 16)
    expected = own(x).detach().numpy()
    weights = layouts.translated(block.state_dict(), "llama" if layout == "qwen3" else layout)
    options = {name: y.numpy() if isinstance(y, torch.Tensor) else y for name, y in options.items()}
    config = {"num_hiddens": 16, "num_heads": 4, **config}
    results, *_ = native.run(backend, "MultiHeadAttention", config, weights, [x.numpy()] * 3, **options)
    torch.testing.assert_close(torch.tensor(kvattn.to_numpy(results[0])), torch.tensor(expected), atol=2e-5, rtol=2e-5)


def test_a_block_is_found_in_a_whole_model_by_its_name():
    from kvattn import torch as kv

    model = build("llama")
    layer = kv.MultiHeadAttention(16, 4, num_kv_heads=2, rotary={"scaling": model.config.rope_parameters})
    kv.import_weights(layer, model.state_dict(), "llama", prefix="model.layers.1.self_attn")
    assert torch.equal(layer.W_k.weight, model.model.layers[1].self_attn.k_proj.weight)
    with pytest.raises(
        ValueError, match=r"missing: q_proj.weight(.|\n)*give prefix=.*'model.layers.0.self_attn', 'model.layers.1"
    ):
        kv.import_weights(layer, model.state_dict(), "llama")


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (32, 256), (20, 100)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_are_t5s(bidirectional, num_buckets, max_distance):
    how = {"bidirectional": bidirectional, "num_buckets": num_buckets, "max_distance": max_distance}
    places = torch.arange(-300, 301)
    theirs = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket(places, **how)
    assert torch.equal(kvattn.relative_position_bucket(places, **how).long(), theirs)


def test_a_layer_may_give_each_query_a_sink_of_its_own(backend):
    """As Inkling 2 does: (batch, heads, n, 1)."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, 5, 8, dtype=torch.float64) for _ in range(3))
    sinks = torch.randn(2, 4, 5, 1, dtype=torch.float64, requires_grad=True)
    weights = torch.cat([query @ key.mT / math.sqrt(8), sinks], -1).softmax(-1)[..., :-1]
    expected = (weights @ value).transpose(1, 2)
    module = torch.nn.Module().eval()
    output, given = integration.forward(module, query, key, value, None, sinks=sinks, output_attentions=True, backend=backend)
    (by_sinks,) = torch.autograd.grad(output.square().sum(), sinks)
    (expected_by_sinks,) = torch.autograd.grad(expected.square().sum(), sinks)
    for found, wanted in ((output, expected), (given, weights), (by_sinks, expected_by_sinks)):
        assert (found - wanted).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("name", "names"),
    [("bert", ["layers"]), ("t5", ["encoder", "decoder", "cross"])],
)
def test_the_weights_of_every_layer_are_given_by_name(name, names):
    made, configuration, options = MODELS[name]
    model = made(configuration(**options)).eval()
    given = {"input_ids": TOKENS} | ({"decoder_input_ids": TOKENS[:, :3]} if name == "t5" else {})
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**given, output_attentions=True)
    model.set_attn_implementation("kvattn")
    found = attention_maps(model, **given)
    assert list(found) == [f"{each}.{i}" for each in names for i in range(2)]
    for each in names:
        wanted = expected["attentions" if each == "layers" else f"{each}_attentions"]
        for i, weights in enumerate(wanted):
            torch.testing.assert_close(found[f"{each}.{i}"], weights, rtol=0, atol=64 * torch.finfo(weights.dtype).eps)
            assert not found[f"{each}.{i}"].requires_grad
