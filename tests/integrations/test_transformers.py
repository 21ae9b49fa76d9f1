"""kvattn inside Hugging Face transformers: randomly initialised models give what they give with their own attention."""

import pytest
import torch
import transformers
from conftest import chosen

from kvattn.integrations import transformers as integration

integration.register()
NAMES = ["kvattn", *(f"kvattn-{name}" for name in chosen() if name in integration.OTHERS)]
TOKENS = torch.tensor([[5, 9, 2, 7, 3, 1], [4, 8, 6, 0, 0, 0]])
REAL = TOKENS != 0


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=12,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
        max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=None, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def hidden(model, name, **inputs):
    model.set_attn_implementation(name)
    output = model(**inputs)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.mark.parametrize("make", [bert, llama])
def test_outputs_equal_eager_on_real_tokens(make, name):
    model = make()
    with torch.no_grad():
        for inputs in ({"input_ids": TOKENS}, {"input_ids": TOKENS, "attention_mask": REAL.long()}):
            eager, ours = (hidden(model, which, **inputs)[REAL] for which in ("eager", name))
            torch.testing.assert_close(ours, eager, atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [bert, llama])
def test_gradients_equal_eager(make, name):
    model = make()
    found = []
    for which in ("eager", name):
        model.zero_grad()
        hidden(model, which, input_ids=TOKENS, attention_mask=REAL.long())[REAL].square().sum().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    eager, ours = found
    assert set(ours) == set(eager)
    for parameter, grad in eager.items():
        torch.testing.assert_close(ours[parameter], grad, atol=1e-4, rtol=1e-4, msg=parameter)


def test_generation_with_a_cache_and_left_padding(name):
    model = llama()
    tokens = torch.tensor([[5, 9, 2, 7], [0, 0, 4, 8]])
    written = []
    for which in ("eager", name):
        model.set_attn_implementation(which)
        generated = model.generate(tokens, attention_mask=(tokens != 0).long(), max_new_tokens=6, do_sample=False)
        written.append(generated)
    assert (written[0] == written[1]).all()


def test_weights_come_on_request(name):
    model = bert()
    for which in ("eager", name):
        model.set_attn_implementation(which)
        weights = model(TOKENS, attention_mask=REAL.long(), output_attentions=True).attentions
        if which == "eager":
            expected = weights
    for ours, eager in zip(weights, expected, strict=True):
        torch.testing.assert_close(ours[0], eager[0], atol=1e-5, rtol=0)


def test_a_soft_cap_is_passed_on():
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=12, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
        head_dim=4, max_position_embeddings=32, sliding_window=3, attn_logit_softcapping=0.5, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        eager, ours = (hidden(model, which, input_ids=TOKENS[:1]) for which in ("eager", "kvattn"))
    torch.testing.assert_close(ours, eager, atol=1e-5, rtol=0)


def test_what_kvattn_has_not_is_refused():
    x = torch.zeros(1, 2, 3, 4)
    module = torch.nn.Identity()
    with pytest.raises(NotImplementedError, match="s_aux"):
        integration.forward(module, x, x, x, None, s_aux=torch.zeros(2))
    with pytest.raises(NotImplementedError, match="dropout while training"):
        integration.forward(module, x, x, x, None, dropout=0.1, backend="numpy")


def test_dropout_is_the_models_own():
    x = torch.randn(1, 2, 3, 4)
    module = torch.nn.Identity()
    torch.manual_seed(0)
    first = integration.forward(module, x, x, x, None, dropout=0.5)[0]
    torch.manual_seed(0)
    again = integration.forward(module, x, x, x, None, dropout=0.5)[0]
    still = integration.forward(module.eval(), x, x, x, None, dropout=0.5)[0]
    assert (first == again).all()
    assert not torch.allclose(first, still)
